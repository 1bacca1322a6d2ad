"""Where a student's targets come from: the target cache, a running teacher, or generated texts."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedTokenizerBase

from distill.data.rows import distilled_split, rows_taken, training_rows
from distill.losses.divergences import check_target
from distill.losses.teacher_output import Sampled, Target, Teacher, TopK
from distill.teachers.answers import AnsweringTeacher
from distill.teachers.cache import CachedTeacher, link_shards, missing_rows, write_shards
from distill.teachers.codec import Codec, make_codec
from distill.teachers.run import (
    TEACHERS,
    AnyTeacher,
    answers_name,
    find_teacher_hash,
    fit_method,
    run_teacher,
    teacher_folders,
    teacher_group,
    teacher_groups,
    teacher_hash,
    teacher_name,
    teacher_targets,
)
from distill.teachers.scoring import is_scored, score_teacher
from distill.teachers.texts import count_texts, read_texts, write_texts
from distill.trainer.artifact_training import (
    build_shared,
    delete_scratch,
    is_missing,
    rows_shape,
    scratch_folder,
)
from distill.trainer.loop import accelerator
from distill.trainer.rollout import OnPolicy
from eval.core.artifacts import (
    Key,
    digest,
    installed_versions,
    make_key,
    read_manifest,
    stage_code,
    write_text,
)
from eval.core.documents import TRAIN, ChosenRows, Row, pad_id, tokens_per_batch
from eval.core.errors import UserError
from eval.core.jobs import Progress
from eval.core.sections import Targets
from eval.core.study import Study
from eval.engines import load_tokenizer
from eval.engines.torch import output_rows

STORED_SOURCES = ("cached", "sequence")  # targets on disk: no teacher runs while a student trains
LEFT_OUT = "left_out.json"  # of targets: the ids of rows without an answer
ASKED_TOKENS = 2**14  # padded, of the rows that a server is asked for at a time
GENERATED_SOURCES = ("on_policy", "sequence")  # the student learns from generated rows


@dataclass(frozen=True)
class TargetSource:
    """Training input of one student: rows, its teacher if any, and what rewrites the rows of a step."""

    rows: Sequence[Row]
    teacher: Teacher | None = None
    rewrite: OnPolicy | None = None


def check_target_source(study: Study) -> None:
    """Refuses early what training would refuse after bases and teachers are built.

    Raises:
        UserError: source and form of the targets, loss and data do not fit together.
    """
    targets, loss, source = study.targets, study.train.loss, study.targets.source
    if source == "cached" and targets.form != "dense":
        one = torch.zeros(1, 1)
        examples: dict[str, Target] = {
            "sampled": Sampled(one.long(), one + 1, one[0], loss.temperature),
            "top_k": TopK(one.long(), one - 1),
        }
        check_target(examples[targets.form], loss)
    if study.teacher is not None and study.teacher.answers:
        _check_answered_targets(study, "server" if study.teacher.server is not None else "file")
    if targets.alignment == "bytes":
        _check_alignment(study)
    if study.teacher is not None and study.teacher.mix and loss.hidden is not None:
        problem = "set, but teacher.mix is several models, whose states are others"
        raise UserError("train.loss.hidden", problem, "leave hidden out, or give one teacher.path")
    if source in STORED_SOURCES and loss.hidden is not None:
        fix = "set targets.source: online, or leave hidden out"
        raise UserError("train.loss.hidden", f"set, but {source} targets contain no hidden states", fix)
    if source in GENERATED_SOURCES and study.data.packing:
        fix = "set data.packing: false"
        problem = f"true, but targets.source: {source} generates texts from single documents"
        raise UserError("data.packing", problem, fix)
    if loss.divergence == "policy_gradient":
        _check_policy_gradient(targets)
    if study.ce_arm == "on_policy" and source != "on_policy":
        problem = f"on_policy, but students learn from {source} targets"
        raise UserError("ce_arm", problem, "set targets.source: on_policy, or ce_arm: true")
    if source == "on_policy" and loss.weight < 1:
        problem = f"{loss.weight}, but with on_policy the student generates the labels itself"
        raise UserError("train.loss.weight", problem, "set train.loss.weight: 1")


def _check_policy_gradient(targets: Targets) -> None:
    """Is every token drawn from the student's own distribution?"""
    expected: dict[str, Any] = {"source": "on_policy", "share": 1, "alignment": "tokens"}
    for name, value in expected.items():
        if (actual := getattr(targets, name)) != value:
            problem = f"{actual}, but policy_gradient learns from tokens that the student drew"
            raise UserError(f"targets.{name}", problem, f"set it to {value}")
    for name in ("temperature", "top_p"):
        if (actual := getattr(targets.generation, name)) != 1:
            problem = f"{actual}, but policy_gradient takes draws from the student's own distribution"
            raise UserError(f"targets.generation.{name}", problem, "set it to 1")


