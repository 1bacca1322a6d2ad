"""The stages of a study: bases, teachers, students. Each is a function of the study and its place in it.

Every function runs in a worker process of one thread, or in all processes of a distributed launch: then
all of them train, and the first one writes. What is done already, by key and by hash, is not done again.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.cards import model_card
from distill.data import check_packing, training_rows
from distill.loop import Curve, Teacher, accelerator, train
from distill.method import Bench, Method, checked, make_method
from distill.signals import CachedTeacher, write_targets
from distill.student import (
    check_same_tokenizer,
    check_vocabulary,
    export,
    fresh_model,
    local_files,
    named_model,
)
from eval.artifacts import building, digest, file_sha256, is_done, read_manifest
from eval.documents import Batch, boundary_id, tokens_per_batch
from eval.engines import load_tokenizer
from eval.engines.torch import load_checkpoint, load_model
from eval.records import Score, provenance, read_scores, write_record
from eval.scoring import score_with
from eval.sections import Train
from eval.study import Study

Report = Callable[[float], None]
TEACHERS = {"S1": "T1", "S0": "T0"}  # a student's teacher; CE has none
# A mended loss must not leave the students of the broken one in use.
CODE = [file_sha256(Path(__file__).with_name(f"{name}.py")) for name in ("losses", "loop", "signals", "data")]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else boundary_id(tokenizer)


def needed(folder: Path, key: str) -> bool:
    """True if `folder` must be made; every process of a launch answers before any goes on."""
    missing = not is_done(folder, key)
    accelerator().wait_for_everyone()
    return missing


@contextmanager
def made(study: Study, name: str, **what: Any) -> Iterator[Path]:
    """A folder that becomes the artifact `name`; processes beside the first write to nowhere."""
    acc = accelerator()
    if acc.is_main_process:
        with building(study.folder / name, name=name, **what) as aside:
            yield aside
    else:
        with TemporaryDirectory() as nowhere:
            yield Path(nowhere)
    acc.wait_for_everyone()


def run_training(
    study: Study, name: str, model: PreTrainedModel, rows: list, config: Train, **how: Any
) -> Curve:
    """Trains with resumable checkpoints below `scratch/`, told apart by what they are made of."""
    check_packing(model, rows, how["pad"])
    scratch = study.folder / "scratch" / name.replace("/", "-") / how.pop("key")[:16]
    return train(model, rows, config, scratch=scratch, **how)


def sweep(study: Study, name: str) -> None:
    """Drops the checkpoints of finished work, and those of its parts."""
    if accelerator().is_main_process:
        top, stem = study.folder / "scratch", name.replace("/", "-")
        for place in [top / stem, *top.glob(f"{stem}-*")]:
            shutil.rmtree(place, ignore_errors=True)


def in_steps(report: Report, share: float = 1.0) -> Callable[[int, int, float], None]:
    return lambda step, steps, loss: report(share * step / steps)


def score_teacher(study: Study, side: str, seeds: list[int], teach: Teacher, teacher: str) -> None:
    """Writes one score record per seed that shares this teacher; only here can it be run."""
    data, tokenizer = study.folder / "data", load_tokenizer(study.folder / "base" / f"s{seeds[0]}")
    size = tokens_per_batch(len(tokenizer))
    documents = score_with(teach, data, tokenizer, study.data.context, batch_tokens=size)
    for seed in seeds:
        record = Score(
            arm=side,
            seed=seed,
            engine="method",
            data=read_manifest(data).hash,
            documents=documents,
            provenance=provenance(teacher, study.hash()),
        )
        write_record(study.folder, record)


def is_scored(study: Study, side: str, seeds: list[int], teacher: str) -> bool:
    """True if every seed has a record of this very teacher and study."""
    found = {
        r.seed
        for r in read_scores(study.folder)
        if (r.arm, r.provenance.artifact, r.provenance.config) == (side, teacher, study.hash())
    }
    return set(seeds) <= found


def make_base(study: Study, seed: int, report: Report) -> None:
    """The plain base of a seed: trained from nothing, fine-tuned, or taken as it is."""
    name, base = f"base/s{seed}", study.base
    data = read_manifest(study.folder / "data")
    parents = {"data": data.hash}
    if base.architecture:
        parents["tokenizer"] = read_manifest(study.folder / "tokenizer").hash
    training = base.train.model_dump(exclude={"checkpoint_every"}) if base.train else None
    shape = [study.data.context, study.data.train_rows] if base.train else []
    origin = [base.model_dump(exclude={"train"}), local_files(base.path)]
    key = digest([CODE, origin, training, shape, parents, seed if base.train else None])
    if not needed(study.folder / name, key):
        return
    if base.architecture:
        tokenizer = load_tokenizer(study.folder / "tokenizer")
        model = fresh_model(base.architecture, tokenizer, seed)
    else:
        model, tokenizer = named_model(base)
    check_vocabulary(model, tokenizer, name)
    facts: dict[str, Any] = {"arm": "B", "seed": seed, "recipe": "plain", "engine": "torch"}
    with made(study, name, kind="model", key=key, parents=parents, facts=facts) as aside:
        if base.train is not None:
            facts["loss_curve"] = run_training(
                study,
                name,
                model,
                training_rows(study, tokenizer),
                base.train,
                key=key,
                pad=pad_id(tokenizer),
                seed=seed,
                teacher=None,
                report=in_steps(report, 0.9),
            )
        export(model, tokenizer, aside, model_card(study, "B", seed))
    sweep(study, name)


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


def method_of(study: Study, side: str) -> Method:
    method = make_method(study.method)
    return method if side == "T1" else method.control()


def teacher_name(side: str, seeds: list[int]) -> str:
    return f"{side}/s{seeds[0]}"


def _bench(study: Study, name: str, folder: Path, seed: int, bases: tuple[int, ...], report: Report) -> Bench:
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
            rows,
            config,
            key=key,
            pad=pad_id(tokenizer),
            seed=seed,
            teacher=None,
            report=in_steps(report, 0.5),
        )

    rows = partial(training_rows, study, tokenizer)
    return Bench(folder, seed, list(study.seeds), places, tokenizer, rows, fit)


def _teacher_parents(study: Study, bases: tuple[int, ...]) -> dict[str, str]:
    found = {f"base-s{s}": read_manifest(study.folder / "base" / f"s{s}").hash for s in bases}
    return {**found, "data": read_manifest(study.folder / "data").hash}


def _fit_inputs(study: Study, side: str, seed: int, bases: tuple[int, ...]) -> list[Any]:
    """All that decides what a method fits."""
    shape = [study.data.context, study.data.train_rows]
    return [CODE, method_of(study, side).identity, _teacher_parents(study, bases), shape, seed]


def _fitted(
    study: Study, side: str, method: Method, seeds: list[int], bases: tuple[int, ...], report: Report
) -> str:
    """Fits the method where it has something to fit; the hash of what was fitted."""
    if type(method).fit is Method.fit:
        return ""
    name, parents = f"method/{teacher_name(side, seeds)}", _teacher_parents(study, bases)
    key = digest(_fit_inputs(study, side, seeds[0], bases))
    if needed(study.folder / name, key):
        facts = {"arm": side, "seed": seeds[0], "method": study.method.name}
        with made(study, name, kind="method", key=key, parents=parents, facts=facts) as aside:
            method.fit(_bench(study, teacher_name(side, seeds), aside, seeds[0], bases, report))
        sweep(study, teacher_name(side, seeds))
    return read_manifest(study.folder / name).hash


@contextmanager
def teaching(study: Study, side: str, seeds: list[int], bases: tuple[int, ...]) -> Iterator[Teacher]:
    """The teacher of a group, with its method attached: batch -> checked log-probabilities."""
    method, acc = method_of(study, side), accelerator()
    model = load_model(study.folder / "base" / f"s{seeds[0]}").to(acc.device)
    vocabulary = model.config.get_text_config().vocab_size
    folder = study.folder / "method" / teacher_name(side, seeds)
    bench = _bench(study, teacher_name(side, seeds), folder, seeds[0], bases, lambda share: None)

    def teach(batch: Batch) -> torch.Tensor:
        batch = batch.to(acc.device)
        with torch.no_grad():
            return checked(method.signal(model, batch), batch, vocabulary, study.method.name)

    with method.attached(model, bench):
        yield teach


def teacher_hash(study: Study, side: str, bases: tuple[int, ...], fitted: str) -> str:
    """Fingerprint of a teacher: its method, its bases, its data and what was fitted."""
    return digest([method_of(study, side).identity, _teacher_parents(study, bases), fitted])


def make_teacher(study: Study, side: str, seeds: list[int], bases: tuple[int, ...], report: Report) -> None:
    """Fits the method, scores the teacher for its seeds and writes its targets."""
    method = method_of(study, side)
    fitted = _fitted(study, side, method, seeds, bases, report)
    teacher = teacher_hash(study, side, bases, fitted)
    name, key = f"targets/{teacher_name(side, seeds)}", _targets_key(study, teacher)
    cached = study.targets.source == "cached"
    missing = cached and needed(study.folder / name, key)
    scored = is_scored(study, side, seeds, teacher)
    acc = accelerator()
    acc.wait_for_everyone()  # all have looked before the first one writes
    if scored and not missing:
        return
    with teaching(study, side, seeds, bases) as teach:
        if not scored and acc.is_main_process:
            score_teacher(study, side, seeds, teach, teacher)
        if missing:
            facts = {"arm": side, "seeds": seeds, "teacher": teacher}
            parents = _teacher_parents(study, bases)
            with made(study, name, kind="targets", key=key, parents=parents, facts=facts) as aside:
                if acc.is_main_process:
                    cache(study, aside, seeds[0], teach, report)


def cache(study: Study, folder: Path, seed: int, teach: Teacher, report: Report) -> None:
    """The teacher's targets for all training rows."""
    model, tokenizer = load_checkpoint(study.folder / "base" / f"s{seed}")
    vocabulary = model.config.get_text_config().vocab_size
    write_targets(folder, training_rows(study, tokenizer), teach, vocabulary, pad_id(tokenizer), report)


