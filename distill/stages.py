"""The stages of a study: bases and students. Each is a function of the study and its place in it.

Every function runs in a worker process of one thread, or in all processes of a distributed launch: then
all of them train, and the first one writes. What is done already, by key and by hash, is not done again.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.cards import method_card, model_card
from distill.data import training_rows
from distill.lessons import lesson, lesson_key
from distill.loop import accelerator
from distill.making import CODE, WATCHED, in_steps, made, needed, rows_shape, run_training, sweep
from distill.start import start
from distill.student import check_vocabulary, export, fresh_model, local_files, named_model
from distill.teachers import teacher_of
from distill.tuning import Tuned, tuned
from eval.artifacts import digest, read_manifest
from eval.engines import load_tokenizer
from eval.engines.torch import load_model
from eval.sections import Train
from eval.study import Study
from eval.workers import Progress


def make_base(study: Study, seed: int, report: Progress) -> None:
    """The plain base of a seed: trained from nothing, fine-tuned, or taken as it is."""
    name, base = f"base/s{seed}", study.base
    data = read_manifest(study.folder / "data")
    parents = {"data": data.hash}
    if base.architecture:
        parents["tokenizer"] = read_manifest(study.folder / "tokenizer").hash
    training = base.train.model_dump(exclude=WATCHED) if base.train else None
    shape = rows_shape(study) if base.train else []
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
                tokenizer,
                training_rows(study, tokenizer),
                base.train,
                key=key,
                seed=seed,
                teacher=None,
                report=in_steps(report, 0.9),
            )
        export(model, tokenizer, aside, model_card(study, "B", seed, parents))
    sweep(study, name)


def make_student(study: Study, arm: str, seed: int, report: Progress) -> None:
    """Distils one student from its own base and exports it."""
    name, base = f"students/{arm}/s{seed}", study.folder / "base" / f"s{seed}"
    parents = {"base": read_manifest(base).hash, "data": read_manifest(study.folder / "data").hash}
    if (of := teacher_of(study, arm, seed)) is not None:
        parents["teacher"] = of
    config = study.ce_train if arm == "CE" and study.ce_train else study.train
    settings = [config.model_dump(exclude=WATCHED), study.student.model_dump()]
    key = digest([CODE, settings, rows_shape(study), lesson_key(study, arm), parents, arm, seed])
    if not needed(study.folder / name, key):
        return
    tokenizer = load_tokenizer(base)
    facts: dict[str, Any] = {"arm": arm, "seed": seed, "recipe": "plain", "engine": "torch"}
    if arm in ("S1", "S0"):
        facts["method"] = method_card(study)
    with (
        made(study, name, kind="model", key=key, parents=parents, facts=facts) as aside,
        lesson(study, arm, seed, tokenizer) as learned,
    ):
        student, found = started(study, base, tokenizer, seed, config)
        facts |= found
        how: dict[str, Any] = {"key": key, "seed": seed, "report": in_steps(report, 0.9)}
        how |= {"teacher": learned.teacher, "rewrite": learned.rewrite}
        facts["loss_curve"] = run_training(study, name, student.model, tokenizer, learned.rows, config, **how)
        export(student.merged(), tokenizer, aside, model_card(study, arm, seed, parents))
    sweep(study, name)


def started(
    study: Study, base: Path, tokenizer: PreTrainedTokenizerBase, seed: int, config: Train
) -> tuple[Tuned, dict[str, Any]]:
    """A student before its first step, and what to note of it: the same one in all arms of a seed."""
    rows = training_rows(study, tokenizer) if study.student.start == "influential" else []
    model, found = start(load_model(base), tokenizer, study.student, rows, seed)
    check_vocabulary(model, tokenizer, "the student")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return tuned(model, study.student, seed, device=accelerator().device, dtype=dtype), found