def _check_answered_targets(study: Study, kind: str) -> None:
    """What a server or a file cannot say: it names the likeliest ids of every token of a row, once."""
    targets = study.targets
    for name, expected in {"source": "cached", "form": "top_k", "alignment": "tokens"}.items():
        if (actual := getattr(targets, name)) != expected:
            problem = f"{actual}, but teacher.{kind} names the likeliest ids of the student's tokens"
            raise UserError(f"targets.{name}", problem, f"set it to {expected}")
    if study.data.packing:
        problem = f"true, but a {kind} has every row by itself"
        raise UserError("data.packing", problem, "set data.packing: false")


def _check_alignment(study: Study) -> None:
    """What cannot be compared over bytes."""
    thing = "targets.alignment"
    if study.teacher is None:
        problem = "bytes, but the base teaches: it has the tokenizer of its students"
        raise UserError(thing, problem, "set teacher.path, or targets.alignment: tokens")
    if study.teacher.mix:
        problem = "bytes, but teacher.mix has one tokenizer, that of the base"
        raise UserError(thing, problem, "set it to tokens, or give one teacher.path")
    if study.targets.source == "cached":
        problem = "bytes, but a cache holds the teacher's answers for the student's tokens"
        raise UserError(thing, problem, "set targets.source: online")
    if study.data.packing:
        raise UserError("data.packing", "true with targets.alignment: bytes", "set data.packing: false")
    if study.train.loss.hidden is not None:
        problem = "set with targets.alignment: bytes: the states stand after different tokens"
        raise UserError("train.loss.hidden", problem, "leave hidden out")
    if any(source.messages_column for source in study.data.sources):
        problem = "set with targets.alignment: bytes: each tokenizer has a template of its own"
        raise UserError("data: messages_column", problem, "give a prompt column in place of messages")


def make_teacher(study: Study, side: str, seeds: list[int], bases: tuple[int, ...], report: Progress) -> None:
    """Fits the method, scores the teacher for its seeds and writes its targets: what is not done yet."""
    fit_method(study, side, seeds, bases, report)
    teacher = teacher_hash(study, side, seeds)
    name, key = f"targets/{teacher_name(side, seeds)}", _targets_key(study, side, teacher)
    missing = study.targets.source in STORED_SOURCES and is_missing(study, name, key)
    scored = is_scored(study, side, seeds, teacher)
    acc = accelerator()
    acc.wait_for_everyone()  # all have checked before the first one writes
    if scored and not missing:
        return
    with run_teacher(study, side, seeds, bases) as running:
        if missing:
            _write_targets(study, name, key, running, teacher, report)
        if not scored and acc.is_main_process:
            score_teacher(study, side, seeds, running, teacher)
    acc.wait_for_everyone()
    delete_scratch(study, answers_name(side, seeds))


def _write_targets(
    study: Study,
    name: str,
    key: Key,
    running: AnyTeacher,
    teacher: str,
    report: Progress,
) -> None:
    """Writes the targets of all training rows: every process its share, the first joins the shards."""
    acc, scratch = accelerator(), scratch_folder(study, name, key)
    side, seed = Path(name).parts[1:]
    base, models = study.folder / "base" / seed, teacher_folders(study, side, int(seed[1:]))
    tokenizer = load_tokenizer(base)
    rows = training_rows(study, tokenizer, distilled_split(study))
    share: dict[str, Any] = {"process": acc.process_index, "processes": acc.num_processes, "report": report}
    facts: dict[str, Any] = {**_lineage(study, base, teacher), "method": running.method.identity}
    facts["dtype"] = study.targets.dtype
    if study.targets.source == "cached":
        codec = study_codec(study, models, tokenizer)
        facts |= codec.facts
        share["batch_tokens"] = batch_tokens(scratch, codec.vocabulary)
        if isinstance(running, AnsweringTeacher):
            share |= {"batch_tokens": ASKED_TOKENS, "written": running.written}
        write_shards(scratch, rows, running, codec, pad=pad_id(tokenizer), **share)
    else:
        generation = study.targets.generation
        facts |= {"form": "texts", "generation": generation.model_dump()}
        max_tokens, context = batch_tokens(scratch, running.vocabulary), study.data.context
        write = partial(running.write, seed=0)
        write_texts(scratch, rows, write, generation, context=context, max_tokens=max_tokens, **share)
    acc.wait_for_everyone()
    if study.targets.source == "cached":
        left_out = missing_rows(scratch, rows) if isinstance(running, AnsweringTeacher) else []
        _check_left_out(study, side, left_out, len(rows), running)
        tokens = sum(row.predicted for row in rows) - sum(row.predicted for row in left_out)
    else:
        left_out, tokens = [], count_texts(scratch)
    parents = {"base": read_manifest(base).hash, "data": facts["data"]}
    with build_shared(study, name, kind="targets", key=key, parents=parents, facts=facts) as temporary:
        if acc.is_main_process:
            facts |= link_shards(scratch, temporary, tokens)
        if left_out and isinstance(running, AnsweringTeacher):
            facts["left_out"] = {running.unanswered: len(left_out)}
            write_text(temporary / LEFT_OUT, json.dumps([row.id for row in left_out]))
    delete_scratch(study, name)


