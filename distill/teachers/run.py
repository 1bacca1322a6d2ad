"""Teachers: who shares one, what they are made of, fitted, run with their method, scored."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.data.sources import training_rows
from distill.losses.teacher_output import Target
from distill.method import Method, MethodContext, check_output, make_method
from distill.models.lm_head import capture_layers
from distill.models.load import check_same_tokenizer
from distill.models.quantized import load_quantized
from distill.trainer.artifact_training import (
    CODE,
    build_shared,
    delete_scratch,
    is_missing,
    rows_shape,
    run_training,
    step_progress,
)
from distill.trainer.distributed import is_sharded, shard_teacher
from distill.trainer.loop import Curve, accelerator
from eval.core.artifacts import digest, read_manifest
from eval.core.documents import Batch, Row, tokens_per_batch
from eval.core.errors import UserError
from eval.core.jobs import Progress
from eval.core.records import Score, each_score, provenance, write_record
from eval.core.sections import Generation, Targets, Train
from eval.core.study import Study
from eval.engines import load_tokenizer
from eval.engines.torch import load_model
from eval.score.scoring import score_kinds, score_with

TEACHERS = {"S1": "T1", "S0": "T0"}  # a student's teacher; CE has none


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher that runs, with its method attached; no gradient is kept."""

    method: Method
    name: str
    model: PreTrainedModel
    vocabulary: int
    layers: tuple[int, ...] = ()  # whose hidden states a student is to match

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """[B, T, V] log-probabilities, checked."""
        batch = batch.to(self.model.device)
        output = check_output(self.method.output(self.model, batch), batch, self.vocabulary, self.name)
        answer = output.select(torch.ones_like(batch.input_ids, dtype=torch.bool))
        return answer.log_softmax(0, batch.input_ids.numel()).view(*batch.input_ids.shape, -1)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target:
        batch = batch.to(self.model.device)
        with capture_layers(self.model, self.layers) as seen:
            output = check_output(self.method.output(self.model, batch), batch, self.vocabulary, self.name)
        if self.layers and len(output.heads) > 1:
            found = f"a teacher of {len(output.heads)} models"
            raise UserError("train.loss.hidden", found, "take a method that is one model, or leave it out")
        places = torch.nn.functional.pad(batch.mask, (0, 1))
        return replace(output.select(places), layers=tuple(layer[places] for layer in seen))

    @torch.no_grad()
    def write(self, prompts: list[Row], generation: Generation, seed: int) -> list[list[int]]:
        """What the teacher writes after each prompt, checked.

        Raises:
            UserError: the method wrote too much, too little, or ids that the vocabulary does not have.
        """
        found = self.method.write(self.model, prompts, generation, seed)
        fix = f"return for each prompt 1 to {generation.new_tokens} ids from `write`"
        if len(found) != len(prompts):
            raise UserError(f"method {self.name!r}", f"{len(found)} texts for {len(prompts)} prompts", fix)
        for row, tokens in zip(prompts, found, strict=True):
            known = all(0 <= token < self.vocabulary for token in tokens)
            if not (known and 0 < len(tokens) <= generation.new_tokens):
                raise UserError(f"method {self.name!r}", f"wrote {tokens} after row {row.id}", fix)
        return found


def load_teacher_model(
    folder: Path, targets: Targets, device: torch.device, split: bool = False
) -> PreTrainedModel:
    """A model as the part of a teacher that runs: its type or format as the study says, without gradients.

    Args:
        split: its layers are held in shards by all processes, which must call it equally often.

    Raises:
        UserError: it shall be quantized, and there is no CUDA device or no bitsandbytes.
    """
    dtype = getattr(torch, targets.dtype)
    if targets.quantization is None:
        model = load_model(folder, dtype=dtype, device=str(device)).requires_grad_(False)
        return shard_teacher(model) if split else model
    if split:
        fix = "leave it out, or take plain data parallelism"
        raise UserError("targets.quantization", "a quantized teacher is not held in shards", fix)
    if device.type != "cuda":
        raise UserError("targets.quantization", targets.quantization, "it needs CUDA: leave it out on a CPU")
    return load_quantized(folder, targets.quantization, dtype, device).requires_grad_(False)


def teacher_groups(study: Study) -> dict[str, dict[tuple[int, ...], list[int]]]:
    """For T1 and T0: the list of bases of a teacher -> the seeds that share it.

    A teacher is a function of the bases that its method lists, so seeds with one list share one teacher.
    """
    method = make_method(study.method)
    groups: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for side, kind in (("T1", method), ("T0", method.control())):
        groups[side] = {}
        for seed in study.seeds:
            groups[side].setdefault(tuple(kind.bases(seed, study.seeds)), []).append(seed)
    return groups


def study_method(study: Study, side: str) -> Method:
    method = make_method(study.method)
    return method if side == "T1" else method.control()


def teacher_name(side: str, seeds: list[int]) -> str:
    return f"{side}/s{seeds[0]}"


def _method_context(
    study: Study, name: str, folder: Path, seed: int, bases: tuple[int, ...], report: Progress
) -> MethodContext:
    tokenizer = load_tokenizer(study.folder / "base" / f"s{seed}")
    places = {s: study.folder / "base" / f"s{s}" for s in {seed, *bases}}
    for other, place in places.items():
        check_same_tokenizer(tokenizer, load_tokenizer(place), f"base s{other}")
    key = digest(_fit_inputs(study, name[:2], seed, bases))

    def fit(model: PreTrainedModel, rows: list, config: Train, part: str) -> Curve:
        return run_training(
            study,
            f"{name}/{part}",
            model,
            tokenizer,
            rows,
            config,
            key=key,
            seed=seed,
            teacher=None,
            report=step_progress(report, 0.5),
        )

    rows = partial(training_rows, study, tokenizer)
    return MethodContext(folder, seed, list(study.seeds), places, tokenizer, rows, fit)


