"""A release is tried out before it is one: loaded and timed by its own loader, in a process of its own."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from eval.core.artifacts import MANIFEST, hash_files, write_text
from eval.core.errors import UserError
from eval.core.records import machine
from eval.core.sections import Cost
from eval.cost.plan import cut_prompts
from eval.release.contract_file import LoaderCost, Target

REQUESTS = 10  # at most, of each target
REHEARSAL = """
import json, statistics, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, ".")
for name in ("compress", "distill", "eval"):
    sys.modules[name] = None  # a release runs where this project is not installed
from load_release import load_release
asked = json.load(sys.stdin)
start = time.perf_counter()
model, info = load_release(".", asked["target"])
measured = {"reason": info.reason, "load_s": time.perf_counter() - start}
prefill, decode = [], []
for number, ids in enumerate(asked["prompts"]):
    start = time.perf_counter()
    row = model._read(ids, first=True)
    stamps = [start, time.perf_counter()]
    for _ in range(asked["new_tokens"] - 1):
        row = model._read([int(row.argmax())], first=False)
        stamps.append(time.perf_counter())
    if number >= asked["warmup"]:
        prefill.append(1e3 * (stamps[1] - stamps[0]))
        decode += [1e3 * (b - a) for a, b in zip(stamps[1:], stamps[2:])]
measured |= {"prefill_ms": statistics.median(prefill), "decode_ms": statistics.median(decode)}
try:
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    measured["peak_memory_mib"] = int(line.split()[1]) / 1024
except OSError:
    measured["peak_memory_mib"] = None
print(json.dumps(measured))
"""


def is_runnable(target: Target) -> bool:
    """Can the target's artifact be run on this machine?"""
    import torch

    return target.device == "cpu" or torch.cuda.is_available()


def rehearse(place: Path, target: str, cost: Cost, texts: Iterable[str]) -> LoaderCost:
    """Loads a target in a fresh process that cannot see this project, and measures it there.

    Args:
        cost: settings of the study: prompts and tokens are those, requests at most `REQUESTS`.
        texts: what prompts are made of.

    Raises:
        UserError: the release would serve its fallback from the first day, or nothing at all.
    """
    files = {name: entry.model_dump() for name, entry in hash_files(place).items()}
    write_text(place / MANIFEST, json.dumps({"files": files}))
    cost = cost.model_copy(update={"requests": min(cost.requests, REQUESTS)})
    prompts = cut_prompts(cost, place / "fallback", texts, "prompts of the release")
    asked: dict[str, Any] = {"target": target, "prompts": prompts}
    asked |= cost.model_dump(include={"new_tokens", "warmup"})
    process = subprocess.run(
        [sys.executable, "-I", "-c", REHEARSAL],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": str(cost.threads)},
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
        raise UserError(f"release for {target}", reason, fix)
    sizes = {"requests": cost.requests, "prompt_tokens": cost.prompt_tokens}
    return LoaderCost(**measured, **sizes, machine=f"{machine().cpu}, Python {platform.python_version()}")
