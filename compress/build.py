"""Builds the variants of one student: recipes applied pass by pass, saved but not yet verified.

A built variant lies in the scratch folder of the run, with the reports of its passes and a reference of its
answers in memory. `compress.publish` verifies it by that and makes it an artifact.
"""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from compress.calibration import check_batch, check_rows, own_rows, rounding_error
from compress.model_size import cast_weights
from compress.recipe import (
    Context,
    Failures,
    MethodTargets,
    Pass,
    PassReport,
    Recipe,
    Stage,
    check_reach,
)
from compress.verify import MODEL, save_reference
from distill.data.rows import training_documents, training_rows
from distill.teachers.target_source import open_target_source
from eval.core.artifacts import Key, digest, make_key, write_text
from eval.core.documents import pad_id
from eval.core.errors import attempt
from eval.core.study import Study
from eval.engines import silenced

REPORTS = "reports.json"  # written last: a folder that holds it is whole


@dataclass(frozen=True)
class TrainedStudent:
    """A student of the run that variants are made of."""

    arm: str
    seed: int
    folder: Path
    hash: str  # of its artifact
    data: str  # hash of the data artifact
    rows: tuple[int, int | str]  # context and number of training rows

    @property
    def identity(self) -> list[Any]:
        """What decides its variants beside their recipes."""
        return [self.hash, self.data, self.rows]


@dataclass(frozen=True)
class Variant:
    """One recipe applied to one student."""

    student: TrainedStudent
    recipe: Recipe
    targets: str | None = None  # fingerprint of the student's own targets, of a recipe that learns from them

    @property
    def name(self) -> str:
        return f"variants/{self.recipe.name}/{self.student.arm}/s{self.student.seed}"

    @property
    def key(self) -> Key:
        targets = [] if self.targets is None else [self.targets]
        return make_key("variant", [self.recipe.settings, self.student.identity, *targets], self.recipe.code)


def scratch_folder(study: Study) -> Path:
    return study.folder / "scratch" / "variants"


def build_folder(study: Study, variant: Variant) -> Path:
    return scratch_folder(study) / "built" / variant.name.removeprefix("variants/") / variant.key.digest[:16]


def is_built(study: Study, variant: Variant) -> bool:
    """True if an earlier command built it, and was stopped before it was published."""
    return (build_folder(study, variant) / REPORTS).is_file()


def build_variants(study: Study, variants: list[Variant], report: Callable[[float], None]) -> Failures:
    """Builds variants of one student into scratch folders; returns why recipes failed."""
    failures = Failures()
    with silenced("transformers", "bitsandbytes"):
        builder = VariantBuilder(study, variants)
        for i, variant in enumerate(variants):
            builder.report = partial(lambda i, share: report((i + share) / len(variants)), i)
            if why := attempt(_save_built, build_folder(study, variant), variant, builder):
                failures[variant.recipe.name] = f"{variant.student.arm}/s{variant.student.seed}: {why}"
    return failures


class VariantBuilder:
    """Applies recipes to one student; passes at the start that several recipes share run once."""

    def __init__(self, study: Study, variants: list[Variant]) -> None:
        from eval.engines.torch import load_checkpoint, stored_dtype

        self.student, self.row_tokens = variants[0].student, study.data.context
        parent, tokenizer = load_checkpoint(self.student.folder)
        self.scratch = scratch_folder(study)
        self.report: Callable[[float], None] = lambda share: None
        targets = next((v.targets for v in variants if v.targets is not None), None)
        source = partial(open_target_source, study, self.student.arm, self.student.seed, tokenizer)
        self.context = Context(
            parent=parent,
            tokenizer=tokenizer,
            rows=training_rows(study, tokenizer),
            pad=pad_id(tokenizer),
            seed=self.student.seed,
            scratch=self.scratch,
            report=self.report,
            dtype=stored_dtype(self.student.folder),
            documents=partial(training_documents, study),
            method=None if targets is None else MethodTargets(targets, source),
        )
        starts = (v.recipe.passes[:n] for v in variants for n in range(1, len(v.recipe.passes)))
        whole = (v.recipe.passes for v in variants if not v.recipe.passes[-1].last)
        uses = Counter(self._key(passes) for passes in (*starts, *whole))
        self.shared = {key for key, count in uses.items() if count > 1}
        self.contexts: dict[str, Context] = {}  # by the passes before
        self.cache: dict[str, tuple[Any, list[PassReport]]] = {}  # of shared passes

    @cached_property
    def rounding_error(self) -> float:
        """What float32 leaves open on the student itself, in nats: the same for all of its variants."""
        return rounding_error(self.context.parent, check_batch(self.context.rows, self.context.pad))

    def _key(self, passes: tuple[Pass, ...]) -> str:
        return digest([self.student.identity, [step.identity for step in passes]])

    def apply_passes(self, passes: tuple[Pass, ...]) -> tuple[Any, list[PassReport]]:
        """The model after `passes`, a copy that the caller may change, and the report of each pass."""
        if not passes:
            return copy.deepcopy(self.context.parent), []
        key = self._key(passes)
        if key not in self.cache:
            model, reports = self.apply_passes(passes[:-1])
            context = self.context_after(passes[:-1])
            if (own := passes[-1].calibration) is not None:
                context = replace(context, rows=own_rows(own, context.tokenizer, self.row_tokens))
            check_rows(context, model)
            on_gpu = passes[-1].stage in (Stage.STRUCTURE, Stage.SPARSITY)
            if on_gpu and torch.cuda.is_available():  # many forward passes, and nothing that needs a CPU
                model = model.to("cuda")
            model, pass_report = passes[-1].apply(model, context)
            check_reach(pass_report)
            model = model.to("cpu") if on_gpu else model
            if key not in self.shared:
                return model, [*reports, pass_report]
            self.cache[key] = model, [*reports, pass_report]
        model, reports = self.cache[key]
        return copy.deepcopy(model), reports

    def context_after(self, passes: tuple[Pass, ...]) -> Context:
        """What a pass gets that comes after `passes`."""
        key = self._key(passes)
        if key not in self.contexts:
            scratch = self.scratch / "work" / key[:16]
            scratch.mkdir(parents=True, exist_ok=True)
            before = passes[-1].next_context(self.context_after(passes[:-1])) if passes else self.context
            self.contexts[key] = replace(before, scratch=scratch)
        return replace(self.contexts[key], report=self.report)


def _save_built(folder: Path, variant: Variant, builder: VariantBuilder) -> None:
    """Makes a model, saves it by its standard format, a reference of its answers, and its reports at last."""
    passes = variant.recipe.passes
    model, reports = builder.apply_passes(passes)
    if passes[-1].stage < Stage.PRECISION:
        model = cast_weights(model, builder.context.dtype)
    context = builder.context_after(passes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # Saved before it answers: on CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks NF4 weights at the first
    # call and would save the scales of the repacked ones.
    model.save_pretrained(folder / MODEL)
    context.tokenizer.save_pretrained(folder / MODEL)
    save_reference(folder, model, context.tokenizer, context.rows, context.pad, builder.rounding_error)
    write_text(folder / REPORTS, json.dumps([r.model_dump(mode="json") for r in reports]))
