"""Where models are scored: `--device auto|cpu|cuda`, and jobs dealt out to several GPUs."""

import argparse
from dataclasses import replace
from functools import partial

from eval.core.errors import UserError
from eval.core.jobs import Job
from eval.engines import engine_module

CPU, CUDA = "cpu", "cuda"


def add_device(parser: argparse.ArgumentParser) -> None:
    """Takes `--device`, for `find_devices`."""
    about = "where models run; auto: on every GPU, one model at a time each, or on the cpu (default: auto)"
    parser.add_argument("--device", default="auto", choices=["auto", CPU, CUDA], help=about)


def find_devices(choice: str) -> list[str]:
    """`cpu`, or all CUDA devices of this machine.

    Raises:
        UserError: `cuda` is asked for, and there is none.
    """
    if choice == CPU:
        return [CPU]
    import torch  # takes a second: not for --help

    if torch.cuda.is_available():
        return [f"{CUDA}:{i}" for i in range(torch.cuda.device_count())]
    if choice == CUDA:
        fix = "give --device cpu, or run this on a machine that has one"
        raise UserError("--device cuda", "this machine has no CUDA device", fix)
    return [CPU]


def deal_out(jobs: list[Job], devices: list[str], workers: int) -> tuple[list[Job], int]:
    """The jobs with a `device` each, and how many run side by side: on GPUs one a device."""
    if devices == [CPU]:
        return jobs, workers
    count = len(devices)
    dealt = [
        replace(
            job,
            run=partial(job.run, device=devices[i % count]),
            after=(jobs[i - count].name,) if i >= count else (),
        )
        for i, job in enumerate(jobs)
    ]
    return dealt, count


def settle_device(engines: list[str], device: str, subject: str) -> str:
    """`device`, or the cpu where an engine does not run on it: said in a line, and noted in the record."""
    kind = device.split(":", maxsplit=1)[0]
    for name in engines:
        if kind not in engine_module(name).DEVICES:
            print(f"{subject} runs on the cpu: engine {name} does not run on {kind}", flush=True)
            return CPU
    return device


def device_name(device: str) -> str:
    """As records have it: `cpu`, or the name of the accelerator."""
    if device == CPU:
        return CPU
    import torch

    return torch.cuda.get_device_name(device)