def _targets_key(study: Study, teacher: str) -> str:
    return digest([CODE, teacher, study.data.context, study.data.train_rows])


def _group_of(study: Study, side: str, seed: int) -> tuple[tuple[int, ...], list[int]]:
    return next((b, s) for b, s in teacher_groups(study)[side].items() if seed in s)


def _teacher_of(study: Study, arm: str, seed: int) -> str | None:
    """Fingerprint of the teacher of a student, or none for CE."""
    if arm not in TEACHERS:
        return None
    side = TEACHERS[arm]
    bases, seeds = _group_of(study, side, seed)
    fitted = study.folder / "method" / teacher_name(side, seeds)
    has_fit = type(method_of(study, side)).fit is not Method.fit
    return teacher_hash(study, side, bases, read_manifest(fitted).hash if has_fit else "")


@contextmanager
def _lesson(study: Study, arm: str, seed: int, rows: list) -> Iterator[Teacher | None]:
    """What a student learns from: nothing, the cached targets, or the teacher itself."""
    if arm not in TEACHERS:
        yield None
        return
    side = TEACHERS[arm]
    bases, seeds = _group_of(study, side, seed)
    if study.targets.source == "cached":
        folder = study.folder / "targets" / teacher_name(side, seeds)
        assert read_manifest(folder).facts["teacher"] == _teacher_of(study, arm, seed), (
            "targets of this teacher"
        )
        yield CachedTeacher(folder, rows)
    else:
        with teaching(study, side, seeds, bases) as teach:
            yield teach