def _check_left_out(study: Study, side: str, left_out: list[Row], rows: int, teacher: AnyTeacher) -> None:
    """Refuses targets that lack too many rows."""
    if left_out and (len(left_out) == rows or len(left_out) > study.data.max_dropped * rows):
        assert isinstance(teacher, AnsweringTeacher)
        first = left_out[0].id
        cause = f" ({teacher.causes[first]})" if first in teacher.causes else ""
        problem = f"{len(left_out)} of {rows} training rows are {teacher.unanswered}, such as {first}{cause}"
        fix = f"more than data.max_dropped ({study.data.max_dropped}): ask for those rows too, or raise it"
        raise UserError(f"targets of {side}", problem, fix)


def batch_tokens(scratch: Path, vocabulary: int) -> int:
    """Padded tokens per batch by the memory that is free at the start of unfinished work.

    All processes, and what goes on after a stop, lay out the same batches.
    """
    acc, file = accelerator(), scratch / "batch-tokens"
    if acc.is_main_process and not file.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        write_text(file, str(tokens_per_batch(vocabulary, acc.device)))
    acc.wait_for_everyone()
    return int(file.read_text())


def study_codec(study: Study, models: list[Path], tokenizer: PreTrainedTokenizerBase) -> Codec:
    """The codec of the targets of a study, for the vocabulary of the models that teach.

    Args:
        models: folders of the teacher; where they hold no model, it knows the ids of the tokenizer.
    """
    configs = [
        AutoConfig.from_pretrained(str(model)) for model in models if (model / "config.json").is_file()
    ]
    rows = [output_rows(config) for config in configs]
    vocabulary = max(rows, default=1 + max(tokenizer.get_vocab().values()))
    return make_codec(study.targets, vocabulary, study.train.loss.temperature)


def _lineage(study: Study, base: Path, teacher: str) -> dict[str, str]:
    """Hashes that targets must match: of the teacher, its tokenizer and the data."""
    tokenizer = digest(load_tokenizer(base).get_vocab())
    return {"teacher": teacher, "tokenizer": tokenizer, "data": read_manifest(study.folder / "data").hash}


def _deciding_settings(targets: Targets) -> dict[str, Any]:
    """The settings that decide the targets; those of the teacher are in the teacher's hash."""
    form = {"dense": ["form"], "sampled": ["form", "draws"], "top_k": ["form", "k"]}[targets.form]
    own = ["share", "generation", *(["samples"] if targets.samples > 1 else [])]
    keys = {"cached": form, "online": [], "on_policy": own, "sequence": ["generation"]}
    aligned = ["alignment"] if targets.alignment == "bytes" else []
    return targets.model_dump(include={"source", *keys[targets.source], *aligned})


def _targets_key(study: Study, side: str, teacher: str) -> Key:
    sampled = study.targets.source == "cached" and study.targets.form == "sampled"
    temperature = study.train.loss.temperature if sampled else None
    inputs = [teacher, rows_shape(study), _deciding_settings(study.targets), temperature]
    return make_key("targets", inputs, _quantizer(study, side))


def _quantizer(study: Study, side: str) -> dict[str, str]:
    return installed_versions(["bitsandbytes"] if teacher_targets(study, side).quantization else [])


def target_source_inputs(study: Study, arm: str, seed: int) -> tuple[Any, dict[str, str]]:
    """What decides a student's targets beside its rows and its teacher: settings, and versions of code.

    Targets on disk count by the versions that made them, so that accepted ones stay what they were.
    """
    settings: Any = _deciding_settings(study.targets)
    left_out = sorted(left_out_rows(study, arm, seed))
    if arm not in TEACHERS:
        on_policy = study.ce_arm == "on_policy"
        return (settings, stage_code("targets")) if on_policy else (left_out or None, {})
    if study.targets.source not in STORED_SOURCES:
        return settings, {**stage_code("targets"), **_quantizer(study, TEACHERS[arm])}
    _, seeds = teacher_group(study, TEACHERS[arm], seed)
    folder = study.folder / "targets" / teacher_name(TEACHERS[arm], seeds)
    return [settings, read_manifest(folder).code, *([left_out] if left_out else [])], {}


