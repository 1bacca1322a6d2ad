"""The teachers of a study: which seeds share one, fitting its method, opening it, its hash."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill.data.rows import distilled_split, training_rows
from distill.method import Method, MethodContext, make_method
from distill.models.generation import list_ends
from distill.models.load import check_same_tokenizer
from distill.teachers.alignment import Alignment
from distill.teachers.answers import AnsweringTeacher
from distill.teachers.file import FileTeacher, make_file_teacher
from distill.teachers.local import LocalTeacher, load_teacher_model
from distill.teachers.server import ServerTeacher, check_server
from distill.teachers.several import MixedTeacher
from distill.trainer.artifact_training import (
    build_shared,
    delete_scratch,
    is_missing,
    rows_shape,
    run_training,
    step_progress,
)
from distill.trainer.distributed import is_sharded
from distill.trainer.loop import Curve, accelerator
from eval.core.artifacts import Key, digest, make_key, read_manifest, write_text
from eval.core.documents import Row, collate, pad_id
from eval.core.jobs import Progress
from eval.core.records import PLAIN
from eval.core.sections import Targets, Train
from eval.core.sections.models import SERVER_ACCESS, Server
from eval.core.study import Study
from eval.engines import load_tokenizer
from eval.engines.torch import classifies, output_rows

TEACHERS = {"S1": "T1", "S0": "T0"}  # a student's teacher; CE has none
ENGINE = "distill.teachers.engine"  # that runs a teacher
ASKED_ROWS = 3  # training rows on which a server is tried
CONTROL_FILE = "teachers/control"  # what a run knows of `teacher.control_file`
TEACHER = "teacher"  # folder of the pretrained model that a study names, beside its bases
AnyTeacher = LocalTeacher | MixedTeacher | AnsweringTeacher
FORMAT = {"dtype", "quantization"}  # settings of a teacher that runs


def teacher_groups(study: Study) -> dict[str, dict[tuple[int, ...], list[int]]]:
    """For T1 and T0: the list of bases of a teacher -> the seeds that share it.

    A teacher depends only on the bases that its method lists: seeds with the same list share one teacher. All
    seeds share that of a model which is not trained, base or teacher, where its method fits nothing.
    """
    method = make_method(study.method)
    groups: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for side, kind in (("T1", method), ("T0", method.control())):
        groups[side] = {}
        given = _runs_in_teacher(study, kind) or study.base.train is None
        shared = given and not kind.fits
        for seed in study.seeds:
            first = study.seeds[0] if shared else seed
            groups[side].setdefault(tuple(kind.bases(first, study.seeds)), []).append(seed)
    return groups


def base_seeds(study: Study) -> list[int]:
    """The seeds of the study and further ones that its teachers need."""
    needed = {seed for groups in teacher_groups(study).values() for bases in groups for seed in bases}
    return sorted({*study.seeds, *needed})


def _runs_in_teacher(study: Study, method: Method) -> bool:
    return study.teacher is not None and method.model == "teacher"


def teacher_folders(study: Study, side: str, seed: int) -> list[Path]:
    """The plain models that a teacher runs in: those that the study names, or the base of a seed."""
    if study.teacher is None or not _runs_in_teacher(study, study_method(study, side)):
        return [study.folder / "base" / f"s{seed}"]
    named = [f"{TEACHER}s/{number}" for number in range(len(study.teacher.mix))]
    if study.teacher.file is not None and side == "T0":
        named = [CONTROL_FILE]
    return [study.folder / name for name in named or [TEACHER]]


def needs_named_teacher(study: Study, side: str) -> bool:
    """True if a teacher is, or runs in, what the study names as such."""
    return _runs_in_teacher(study, study_method(study, side))


def is_behind_server(study: Study, side: str) -> bool:
    """True if a teacher is asked over the network."""
    server = study.teacher is not None and study.teacher.server is not None
    return server and _runs_in_teacher(study, study_method(study, side))


def answers_name(side: str, seeds: list[int]) -> str:
    """Name of the unfinished work that holds answers of a server."""
    return f"answers/{teacher_name(side, seeds)}"


def has_own_tokenizer(study: Study, side: str) -> bool:
    """True if a teacher reads other tokens than the student."""
    return study.targets.alignment == "bytes" and _runs_in_teacher(study, study_method(study, side))


def teacher_tokenizer(study: Study, side: str, seed: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a teacher: that of its students, unless they are compared over bytes."""
    own = has_own_tokenizer(study, side)
    return load_tokenizer(study.folder / TEACHER if own else study.folder / "base" / f"s{seed}")


def teacher_targets(study: Study, side: str, number: int = 0) -> Targets:
    """The targets with dtype and quantization of the model that teaches, or of one of several."""
    if study.teacher is None or not _runs_in_teacher(study, study_method(study, side)):
        return study.targets
    named = study.teacher.mix[number] if study.teacher.mix else study.teacher
    return study.targets.model_copy(update=named.model_dump(include=FORMAT, exclude_none=True))


