"""A release is tried out before it is one: loaded and timed by its own loader, in processes of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.core.artifacts import MANIFEST, hash_files, write_text
from eval.core.errors import UserError
from eval.core.records import Process
from eval.core.sections import Cost
from eval.cost.plan import cut_prompts
from eval.release.contract_file import Target

REHEARSAL = """
import json, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, ".")
for name in ("compress", "distill", "eval", "scipy", "sklearn"):
    sys.modules[name] = None  # a release runs where this project, and what it alone needs, is not installed
from load_release import load_release
asked = json.load(sys.stdin)
start = time.perf_counter()
model, info = load_release(".", asked["target"])
measured = {"reason": info.reason, "load_s": time.perf_counter() - start}
prefill, decode = [], []
for number, ids in enumerate(asked["prompts"]):
    start = time.perf_counter()
    token = int(model._read(ids, first=True).argmax())
    stamps = [start, time.perf_counter()]
    for _ in range(asked["new_tokens"] - 1):
        token = int(model._read([token], first=False).argmax())
        stamps.append(time.perf_counter())
    if number >= asked["warmup"]:
        prefill.append(1e3 * (stamps[1] - stamps[0]))
        decode += [1e3 * (b - a) for a, b in zip(stamps[1:], stamps[2:])]
measured |= {"prefill_ms": prefill, "decode_ms": decode}
if asked["device"] == "cuda":
    import torch
    measured["peak_memory_bytes"] = torch.cuda.max_memory_reserved()
else:
    try:
        line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
        measured["peak_memory_bytes"] = int(line.split()[1]) * 1024
    except OSError:
        measured["peak_memory_bytes"] = None
print(json.dumps(measured))
"""


def is_runnable(target: Target) -> bool:
    """Can the target's artifact be run on this machine?"""
    import torch

    return target.device == "cpu" or torch.cuda.is_available()


def rehearse(place: Path, name: str, target: Target, cost: Cost, texts: Iterable[str]) -> list[Process]:
    """Loads a target in fresh processes that cannot see this project, and measures it there.

    Args:
        name: of the target.
        cost: settings of the study: processes, prompts and tokens are those, at batch 1.
        texts: what prompts are made of.

    Raises:
        UserError: the release would serve its fallback from the first day, or nothing at all.
    """
    files = {file: entry.model_dump() for file, entry in hash_files(place).items()}
    write_text(place / MANIFEST, json.dumps({"files": files}))
    model = place / "variants" / target.recipe  # it may have a vocabulary of its own
    prompts = cut_prompts(cost, model, texts, "prompts of the release")
    asked: dict[str, Any] = {"target": name, "device": target.device, "prompts": prompts}
    asked |= cost.model_dump(include={"new_tokens", "warmup"})
    return [_measured(place, name, asked, cost.threads) for _ in range(cost.processes)]


def _measured(place: Path, name: str, asked: dict[str, Any], threads: int) -> Process:
    """What one fresh process measures."""
    process = subprocess.run(
        [sys.executable, "-I", "-c", REHEARSAL],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(
            "release",
            f"its loader ended with {process.returncode} ({last})",
            "nothing was released; load_release.py must load it: correct the artifact or its engine",
        )
    measured = json.loads(process.stdout.splitlines()[-1])
    if reason := measured.pop("reason"):
        fix = "nothing was released; the loader must take the variant: correct its artifact"
        raise UserError(f"release for {name}", reason, fix)
    if measured["peak_memory_bytes"] is None:
        raise UserError("peak memory", "no /proc/self/status here", "build the release on Linux")
    return Process.model_validate(measured)
