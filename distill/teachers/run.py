"""The teachers of a study: which seeds share one, fitting its method, opening it, its hash."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from distill.data.sources import training_rows
from distill.method import Method, MethodContext, make_method
from distill.models.load import check_same_tokenizer
from distill.teachers.local import LocalTeacher, load_teacher_model
from distill.trainer.artifact_training import (
    CODE,
    build_shared,
    delete_scratch,
    is_missing,
    rows_shape,
    run_training,
    step_progress,
)
from distill.trainer.distributed import is_sharded
from distill.trainer.loop import Curve, accelerator
from eval.core.artifacts import digest, read_manifest
from eval.core.jobs import Progress
from eval.core.sections import Train
from eval.core.study import Study
from eval.engines import load_tokenizer

TEACHERS = {"S1": "T1", "S0": "T0"}  # a student's teacher; CE has none


def teacher_groups(study: Study) -> dict[str, dict[tuple[int, ...], list[int]]]:
    """For T1 and T0: the list of bases of a teacher -> the seeds that share it.

    A teacher depends only on the bases that its method lists: seeds with the same list share one teacher.
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
    folders = {s: study.folder / "base" / f"s{s}" for s in {seed, *bases}}
    for other, base in folders.items():
        check_same_tokenizer(tokenizer, load_tokenizer(base), f"base s{other}")
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
    return MethodContext(folder, seed, list(study.seeds), folders, tokenizer, rows, fit)


def _teacher_parents(study: Study, bases: tuple[int, ...]) -> dict[str, str]:
    hashes = {f"base-s{s}": read_manifest(study.folder / "base" / f"s{s}").hash for s in bases}
    return {**hashes, "data": read_manifest(study.folder / "data").hash}


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


@contextmanager
def run_teacher(
    study: Study, side: str, seeds: list[int], bases: tuple[int, ...], sharded: bool = False
) -> Iterator[LocalTeacher]:
    """The teacher of a group with its method attached; with `sharded`, in shards if the student is."""
    method, acc = study_method(study, side), accelerator()
    sharded = sharded and is_sharded(acc)
    load = partial(load_teacher_model, targets=study.targets, device=acc.device, sharded=sharded)
    model = load(study.folder / "base" / f"s{seeds[0]}")
    vocabulary = model.config.get_text_config().vocab_size
    folder = study.folder / "method" / teacher_name(side, seeds)
    context = _method_context(
        study, teacher_name(side, seeds), folder, seeds[0], bases, lambda share, tokens=0: None
    )
    context = replace(context, load=load)
    with method.attached(model, context):
        pairs = study.train.loss.hidden.pairs if study.train.loss.hidden else []
        layers = tuple(teacher_layer for _, teacher_layer in pairs)
        yield LocalTeacher(method, study.method.name, model, vocabulary, layers)


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