def study_method(study: Study, side: str) -> Method:
    method = make_method(study.method)
    return method if side == "T1" else method.control()


def teacher_name(side: str, seeds: list[int]) -> str:
    return f"{side}/s{seeds[0]}"


def _method_context(
    study: Study,
    name: str,
    folder: Path,
    seed: int,
    bases: tuple[int, ...],
    report: Progress,
    number: int = 0,
) -> MethodContext:
    """Args: number: of the model, where several teach."""
    side = name[:2]
    tokenizer = teacher_tokenizer(study, side, seed)
    folders = {s: teacher_folders(study, side, s)[number] for s in {seed, *bases}}
    for model in {*folders.values()}:
        check_same_tokenizer(tokenizer, load_tokenizer(model), model.relative_to(study.folder).as_posix())
    key = _fit_key(study, side, seed, bases)

    def fit(model: PreTrainedModel, rows: Sequence[Row], config: Train, part: str) -> Curve:
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


def _teacher_parents(study: Study, side: str, seeds: set[int]) -> dict[str, str]:
    """Hashes of the models that a teacher is made of, and of the data."""
    if needs_named_teacher(study, side):
        folders = {
            path: path.relative_to(study.folder).as_posix() for path in teacher_folders(study, side, 0)
        }
    else:
        folders = {study.folder / "base" / f"s{s}": f"base-s{s}" for s in sorted(seeds)}
    hashes = {role: read_manifest(folder).hash for folder, role in folders.items()}
    return {**hashes, "data": read_manifest(study.folder / "data").hash}


def _fit_key(study: Study, side: str, seed: int, bases: tuple[int, ...]) -> Key:
    """All that decides a teacher and what its method fits."""
    method, parents = study_method(study, side), _teacher_parents(study, side, {seed, *bases})
    fitted_on = [rows_shape(study), seed] if method.fits else []
    return make_key("method", [method.identity, parents, fitted_on], method.code)


def fit_method(study: Study, side: str, seeds: list[int], bases: tuple[int, ...], report: Progress) -> None:
    """The artifact of a teacher: what its method fitted, or only a manifest where it fits nothing."""
    method = study_method(study, side)
    name = f"method/{teacher_name(side, seeds)}"
    parents = _teacher_parents(study, side, {seeds[0], *bases})
    key = _fit_key(study, side, seeds[0], bases)
    if is_missing(study, name, key):
        facts = {"arm": side, "seed": seeds[0], "recipe": PLAIN, "method": study.method.name}
        facts["files"] = method.files
        facts |= engine_facts(study, side, seeds[0])
        with build_shared(study, name, kind="method", key=key, parents=parents, facts=facts) as temporary:
            if method.fits:
                method.fit(
                    _method_context(study, teacher_name(side, seeds), temporary, seeds[0], bases, report)
                )
        delete_scratch(study, teacher_name(side, seeds))


def engine_facts(study: Study, side: str, seed: int) -> dict[str, Any]:
    """What runs a teacher on a machine with the run folder, and the tokens of a request that it has room for.

    Nothing of one that is asked elsewhere, or of several: what they cost is not known here.
    """
    named, folders = study.teacher, teacher_folders(study, side, seed)
    if needs_named_teacher(study, side) and named and (named.server or named.file or len(folders) > 1):
        return {}
    config = AutoConfig.from_pretrained(folders[0], local_files_only=True).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    front = study_method(study, side).tokens_in_front(teacher_tokenizer(study, side, seed))
    return {"engine": ENGINE, "room": None if limit is None else limit - front}


