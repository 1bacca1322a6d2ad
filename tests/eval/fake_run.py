"""A run folder as training and compression leave it, made of tiny random models in a second."""

import json
from pathlib import Path
from typing import Any

from distill.models.load import train_tokenizer
from eval.core.artifacts import Manifest, build_artifact, digest, read_manifest
from eval.core.study import load_study, make_run_folder, save_study
from tests.helpers import WORDS, text, tiny_model, tiny_study

CONTEXT = 32
COST = {"processes": 2, "prompt_tokens": 12, "new_tokens": 4, "requests": 3, "warmup": 1, "threads": 1}


def tokenizer(vocab_size: int = 300):
    return train_tokenizer([text(d, i) for d in WORDS for i in range(5)], vocab_size)


def put(run: Path, name: str, fill, **facts: Any) -> Manifest:
    """Writes the artifact `name`; `fill` writes into the folder that it is given."""
    folder = run / name
    kind = "variant" if name.startswith("variants") else "model"
    with build_artifact(folder, kind=kind, name=name, key=digest(name), parents={}, facts=facts) as aside:
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
        made = [{"id": n, "domain": domain, "text": t, "bytes": len(t.encode())} for n, t in texts.items()]
        return "".join(json.dumps(row) + "\n" for row in made)

    with build_artifact(run / "data", kind="data", name="data", key="data", parents={}, facts={}) as aside:
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
    put_data(run)
    for seed, (name, arm) in enumerate(
        {"base/s0": "B", "students/S1/s0": "S1", "students/S0/s0": "S0"}.items()
    ):
        put(run, name, torch_model(seed), **facts(arm))
    return path, run