def _teacher_parents(study: Study, bases: tuple[int, ...]) -> dict[str, str]:
    found = {f"base-s{s}": read_manifest(study.folder / "base" / f"s{s}").hash for s in bases}
    return {**found, "data": read_manifest(study.folder / "data").hash}


def _fit_inputs(study: Study, side: str, seed: int, bases: tuple[int, ...]) -> list[Any]:
    """All that decides what a method fits."""
    parents = _teacher_parents(study, tuple(sorted({seed, *bases})))
    return [CODE, study_method(study, side).identity, parents, rows_shape(study), seed]


def fit_method(study: Study, side: str, seeds: list[int], bases: tuple[int, ...], report: Progress) -> str:
    """Fits the method where it has something to fit; the hash of what was fitted."""
    method = study_method(study, side)
    if type(method).fit is Method.fit:
        return ""
    name = f"method/{teacher_name(side, seeds)}"
    parents = _teacher_parents(study, tuple(sorted({seeds[0], *bases})))
    key = digest(_fit_inputs(study, side, seeds[0], bases))
    if is_missing(study.folder / name, key):
        facts = {"arm": side, "seed": seeds[0], "method": study.method.name}
        with build_shared(study, name, kind="method", key=key, parents=parents, facts=facts) as aside:
            method.fit(_method_context(study, teacher_name(side, seeds), aside, seeds[0], bases, report))
        delete_scratch(study, teacher_name(side, seeds))
    return read_manifest(study.folder / name).hash


def score_teacher(study: Study, side: str, seeds: list[int], live: LiveTeacher, teacher: str) -> None:
    """Writes one score record per seed that shares this teacher; only here can it be run."""
    data, tokenizer = study.folder / "data", load_tokenizer(study.folder / "base" / f"s{seeds[0]}")
    size = tokens_per_batch(len(tokenizer))
    for kind in score_kinds(study):
        documents = score_with(
            live.log_probs, data, tokenizer, study.data.context, kind=kind, batch_tokens=size
        )
        for seed in seeds:
            record = Score(
                kind=kind,
                arm=side,
                seed=seed,
                engine="method",
                data=read_manifest(data).hash,
                documents=documents,
                provenance=provenance(teacher, study.hash()),
            )
            write_record(study.folder, record)


def is_scored(study: Study, side: str, seeds: list[int], teacher: str) -> bool:
    """True if every seed has its records of this very teacher and study."""
    found = {
        (r.kind, r.seed)
        for kind in score_kinds(study)
        for r in each_score(study.folder, kind)
        if (r.arm, r.provenance.artifact, r.provenance.config) == (side, teacher, study.hash())
    }
    return found >= {(kind, seed) for kind in score_kinds(study) for seed in seeds}


@contextmanager
def run_teacher(
    study: Study, side: str, seeds: list[int], bases: tuple[int, ...], split: bool = False
) -> Iterator[LiveTeacher]:
    """The teacher of a group, with its method attached; with `split`, in shards where the student is."""
    method, acc = study_method(study, side), accelerator()
    split = split and is_sharded(acc)
    load = partial(load_teacher_model, targets=study.targets, device=acc.device, split=split)
    model = load(study.folder / "base" / f"s{seeds[0]}")
    vocabulary = model.config.get_text_config().vocab_size
    folder = study.folder / "method" / teacher_name(side, seeds)
    context = _method_context(
        study, teacher_name(side, seeds), folder, seeds[0], bases, lambda share, tokens=0: None
    )
    context = replace(context, load=load)
    with method.attached(model, context):
        pairs = study.train.loss.hidden.pairs if study.train.loss.hidden else []
        layers = tuple(theirs for _, theirs in pairs)
        yield LiveTeacher(method, study.method.name, model, vocabulary, layers)


def teacher_hash(study: Study, side: str, bases: tuple[int, ...], fitted_hash: str) -> str:
    """Fingerprint of a teacher: its method, its bases, its data, what was fitted and how it is run."""
    how = [study.targets.dtype, study.targets.quantization]
    own = next(seeds[0] for group, seeds in teacher_groups(study)[side].items() if group == bases)
    parents = _teacher_parents(study, tuple(sorted({own, *bases})))
    return digest([CODE, study_method(study, side).identity, parents, fitted_hash, how])


def teacher_group(study: Study, side: str, seed: int) -> tuple[tuple[int, ...], list[int]]:
    return next((b, s) for b, s in teacher_groups(study)[side].items() if seed in s)


def find_teacher_hash(study: Study, arm: str, seed: int) -> str | None:
    """Fingerprint of the teacher of a student, or none for CE."""
    if arm not in TEACHERS:
        return None
    side = TEACHERS[arm]
    bases, seeds = teacher_group(study, side, seed)
    fitted = study.folder / "method" / teacher_name(side, seeds)
    has_fit = type(study_method(study, side)).fit is not Method.fit
    return teacher_hash(study, side, bases, read_manifest(fitted).hash if has_fit else "")
