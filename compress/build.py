"""Makes the variants of one student, then checks each in another process and publishes it.

What is made lies in the run's scratch folder, beside the answers that it gave in memory. Only a variant
that gives the same answers when it is loaded by its standard format becomes an artifact.
"""

import copy
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.calibration import check_batch, log_probs
from compress.recipe import Context, Pass, PassReport, Recipe, Stage
from distill.data.sources import training_rows
from eval.core.artifacts import build_artifact, digest, write_text
from eval.core.documents import Batch, boundary_id
from eval.core.errors import UserError
from eval.core.study import Study

SAME = 1e-3  # nats: largest difference of a log-probability between memory and the reloaded folder
SAME_KL = 1e-6  # nats per token, mean
REPORTS = "reports.json"  # written last into a made folder


@dataclass(frozen=True)
class Student:
    """A trained student that variants are made of."""

    arm: str
    seed: int
    folder: Path
    hash: str  # of its artifact
    data: str  # hash of the study's data
    rows: tuple[int, int]  # context and number of training rows

    @property
    def identity(self) -> list[Any]:
        """What decides its variants beside their recipes."""
        return [self.hash, self.data, self.rows]


@dataclass(frozen=True)
class Variant:
    """One recipe applied to one student."""

    student: Student
    recipe: Recipe

    @property
    def name(self) -> str:
        return f"variants/{self.recipe.name}/{self.student.arm}/s{self.student.seed}"

    @property
    def key(self) -> str:
        return digest([self.recipe.identity, self.student.identity])


def scratch_of(study: Study) -> Path:
    return study.folder / "scratch" / "variants"


def made_folder(study: Study, variant: Variant) -> Path:
    return scratch_of(study) / "made" / variant.name.removeprefix("variants/") / variant.key[:16]


def is_made(study: Study, variant: Variant) -> bool:
    """True if a run before has made it, and was stopped before it was published."""
    return (made_folder(study, variant) / REPORTS).is_file()


def hush() -> None:
    """One line per variant is enough: no bars of transformers, no remarks of bitsandbytes on each layer."""
    from transformers import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def make_variants(study: Study, variants: list[Variant], report: Callable[[float], None]) -> None:
    """Makes variants of one student into scratch folders."""
    hush()
    line = Line(study, variants)
    for i, variant in enumerate(variants):
        line.report = partial(lambda i, share: report((i + share) / len(variants)), i)
        model, reports = line.after(variant.recipe.passes)
        _write_made(made_folder(study, variant), model, line, reports)


