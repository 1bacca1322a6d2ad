"""Run folders as the stages leave them, for every test that needs one.

`Run` makes records and manifests with the scores, costs and seeds that a test asks for, and no model;
`fake_run` makes tiny random models that can be scored; `gate` and `sign` judge and sign such a run.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distill.models.load import train_tokenizer
from eval.core.artifacts import Key, Manifest, build_artifact, digest, read_manifest
from eval.core.commands import write_json
from eval.core.config import ROOT
from eval.core.gate_file import GateFile, Opening, Variant, read_gate
from eval.core.plan import budget_of_run, fix_plan
from eval.core.records import CostRecord, Documents, Machine, Process, Provenance, Score, write_record
from eval.core.study import Study, load_study, make_run_folder, save_study, study_text
from eval.gate.decision import evaluate_gate, read_before
from eval.gate.evidence import collect_evidence
from eval.gate.history import link_of, write_runs
from eval.report.__main__ import render_reports
from eval.signoff.__main__ import add_signature, build_statement
from eval.signoff.keys import private_key
from tests.helpers import WORDS, text, tiny_model, tiny_study

CONTEXT = 32
COST = {"processes": 2, "prompt_tokens": 12, "new_tokens": 4, "requests": 3, "warmup": 1, "threads": 1}
FIXED = datetime(2025, 12, 31, tzinfo=UTC)  # when the budget was: before any record
NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
HOST = Machine(host="box", system="Linux", cpu="some CPU", isa="AVX512", cores=2, device="cpu")
GAINS = {"B": 0.0, "T0": 0.0, "T1": 0.12, "S0": 0.03, "S1": 0.12, "CE": 0.02}  # bits/byte better than B
# Engine, share of the gain retained, decode time relative to plain.
RECIPES = {"int8": ("openvino", 1.0, 0.6), "half": ("torch", 0.2, 1.0)}
TEACHERS = {"S1": "T1", "S0": "T0"}
SIZES = {"validation": 40, "far": 30}
BUDGET = {
    "name": "test",
    "f": 0.5,
    "g": 0.5,
    "slices": {"far": 0.5},
    "targets": {
        "cpu": {
            "device": "cpu",
            "limits": {
                "decode_p50": {"at_most": 1.0, "of": "plain"},
                "peak_memory": {"at_most": 500, "unit": "MiB"},
            },
        },
        "gpu": {"device": "cuda", "required": False},
    },
}


def teacher_hash(arm: str, seed: int) -> str:
    return digest(f"teacher {arm} {seed}")


@dataclass
class Run:
    """A run folder in the making; what a test spoils is a field or a file."""

    folder: Path
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    gains: dict[str, float] = field(default_factory=lambda: dict(GAINS))
    recipes: dict[str, tuple[str, float, float]] = field(default_factory=lambda: dict(RECIPES))
    sizes: dict[str, int] = field(default_factory=lambda: dict(SIZES))  # documents of each slice
    budget: dict = field(default_factory=lambda: json.loads(json.dumps(BUDGET)))
    noise: float = 0.002
    far: dict[str, float] = field(default_factory=dict)  # gains that differ on the slice `far`
    time: str = "2026-01-01T00:00:00+00:00"  # of every record
    load: dict | None = None  # how the study measures under load
    clusters: int | None = None  # of the documents of each slice, which are none without
    name: str = "toy"

    @property
    def path(self) -> Path:
        return self.folder / "runs" / self.name

    @property
    def study(self) -> Study:
        return Study.model_validate(
            {
                "name": self.name,
                "title": "A toy",
                "runs": str(self.folder / "runs"),
                "seeds": self.seeds,
                "data": {"documents": [{"kind": "folder", "path": "stdlib"}]},
                "base": {"path": "somewhere"},
                "method": {"name": "ensemble"},
                "train": {},
                "cost": {
                    "processes": 3,
                    "prompt_tokens": 64,
                    "new_tokens": 10,
                    "threads": 1,
                    "requests": 10,
                    "load": self.load,
                },
                "recipes": [str(self.folder / f"{name}.yaml") for name in self.recipes],
                "budget": str(self.folder / "budget.yaml"),
            }
        )

    def engine(self, recipe: str) -> str:
        return self.recipes[recipe][0] if recipe in self.recipes else "torch"

    def documents(self, arm: str, seed: int, retained: float) -> Documents:
        rng = np.random.default_rng(5)
        names = [name for name, n in self.sizes.items() for _ in range(n)]
        size = rng.integers(200, 4000, len(names))
        hard = rng.normal(2.7, 0.3, len(names))
        noise_rng = np.random.default_rng([seed, *map(ord, arm)])
        gain = np.where(np.array(names) == "far", self.far.get(arm, self.gains[arm]), self.gains[arm])
        value = gain * retained + noise_rng.normal(0, self.noise)  # of the model, then of each document
        value = value + noise_rng.normal(0, self.noise * 4, len(names))
        return Documents(
            id=[f"d{i}" for i in range(len(names))],
            slice=names,
            bytes=size.tolist(),
            tokens=(size // 3).tolist(),
            bits=((hard - value) * size).tolist(),
            cluster=None if self.clusters is None else [f"c{i % self.clusters}" for i in range(len(names))],
        )

    def artifact(self, place: str, parents: dict[str, str] | None = None, content: str = "") -> str:
        facts: dict = {}
        with build_artifact(
            self.path / place, kind="model", name=place, key=Key(place), parents=parents or {}, facts=facts
        ) as aside:
            (aside / "model.safetensors").write_text((content or place).ljust(self.disk(place)))
        return read_manifest(self.path / place).hash

    def disk(self, place: str) -> int:
        """Bytes of an artifact: of a variant as its decode time, of all else a little more than 20 kB."""
        top, recipe = place.split("/")[:2] if "/" in place else (place, "")
        return int(20_000 * self.recipes[recipe][2]) if top == "variants" else 25_000

    def provenance(self, artifact: str, machine: Machine = HOST) -> Provenance:
        return Provenance(
            artifact=artifact,
            config=self.study.hash(),
            machine=machine,
            versions={"torch": "2.13.0"},
            time=self.time,
        )

    def score(self, arm: str, seed: int, artifact: str, recipe: str = "plain", retained: float = 1.0) -> Path:
        record = Score(
            arm=arm,
            seed=seed,
            recipe=recipe,
            engine=self.engine(recipe),
            data=read_manifest(self.path / "data").hash,
            documents=self.documents(arm, seed, retained),
            provenance=self.provenance(artifact),
        )
        return write_record(self.path, record)

    def cost(self, recipe: str, factor: float, target: str = "cpu", machine: Machine = HOST) -> Path:
        rng = np.random.default_rng([len(recipe), ord(recipe[0])])
        rounds = 1 + 0.1 * np.random.default_rng(1).random(
            self.study.cost.processes
        )  # slow spells hit every variant of a round
        processes = [
            Process(
                prefill_ms=(5 * slow * rng.normal(1, 0.01, 10)).tolist(),
                decode_ms=(2 * factor * slow * rng.normal(1, 0.01, 90)).tolist(),
                load_s=0.1,
                peak_memory_bytes=int(300e6 * (1 + 0.001 * rng.random())),
            )
            for slow in rounds
        ]
        place = "students/S1/s0" if recipe == "plain" else f"variants/{recipe}/S1/s0"
        record = CostRecord(
            arm="S1",
            seed=0,
            recipe=recipe,
            engine=self.engine(recipe),
            target=target,
            disk_bytes=read_manifest(self.path / place).bytes,
            prompt_tokens=64,
            new_tokens=10,
            threads=1,
            warmup=3,
            processes=processes,
            provenance=self.provenance(read_manifest(self.path / place).hash, machine),
        )
        return write_record(self.path, record)

    def make(self) -> "Run":
        self.path.mkdir(parents=True, exist_ok=True)
        for name in self.recipes:
            (self.folder / f"{name}.yaml").write_text(
                f"name: {name}\ntarget: cpu\npasses: [{{pass: {name}}}]\n"
            )
        (self.folder / "budget.yaml").write_text(yaml.safe_dump(self.budget))
        (self.path / "study.yaml").write_text(study_text(self.study))
        fix_plan(self.study, FIXED)
        data = {"data": self.artifact("data")}
        for seed in self.seeds:
            base = self.artifact(f"base/s{seed}", data)
            for arm in self.gains:
                teacher = {"teacher": teacher_hash(TEACHERS[arm], seed)} if arm in TEACHERS else {}
                plain = base if arm == "B" else teacher_hash(arm, seed)
                if arm in ("S1", "S0", "CE"):
                    plain = self.artifact(f"students/{arm}/s{seed}", {**data, "base": base, **teacher})
                self.score(arm, seed, plain)
                for recipe, (_, retained, _) in self.recipes.items() if arm in ("S1", "S0") else ():
                    variant = self.artifact(f"variants/{recipe}/{arm}/s{seed}", {**data, "student": plain})
                    self.score(arm, seed, variant, recipe, retained)
        for recipe, (_, _, factor) in {"plain": ("torch", 1.0, 1.0), **self.recipes}.items():
            self.cost(recipe, factor)
        return self

    def gate(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-W",
                "error::RuntimeWarning",
                "-m",
                "eval.gate",
                "--study",
                str(self.path),
                *words,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def result(self) -> GateFile:
        return GateFile.model_validate_json((self.path / "gate.json").read_text())


def an_opening(run: Run, number: int, verdict: str = "PASS", reason: str | None = None) -> Opening:
    """A look at test documents that are not there, for int8, of what the gate judged."""
    result = run.result()
    return Opening(
        number=number,
        previous=link_of(run.path, number),
        time=f"2026-01-0{number}T00:00:00+00:00",
        by="Ada",
        reason=reason,
        recipe="int8",
        target="cpu",
        budget=result.budget["hash"],
        config=run.study.hash(),
        data=result.provenance.data,
        artifacts=result.provenance.artifacts,
        verdict=verdict,
    )


def copy_run(source: Path, folder: Path) -> Run:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return Run(folder)


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_score(change, name: str = "plain/S1-s1"):
    return lambda run: edit(run.path / f"records/score/{name}.json", change)


def row(result: GateFile, recipe: str, target: str = "cpu") -> Variant:
    return next(v for v in result.variants if (v.recipe, v.target) == (recipe, target))


def tokenizer(vocab_size: int = 300):
    return train_tokenizer([text(d, i) for d in WORDS for i in range(5)], vocab_size)


def put(run: Path, name: str, fill, **facts: Any) -> Manifest:
    """Writes the artifact `name`; `fill` writes into the folder that it is given."""
    folder = run / name
    kind = "variant" if name.startswith("variants") else "model"
    with build_artifact(folder, kind=kind, name=name, key=Key(name), parents={}, facts=facts) as aside:
        fill(aside)
    return read_manifest(folder)


def torch_model(seed: int = 0, **changes: Any):
    """A writer of a checkpoint for `put`."""

    def fill(folder: Path) -> None:
        tiny_model(seed=seed, **changes).save_pretrained(folder)
        tokenizer().save_pretrained(folder)

    return fill


def facts(arm: str, recipe: str = "plain", engine: str = "torch", seed: int = 0) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "recipe": recipe, "engine": engine}


def put_data(run: Path, **extra: str) -> None:
    """Documents of code and prose; `extra` adds texts to the validation ones under ids of their own."""

    def rows(domain: str, seeds: range, more: dict[str, str] | None = None) -> str:
        texts = {f"{domain}-{i}": text(domain, i, words=30 + 20 * (i % 5)) for i in seeds} | (more or {})
        entries = [{"id": n, "domain": domain, "text": t, "bytes": len(t.encode())} for n, t in texts.items()]
        return "".join(json.dumps(row) + "\n" for row in entries)

    with build_artifact(
        run / "data", kind="data", name="data", key=Key("data"), parents={}, facts={}
    ) as aside:
        (aside / "train.jsonl").write_text(rows("code", range(100, 110)))
        (aside / "validation.jsonl").write_text(rows("code", range(6), extra))
        (aside / "test.jsonl").write_text(rows("code", range(20, 22)))
        (aside / "far.jsonl").write_text(rows("prose", range(3)))


def fake_run(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """(study file, run folder) with data, a base, S1 and S0 of one seed."""
    given = {"seeds": [0], "cost": COST, "workers": 1, "recipes": ["int8", "wanda50"], **changes}
    path = tiny_study(folder, **given)
    run = make_run_folder(load_study(path))
    save_study(load_study(path))
    fix_plan(load_study(path))
    put_data(run)
    for seed, (name, arm) in enumerate(
        {"base/s0": "B", "students/S1/s0": "S1", "students/S0/s0": "S0"}.items()
    ):
        put(run, name, torch_model(seed), **facts(arm))
    return path, run


def gate(run, budget=None):
    """gate.json as the gate writes it, by the fixed budget or another one."""
    study = load_study(run.path)
    budget = budget_of_run(study, budget)
    result = evaluate_gate(collect_evidence(run.path, study, budget), budget, read_before(run.path))
    write_runs(run.path, result.runs)
    write_json(run.path / "gate.json", result)


def report(run) -> None:
    """The reports as the command makes them."""
    for name, content in render_reports(run.path, read_gate(run.path)).items():
        (run.path / name).write_text(content)


def sign(run, key, recipe="int8", target="cpu", **given):
    signer = private_key(key)
    statement = build_statement(
        run.path, recipe=recipe, target=target, **{"by": "Ada", "signer": signer, "now": NOW, **given}
    )
    return add_signature(run.path, statement, signer)
