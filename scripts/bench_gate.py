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
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402
import yaml  # noqa: E402

from eval.core.artifacts import Key, build_artifact, read_manifest  # noqa: E402
from eval.core.config import ROOT  # noqa: E402
from eval.core.errors import entry  # noqa: E402
from eval.core.records import PLAIN, Documents, Machine, Measured, Process, Provenance, Score, write_record  # noqa: E402
from eval.core.study import Study, study_text  # noqa: E402

GAINS = {"B": 0.0, "T0": 0.0, "T1": 0.1, "S1": 0.08, "S0": 0.02, "CE": 0.01}  # bits/byte
HOST = Machine(host="bench", system="none", cpu="none", isa="none", cores=1, device="cpu")
TIME = datetime.now(UTC).isoformat(timespec="seconds")
BUDGET = {
    "name": "bench",
    "f": 0.5,
    "g": 0.5,
    "slices": {"far": 0.5},
    "targets": {"cpu": {"device": "cpu", "limits": {"decode_p50": {"at_most": 1.5, "of": PLAIN}}}},
}
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


def synthetic_study(folder: Path, size: Size) -> Study:
    names = [f"r{i}" for i in range(size.recipes)]
    for name in names:
        (folder / f"{name}.yaml").write_text(f"name: {name}\ntarget: cpu\npasses: [{{pass: {name}}}]\n")
    (folder / "budget.yaml").write_text(yaml.safe_dump(BUDGET))
    return Study.model_validate(
        {
            "name": "bench",
            "runs": str(folder),
            "seeds": list(range(size.seeds)),
            "data": {"documents": [{"kind": "folder", "path": "stdlib"}]},
            "base": {"path": "none"},
            "method": {"name": "ensemble"},
            "train": {},
            "recipes": [str(folder / f"{name}.yaml") for name in names],
            "budget": str(folder / "budget.yaml"),
        }
    )


@dataclass(frozen=True)
class Writer:
    """Writes the artifacts and records of one synthetic run."""

    study: Study
    documents: int

    def artifact(self, name: str, **parents: str) -> str:
        folder = self.study.folder / name
        key = Key(name)
        with build_artifact(folder, kind="model", name=name, key=key, parents=parents, facts={}) as temporary:
            (temporary / "model").write_text(name)
        return read_manifest(folder).hash

    def provenance(self, artifact: str) -> Provenance:
        return Provenance(artifact=artifact, config=self.study.hash(), machine=HOST, versions={}, time=TIME)

    def score(self, data: str, arm: str, seed: int, artifact: str, recipe: str = PLAIN) -> None:
        far = self.documents // 10
        n = self.documents + far
        rng, noise = np.random.default_rng(0), np.random.default_rng([seed, *map(ord, arm + recipe)])
        size = rng.integers(200, 4000, n)
        value = rng.normal(2.7, 0.3, n) - GAINS[arm] - noise.normal(0, 0.005) - noise.normal(0, 0.05, n)
        columns = Documents(
            id=[f"packages/library/module_{i}.py" for i in range(n)],
            slice=["validation"] * self.documents + ["far"] * far,
            bytes=size.tolist(),
            tokens=(size // 3).tolist(),
            correct=(size // 9).tolist(),
            bits=(value * size).tolist(),
        )
        record = Score(
            arm=arm,
            seed=seed,
            recipe=recipe,
            engine="torch",
            data=data,
            documents=columns,
            provenance=self.provenance(artifact),
        )
        write_record(self.study.folder, record)

    def cost(self, recipe: str, artifact: str) -> None:
        rng = np.random.default_rng(len(recipe))
        process = Process(
            prefill_ms=rng.normal(5, 0.1, 20).tolist(),
            decode_ms=rng.normal(2, 0.1, 600).tolist(),
            load_s=0.1,
            peak_memory_bytes=10**8,
        )
        settings = self.study.cost
        record = Measured(
            arm="S1",
            seed=0,
            recipe=recipe,
            engine="torch",
            target="cpu",
            disk_bytes=10**6,
            prompt_tokens=settings.prompt_tokens,
            new_tokens=settings.new_tokens,
            threads=settings.threads,
            processes=[process] * 3,
            provenance=self.provenance(artifact),
        )
        write_record(self.study.folder, record)

    def run(self, recipes: list[str]) -> None:
        data = self.artifact("data")
        self.study.folder.joinpath("study.yaml").write_text(study_text(self.study))
        for seed in self.study.seeds:
            base = self.artifact(f"base/s{seed}", data=data)
            self.score(data, "B", seed, base)
            for side in ("T0", "T1"):
                self.score(data, side, seed, f"{side} {seed}")
            for arm, teacher in {
                "S1": {"teacher": f"T1 {seed}"},
                "S0": {"teacher": f"T0 {seed}"},
                "CE": {},
            }.items():
                student = self.artifact(f"students/{arm}/s{seed}", data=data, base=base, **teacher)
                self.score(data, arm, seed, student)
                if (arm, seed) == ("S1", 0):
                    self.cost(PLAIN, student)
                for recipe in recipes if arm != "CE" else ():
                    variant = self.artifact(f"variants/{recipe}/{arm}/s{seed}", data=data, student=student)
                    self.score(data, arm, seed, variant, recipe)
                    if (arm, seed) == ("S1", 0):
                        self.cost(recipe, variant)


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
        study = synthetic_study(Path(folder), size)
        study.folder.mkdir()
        Writer(study, size.documents).run([f"r{i}" for i in range(size.recipes)])
        what = {"seeds": size.seeds, "variants": size.recipes, "documents": size.documents}
        mib = sum(p.stat().st_size for p in study.folder.rglob("records/**/*.json")) / 2**20
        return [{**what, "records, MiB": round(mib), **time_gate(study.folder)} for _ in range(times)]


@entry
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(gate_rows(), indent=1))


if __name__ == "__main__":
    main()