class Line:
    """One student and what is made of it; a beginning that several recipes share is worked once."""

    def __init__(self, study: Study, variants: list[Variant]) -> None:
        from eval.engines.torch import load_checkpoint

        self.student = variants[0].student
        self.parent, self.tokenizer = load_checkpoint(self.student.folder)
        self.rows = training_rows(study, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.pad = boundary_id(self.tokenizer) if pad is None else pad
        self.scratch = scratch_of(study)
        self.report: Callable[[float], None] = lambda share: None
        starts = (v.recipe.passes[:n] for v in variants for n in range(1, len(v.recipe.passes)))
        whole = (v.recipe.passes for v in variants if not v.recipe.passes[-1].last)
        uses = Counter(self._key(passes) for passes in (*starts, *whole))
        self.shared = {key for key, count in uses.items() if count > 1}
        self.kept: dict[str, tuple[Any, list[PassReport]]] = {}

    def _key(self, passes: tuple[Pass, ...]) -> str:
        return digest([self.student.identity, [step.identity for step in passes]])

    def after(self, passes: tuple[Pass, ...]) -> tuple[Any, list[PassReport]]:
        """The model after `passes`, which belongs to the caller, and what each of them reported."""
        if not passes:
            return copy.deepcopy(self.parent), []
        key = self._key(passes)
        if key not in self.kept:
            model, reports = self.after(passes[:-1])
            looks = passes[-1].stage in (Stage.STRUCTURE, Stage.SPARSITY)
            if looks and torch.cuda.is_available():  # many forward passes, and nothing that asks for a CPU
                model = model.to("cuda")
            made, found = passes[-1].apply(model, self._context(passes[:-1]))
            made = made.to("cpu") if looks else made
            if key not in self.shared:
                return made, [*reports, found]
            self.kept[key] = made, [*reports, found]
        model, reports = self.kept[key]
        return copy.deepcopy(model), reports

    def _context(self, before: tuple[Pass, ...]) -> Context:
        scratch = self.scratch / "work" / self._key(before)[:16]
        scratch.mkdir(parents=True, exist_ok=True)
        seed = self.student.seed
        return Context(self.parent, self.tokenizer, self.rows, self.pad, seed, scratch, self.report)


def _write_made(folder: Path, model: Any, line: Line, reports: list[PassReport]) -> None:
    """Saves a model by its standard format, the answers it gives in memory, and its reports at last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Saved before it answers: on CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks NF4 weights at the first
    # call and would save the scales of the repacked ones.
    model.save_pretrained(folder / "model")
    line.tokenizer.save_pretrained(folder / "model")
    batch = check_batch(line.rows, line.pad)
    answers = log_probs(model, batch)
    if not bool(torch.isfinite(answers[batch.attention_mask.bool()]).all()):
        raise UserError(f"variant {folder.parent}", "answers that are not finite", "take a milder recipe")
    text = line.tokenizer.decode(line.rows[0].tokens[1:])
    tensors = {"log_probs": answers, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    tensors["text_ids"] = torch.tensor(line.tokenizer(text)["input_ids"])
    save_file(tensors, folder / "answers.safetensors", {"text": text})
    write_text(folder / REPORTS, json.dumps([r.model_dump(mode="json") for r in reports]))


def publish(study: Study, variant: Variant, report: Callable[[float], None]) -> None:
    """Loads a variant as anyone would, compares its answers and makes it an artifact.

    Raises:
        UserError: it answers differently from the model that was saved.
    """
    hush()
    made, student, recipe = made_folder(study, variant), variant.student, variant.recipe
    reports = json.loads((made / REPORTS).read_text())
    try:
        check = compare(made, recipe.engine)
    except UserError:
        shutil.rmtree(made)  # the next call makes it anew
        raise
    curves = [r["facts"]["loss_curve"] for r in reports if "loss_curve" in r["facts"]]
    facts: dict[str, Any] = {
        "arm": student.arm,
        "seed": student.seed,
        "recipe": recipe.name,
        "recipe_hash": digest(recipe.identity),
        "target": recipe.target,
        "engine": recipe.engine,
        "reports": reports,
        "reload": check,
        **({"loss_curve": curves[-1]} if curves else {}),
    }
    parents = {"student": student.hash, "data": student.data}
    place = study.folder / variant.name
    with build_artifact(
        place, kind="variant", name=variant.name, key=variant.key, parents=parents, facts=facts
    ) as aside:
        for path in (made / "model").iterdir():
            shutil.copy(path, aside / path.name)
    shutil.rmtree(made)


def compare(made: Path, engine: str) -> dict[str, float]:
    """Largest difference of a log-probability and mean KL(memory, folder), in nats, on training rows."""
    from eval.engines import load_engine

    known = load_file(made / "answers.safetensors")
    with safe_open(made / "answers.safetensors", framework="pt") as stream:
        text = stream.metadata()["text"]
    loaded = load_engine(engine, made / "model")
    thing, fix = f"variant {made.parent}", "it must not ship: report this with the versions of the libraries"
    if loaded.tokenizer(text)["input_ids"] != known["text_ids"].tolist():
        raise UserError(thing, "its reloaded tokenizer cuts text differently", fix)
    batch = Batch([], [], [], known["input_ids"], known["attention_mask"])
    here = batch.attention_mask.bool()
    before, after = known["log_probs"][here], torch.log_softmax(loaded.logits(batch).float(), -1)[here]
    gap, kl = float((before - after).abs().max()), float(divergence(before, after).mean())
    if not (gap <= SAME and kl <= SAME_KL):
        found = f"reloaded, log-probabilities differ by up to {gap:.3g} nats, KL {kl:.3g} nats per token"
        raise UserError(thing, found, fix)
    return {"log_prob_difference": gap, "kl": kl}


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """[N] KL(before, after) in nats, of log-probabilities [N, V]."""
    return (before.exp() * (before - after)).sum(dim=-1)
