"""How long, and in how much memory, does the gate judge a large study? For `scripts.bench_eval`.

A run folder is made of records and manifests alone, as the other stages write them: S seeds, R recipes beside
`plain`, validation documents and a tenth as many shifted ones. Then `python -m eval.gate` judges it in fresh
processes. Scores are drawn at random; what they say is of no matter here.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval.core.config import ROOT
from eval.core.errors import entry
from eval.core.records import Documents
from tests.eval.run_builder import Run

# A child of its own asks for its peak: VmHWM of the gate's process, in kB.
CHILD = """
import runpy, sys
sys.argv = ["eval.gate", *sys.argv[1:]]
try:
    runpy.run_module("eval.gate", run_name="__main__")
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", peak.split()[1])
"""


@dataclass(frozen=True)
class Size:
    seeds: int = 5
    recipes: int = 20
    documents: int = 10_000


class LargeRun(Run):
    """As `Run`, with columns as large as those of real documents."""

    def documents(self, arm: str, seed: int, retained: float) -> Documents:
        columns = super().documents(arm, seed, retained)
        ids = [f"packages/library/module_{i}.py" for i in range(len(columns.id))]
        return columns.model_copy(update={"id": ids, "correct": [n // 3 for n in columns.tokens]})


def build_run(folder: Path, size: Size) -> Path:
    """A run folder of records and manifests; each recipe retains a little less than the one before."""
    run = LargeRun(
        folder,
        seeds=list(range(size.seeds)),
        recipes={f"r{i}": ("torch", 1 - i / 100, 1.0) for i in range(size.recipes)},
        sizes={"validation": size.documents, "far": size.documents // 10},
    )
    return run.make().path


def time_gate(run: Path) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of one `python -m eval.gate`, its start included."""
    started, before = time.perf_counter(), os.times()
    command = [sys.executable, "-c", CHILD, "--study", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, os.times()
    assert done.returncode in (0, 1, 2), done.stderr
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
    return {"seconds": wall, "CPU seconds": cpu, "peak, MiB": int(done.stdout.split()[-1]) / 1024}


def gate_rows(size: Size = Size(), times: int = 3) -> list[dict[str, object]]:
    """The gate's time and memory, one row per fresh process."""
    with TemporaryDirectory() as folder:
        run = build_run(Path(folder), size)
        what = {"seeds": size.seeds, "variants": size.recipes, "documents": size.documents}
        mib = sum(p.stat().st_size for p in run.rglob("records/**/*.json")) / 2**20
        return [{**what, "records, MiB": round(mib), **time_gate(run)} for _ in range(times)]


@entry
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(gate_rows(), indent=1))


if __name__ == "__main__":
    main()