def make_answering_teacher(study: Study, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a run knows of a teacher that does not run here, before anything is trained."""
    if study.teacher is not None and study.teacher.server is not None:
        _make_server_teacher(study, tokenizer, study.teacher.server)
    if study.teacher is not None and study.teacher.file is not None:
        make_file_teacher(study, tokenizer, "teacher.file", TEACHER)
        if study.teacher.control_file is not None:
            make_file_teacher(study, tokenizer, "teacher.control_file", CONTROL_FILE)


def _make_server_teacher(study: Study, tokenizer: PreTrainedTokenizerBase, server: Server) -> None:
    """A server is asked for a few rows, once."""
    answers = server.model_dump(exclude=SERVER_ACCESS)
    key = make_key("base", [TEACHER, answers, digest(tokenizer.get_vocab())])
    if not is_missing(study, TEACHER, key):
        return
    if accelerator().is_main_process:
        batch = collate(
            list(islice(training_rows(study, tokenizer, distilled_split(study)), ASKED_ROWS)),
            pad_id(tokenizer),
        )
        check_server(server, tokenizer, study.targets.k, batch)
    facts: dict[str, Any] = {"arm": "T", "origin": answers}
    with build_shared(study, TEACHER, kind="teacher", key=key, parents={}, facts=facts) as folder:
        write_text(folder / "origin.json", json.dumps(answers, sort_keys=True))  # other ones, another hash


@contextmanager
def run_teacher(
    study: Study, side: str, seeds: list[int], bases: tuple[int, ...], sharded: bool = False
) -> Iterator[AnyTeacher]:
    """The teacher of a group with its method attached; with `sharded`, in shards if the student is."""
    if study.teacher is not None and study.teacher.server is not None and is_behind_server(study, side):
        tokenizer, place = (
            teacher_tokenizer(study, side, seeds[0]),
            answers_name(side, seeds).replace("/", "-"),
        )
        store = study.folder / "scratch" / place / teacher_hash(study, side, seeds)[:16]
        server = study.teacher.server, study_method(study, side), tokenizer, study.targets.k
        with closing(ServerTeacher(*server, store)) as teacher:
            yield teacher
        return
    if study.teacher is not None and study.teacher.file is not None and needs_named_teacher(study, side):
        (folder,), tokenizer = teacher_folders(study, side, 0), teacher_tokenizer(study, side, seeds[0])
        file = study.teacher.control_file if side == "T0" else study.teacher.file
        vocabulary = 1 + max(tokenizer.get_vocab().values())
        yield FileTeacher(Path(str(file)), folder, study_method(study, side), vocabulary, study.targets.k)
        return
    with ExitStack() as stack:
        count = len(teacher_folders(study, side, seeds[0]))
        local = [
            stack.enter_context(run_local_teacher(study, side, seeds, bases, sharded, number))
            for number in range(count)
        ]
        if study.teacher is not None and needs_named_teacher(study, side) and study.teacher.mix:
            yield MixedTeacher(local, study.teacher)
        else:
            yield local[0]


@contextmanager
def run_local_teacher(
    study: Study,
    side: str,
    seeds: list[int],
    bases: tuple[int, ...],
    sharded: bool = False,
    number: int = 0,
) -> Iterator[LocalTeacher]:
    """The same, of one that runs here; `number`: which of several."""
    method, acc = study_method(study, side), accelerator()
    sharded = sharded and is_sharded(acc)
    targets = teacher_targets(study, side, number)
    load = partial(load_teacher_model, targets=targets, device=acc.device, sharded=sharded)
    model = load(teacher_folders(study, side, seeds[0])[number])
    vocabulary = output_rows(model.config)
    folder = study.folder / "method" / teacher_name(side, seeds)
    name, quiet = teacher_name(side, seeds), lambda share, tokens=0: None
    context = replace(_method_context(study, name, folder, seeds[0], bases, quiet, number), load=load)
    list_ends(model, context.tokenizer)
    with method.attached(model, context):
        pairs = study.train.loss.hidden.pairs if study.train.loss.hidden else []
        layers = tuple(teacher_layer for _, teacher_layer in pairs)
        ids = 1 + max(context.tokenizer.get_vocab().values())
        tokens, alignment = vocabulary if classifies(model.config) else ids, None
        if has_own_tokenizer(study, side):
            limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            limit = None if limit is None else limit - method.tokens_in_front(context.tokenizer)
            student_tokenizer = load_tokenizer(study.folder / "base" / f"s{seeds[0]}")
            alignment = Alignment(student_tokenizer, context.tokenizer, limit)
        yield LocalTeacher(method, study.method.name, model, vocabulary, layers, tokens, alignment)


def teacher_hash(study: Study, side: str, seeds: list[int]) -> str:
    """Fingerprint of a teacher: what it was made from, by which code, what was fitted and how it is run."""
    manifest = read_manifest(study.folder / "method" / teacher_name(side, seeds))
    targets = teacher_targets(study, side)
    how: list[Any] = [targets.dtype, targets.quantization]
    if study.teacher is not None and needs_named_teacher(study, side) and study.teacher.mix:
        each = [teacher_targets(study, side, number) for number in range(len(study.teacher.mix))]
        how = [[one.dtype, one.quantization] for one in each]
        how += [[member.weight, sorted(member.domains)] for member in study.teacher.mix]
    return digest([manifest.inputs, manifest.code, manifest.hash, how])


def teacher_group(study: Study, side: str, seed: int) -> tuple[tuple[int, ...], list[int]]:
    return next((b, s) for b, s in teacher_groups(study)[side].items() if seed in s)


def find_teacher_hash(study: Study, arm: str, seed: int) -> str | None:
    """Fingerprint of the teacher of a student, or none for CE."""
    if arm not in TEACHERS:
        return None
    side = TEACHERS[arm]
    return teacher_hash(study, side, teacher_group(study, side, seed)[1])