def make_student(study: Study, arm: str, seed: int, report: Report) -> None:
    """Distils one student from its own base and exports it."""
    name, base = f"students/{arm}/s{seed}", study.folder / "base" / f"s{seed}"
    parents = {"base": read_manifest(base).hash, "data": read_manifest(study.folder / "data").hash}
    if (teacher := _teacher_of(study, arm, seed)) is not None:
        parents["teacher"] = teacher
    settings = study.train.model_dump(exclude={"checkpoint_every"})
    key = digest([CODE, settings, study.data.context, study.data.train_rows, parents, arm, seed])
    folder = study.folder / name
    if needed(folder, key):
        model, tokenizer = load_model(base), load_tokenizer(base)
        rows = training_rows(study, tokenizer)
        facts: dict[str, Any] = {"arm": arm, "seed": seed, "recipe": "plain", "engine": "torch"}
        with (
            made(study, name, kind="model", key=key, parents=parents, facts=facts) as aside,
            _lesson(study, arm, seed, rows) as lesson,
        ):
            facts["loss_curve"] = run_training(
                study,
                name,
                model,
                rows,
                study.train,
                key=key,
                pad=pad_id(tokenizer),
                seed=seed,
                teacher=lesson,
                report=in_steps(report, 0.9),
            )
            export(model, tokenizer, aside, model_card(study, arm, seed))
        sweep(study, name)