def targets_identity(study: Study, arm: str, seed: int) -> str:
    """Fingerprint of what a student learns from: its teacher, how it is asked, and targets on disk.

    Raises:
        UserError: the run does not have them.
    """
    asked = [find_teacher_hash(study, arm, seed), *target_source_inputs(study, arm, seed)]
    if study.targets.source in STORED_SOURCES:
        _, seeds = teacher_group(study, TEACHERS[arm], seed)
        asked.append(read_manifest(study.folder / "targets" / teacher_name(TEACHERS[arm], seeds)).hash)
    return digest(asked)


def left_out_rows(study: Study, arm: str, seed: int) -> set[str]:
    """Ids of rows that no student of a seed learns from: one of its teachers has no answer to them."""
    if study.teacher is None or not study.teacher.answers:
        return set()
    if learned_split(study, arm) != distilled_split(study):
        return set()
    left_out: set[str] = set()
    for side in TEACHERS.values():
        _, seeds = teacher_group(study, side, seed)
        file = study.folder / "targets" / teacher_name(side, seeds) / LEFT_OUT
        left_out |= set(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else set()
    return left_out


def learned_split(study: Study, arm: str) -> str:
    """The documents that a student learns from."""
    return distilled_split(study) if arm in TEACHERS or study.ce_arm == "on_policy" else TRAIN


def rows_learned(study: Study, tokenizer: PreTrainedTokenizerBase, arm: str, seed: int) -> dict[str, Any]:
    """How many rows and tokens a student takes of how many, and how many of these rows are left out."""
    left_out = len(left_out_rows(study, arm, seed))
    taken = rows_taken(study, tokenizer, learned_split(study, arm))
    return {**taken, "left_out": left_out} if left_out else taken


@contextmanager
def open_target_source(
    study: Study, arm: str, seed: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[TargetSource]:
    """The training input of a student: rows alone, or rows and its teacher."""
    targets, teacher = study.targets, find_teacher_hash(study, arm, seed)
    rows = training_rows(study, tokenizer, learned_split(study, arm))
    if left_out := left_out_rows(study, arm, seed):
        rows = ChosenRows(rows, [i for i, row in enumerate(rows) if row.id not in left_out])
    how = targets.share, targets.generation, study.data.context, seed, pad_id(tokenizer), targets.samples
    rewrite = OnPolicy(*how) if targets.source == "on_policy" else None
    if teacher is None:
        yield TargetSource(rows, rewrite=rewrite if study.ce_arm == "on_policy" else None)
        return
    bases, seeds = teacher_group(study, TEACHERS[arm], seed)
    folder = study.folder / "targets" / teacher_name(TEACHERS[arm], seeds)
    base = study.folder / "base" / f"s{seeds[0]}"
    if targets.source == "cached":
        lineage = _lineage(study, base, teacher)
        codec = study_codec(study, teacher_folders(study, TEACHERS[arm], seeds[0]), tokenizer)
        yield TargetSource(rows, CachedTeacher(folder, rows, codec, lineage))
    elif targets.source == "sequence":
        yield TargetSource(read_texts(folder, rows, _lineage(study, base, teacher), targets.generation))
    else:
        with run_teacher(study, TEACHERS[arm], seeds, bases, sharded=True) as local_teacher:
            yield TargetSource(rows, local_teacher, rewrite)


def show_targets(study: Study, until: str) -> None:
    """Prints of each teacher with stored targets what is left out, and at its stage form, size and folder."""
    if study.targets.source not in STORED_SOURCES:
        return
    for side, groups in teacher_groups(study).items():
        for seeds in groups.values():
            manifest = read_manifest(folder := study.folder / "targets" / teacher_name(side, seeds))
            facts = manifest.facts
            for reason, count in facts.get("left_out", {}).items():
                print(f"{side} of seeds {', '.join(map(str, seeds))}: left out {count} {reason}")
            if until != "teachers":
                continue
            print(
                f"{side} of seeds {', '.join(map(str, seeds))}: {facts['form']}, {facts['tokens']} tokens, "
                f"{facts['bytes_per_token']} bytes per token, {manifest.bytes / 2**20:.1f} MiB in {folder}"
            )
