"""The training pipeline of a study: what each job builds, and the order of jobs.

Every job runs in a worker process of one thread, or in all processes of a distributed launch: then all of
them train, and the first one writes. Artifacts that exist already, by key and by hash, are not built again.
"""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from distill.checks import chat_tokenizers, check_plugins_and_models, check_text_in_front, check_training
from distill.data.rows import describe_rows, distilled_split, rows_taken, training_rows
from distill.data.split import prepare
from distill.data.tokens import make_tokens
from distill.method import make_method
from distill.models.card import model_card
from distill.models.export import DOCUMENTS, check_ids, export, token_ids
from distill.models.generation import list_ends
from distill.models.init import init_student
from distill.models.load import (
    BASE_FILES,
    base_origin,
    check_vocabulary,
    fresh_model,
    model_origin,
    named_dtype,
    named_model,
    named_models,
    named_tokenizer,
    study_origins,
    study_tokenizer,
    train_tokenizer,
)
from distill.models.lora import TrainableModel, add_adapters
from distill.models.precision import settle_precision
from distill.teachers.run import (
    TEACHER,
    TEACHERS,
    base_seeds,
    find_teacher_hash,
    make_answering_teacher,
    needs_named_teacher,
    teacher_groups,
    teacher_name,
)
from distill.teachers.several import check_domains
from distill.teachers.target_source import (
    make_teacher,
    open_target_source,
    rows_learned,
    show_targets,
    target_source_inputs,
)
from distill.trainer.artifact_training import (
    MONITORING_ONLY,
    build_shared,
    delete_scratch,
    is_missing,
    rows_shape,
    run_training,
    step_progress,
)
from distill.trainer.logging import check_trackers
from distill.trainer.loop import accelerator
from eval.core.artifacts import (
    build_artifact,
    digest,
    installed_versions,
    is_done,
    link_files,
    make_key,
    read_manifest,
)
from eval.core.documents import TRAIN, Document, describe_data, stream_documents
from eval.core.jobs import Job, Progress, lock_folder, run_in_turn, run_jobs
from eval.core.plan import fix_plan, put_back_if_refused
from eval.core.sections import Train
from eval.core.study import Study, make_run_folder, mark_trained, save_study
from eval.engines import load_tokenizer
from eval.engines.torch import load_model, stored_dtype
from eval.score.corruptions import slice_documents, slice_names


def make_tokenizer(study: Study) -> None:
    """The tokenizer of a base that is trained from scratch: a trained byte-level BPE, or a named one."""
    folder, data = study.folder / "tokenizer", read_manifest(study.folder / "data")
    named = named_models(study).get("base.tokenizer")
    origin = named and model_origin(named, study.folder / BASE_FILES, "base.tokenizer")
    key = make_key("tokenizer", [origin or study.base.vocab_size, data.hash])
    if study.base.architecture is None or is_done(folder, key, study.accept_old):
        return
    facts: dict[str, Any] = {}
    with build_artifact(
        folder, kind="tokenizer", name="tokenizer", key=key, parents={"data": data.hash}, facts=facts
    ) as temporary:
        if named is None:
            texts = (document.text for document in stream_documents(study.folder / "data", TRAIN))
            tokenizer = train_tokenizer(texts, study.base.vocab_size)
        else:
            tokenizer = named_tokenizer(named, "base.tokenizer")
        tokenizer.save_pretrained(str(temporary))
        facts["ids_sha256"] = digest(token_ids(tokenizer, first_documents(study)))  # for the jobs of bases


def first_documents(study: Study) -> list[Document]:
    """The training documents on which saved tokenizers are tried."""
    return list(islice(stream_documents(study.folder / "data", TRAIN), DOCUMENTS))


def make_training_rows(study: Study) -> None:
    """Makes the training documents tokens, once for all jobs, and says how many of their rows are taken."""
    tokenizer = study_tokenizer(study)
    for split in dict.fromkeys((TRAIN, distilled_split(study))):
        make_tokens(study, tokenizer, split)
        print(describe_rows(rows_taken(study, tokenizer, split), split), file=sys.stderr)


def prepare_inputs(study: Study, acc: Accelerator) -> Study:
    """Checks the study, settles it, then writes its config, data and tokenizer in the first process."""
    check_trackers(study.trackers)
    check_plugins_and_models(study)
    study = settle_precision(study, acc)
    check_training(study, acc.device)
    if acc.is_main_process:
        with put_back_if_refused(study.folder):
            save_study(study)
            fix_plan(study)
            study_origins(study)  # read once, before workers ask
            data = prepare(study, chat_tokenizers(study))
        for line in describe_data(data.facts):
            print(line, flush=True)
        make_tokenizer(study)
        check_text_in_front(study)
        make_training_rows(study)
        check_domains(study, study_tokenizer(study))
    acc.wait_for_everyone()
    make_answering_teacher(study, study_tokenizer(study))
    return study


def used_documents(study: Study) -> Iterator[Document]:
    """All that is trained on or scored, the test documents aside."""
    data, damage = study.folder / "data", study.data.corruptions
    for name in dict.fromkeys((TRAIN, distilled_split(study))):
        yield from stream_documents(data, name)
    for name in slice_names(data, damage):
        yield from slice_documents(data, name, damage)


def make_base(study: Study, seed: int, report: Progress) -> None:
    """The plain base of a seed: trained from scratch, fine-tuned, or used as it is: one for all seeds."""
    name, base = f"base/s{seed}", study.base
    data = read_manifest(study.folder / "data")
    parents = {"data": data.hash}
    if base.architecture:
        parents["tokenizer"] = read_manifest(study.folder / "tokenizer").hash
    training = base.train.model_dump(exclude=MONITORING_ONLY) if base.train else None
    shape = rows_shape(study) if base.train else []
    labels = study.data.labels
    origin = base_origin(base, study.folder / BASE_FILES) | ({"labels": labels} if labels else {})
    key = make_key("base", [origin, training, shape, parents, seed if base.train else None])
    if not is_missing(study, name, key):
        return
    facts: dict[str, Any] = {"arm": "B", "seed": seed, "recipe": "plain", "engine": "torch", "origin": origin}
    if base.train is None and seed != (first := base_seeds(study)[0]):
        with build_shared(study, name, kind="model", key=key, parents=parents, facts=facts) as folder:
            source = study.folder / "base" / f"s{first}"
            link_files(source, folder, read_manifest(source).files)
        return
    documents, verified = first_documents(study), None
    if base.architecture:
        trained = study.folder / "tokenizer"
        tokenizer = load_tokenizer(trained)
        if sha256 := read_manifest(trained).facts.get("ids_sha256"):  # earlier versions wrote none
            check_ids(tokenizer, documents, sha256, trained)
            verified = trained
        model, dtype = fresh_model(base.architecture, tokenizer, seed, labels=labels), torch.float32
    else:
        head_seed = seed if labels and base.train else None
        model, tokenizer = named_model(base, origin.get("commit"), "base.path", labels, head_seed)
        dtype = named_dtype(base, origin.get("commit"))
    check_vocabulary(model, tokenizer, name, used_documents(study), study.data.context)
    if base.train is not None:
        facts["precision"] = base.train.precision
    with build_shared(study, name, kind="model", key=key, parents=parents, facts=facts) as folder:
        if base.train is not None:
            facts["training_rows"] = rows_taken(study, tokenizer)
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
                report=step_progress(report, 0.9),
            )
        card = model_card(study, "B", seed if base.train else None, parents)
        export(model, tokenizer, folder, card, documents, verified, dtype)
    delete_scratch(study, name)


def make_named_teacher(study: Study, report: Progress) -> None:
    """The pretrained models that a study names as its teachers, as plain folders of the run."""
    named = {where: one for where, one in named_models(study).items() if where.startswith("teacher.")}
    for where, one in named.items():
        name = where.removesuffix(".path").replace("teacher.mix.", "teachers/")
        origin = model_origin(one, study.folder / BASE_FILES, where)
        key = make_key("base", [TEACHER, origin])
        if not is_missing(study, name, key):
            continue
        model, tokenizer = named_model(one, origin.get("commit"), where, study.data.labels)
        check_vocabulary(model, tokenizer, where, used_documents(study), study.data.context)
        facts: dict[str, Any] = {"arm": "T", "recipe": "plain", "engine": "torch", "origin": origin}
        dtype = named_dtype(one, origin.get("commit"))
        with build_shared(study, name, kind="model", key=key, parents={}, facts=facts) as folder:
            card = model_card(study, "T", None, {}, teacher=one)
            export(model, tokenizer, folder, card, first_documents(study), dtype=dtype)


def make_student(study: Study, arm: str, seed: int, report: Progress) -> None:
    """Distils one student from its own base and exports it."""
    name, base = f"students/{arm}/s{seed}", study.folder / "base" / f"s{seed}"
    parents = {"base": read_manifest(base).hash, "data": read_manifest(study.folder / "data").hash}
    if (teacher_hash := find_teacher_hash(study, arm, seed)) is not None:
        parents["teacher"] = teacher_hash
    config = study.training(arm)
    own = study.student.model_dump(exclude={"path", "revision"})
    start = named_models(study).get("student.path")
    origin = model_origin(start, study.folder / BASE_FILES, "student.path") if start else {}
    settings = [config.model_dump(exclude=MONITORING_ONLY), own, *([origin] if origin else [])]
    targets, code = target_source_inputs(study, arm, seed)
    if study.student.tuning == "qlora":
        code |= installed_versions(["bitsandbytes"])
    key = make_key("student", [settings, rows_shape(study), targets, parents, arm, seed], code)
    if not is_missing(study, name, key):
        return
    tokenizer = load_tokenizer(base)
    facts: dict[str, Any] = {"arm": arm, "seed": seed, "recipe": "plain", "engine": "torch"}
    facts["precision"] = config.precision
    method_card = asdict(make_method(study.method).card) if arm in TEACHERS else None
    if method_card is not None:
        facts["method"] = method_card
    with (
        build_shared(study, name, kind="model", key=key, parents=parents, facts=facts) as folder,
        open_target_source(study, arm, seed, tokenizer) as source,
    ):
        commit = origin.get("commit")
        student, start_facts = start_student(study, base, tokenizer, seed, config, commit)
        facts |= start_facts
        facts["training_rows"] = rows_learned(study, tokenizer, arm, seed)
        facts["loss_curve"] = run_training(
            study,
            name,
            student.model,
            tokenizer,
            source.rows,
            config,
            key=key,
            seed=seed,
            teacher=source.teacher,
            rewrite=source.rewrite,
            report=step_progress(report, 0.9),
        )
        card = model_card(study, arm, seed, parents, method_card)
        dtype = named_dtype(start, origin.get("commit")) if start else stored_dtype(base)
        export(student.merged(), tokenizer, folder, card, first_documents(study), base, dtype)
    delete_scratch(study, name)


def start_student(
    study: Study,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    config: Train,
    commit: str | None = None,
) -> tuple[TrainableModel, dict[str, Any]]:
    """A student before its first step, the same in all arms of a seed, and facts for its manifest.

    Args:
        commit: of a pretrained student on the hub.
    """
    rows = training_rows(study, tokenizer) if study.student.start == "influential" else []
    model, facts = init_student(
        load_model(base), tokenizer, study.student, rows, seed, commit, study.data.labels
    )
    check_vocabulary(model, tokenizer, "the student", used_documents(study), study.data.context)
    list_ends(model, tokenizer)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return add_adapters(model, study.student, seed, device=accelerator().device, dtype=dtype), facts


def base_jobs(study: Study) -> list[Job]:
    """One job per plain base; where it is used as it is, the others copy the first."""
    training = study.base.train
    weight = 10 * training.epochs if training else 2.0
    first, *others = (Job(f"base s{s}", make_base, (study, s), weight=weight) for s in base_seeds(study))
    if training is None:
        others = [replace(job, after=(first.name,), weight=0.1) for job in others]
    return [first, *others]


def _teacher_job_name(side: str, seeds: list[int]) -> str:
    return f"teacher {teacher_name(side, seeds)}"


def teacher_jobs(study: Study) -> list[Job]:
    """One job per distinct teacher, after its bases and the pretrained model that the study names."""
    named = [Job(TEACHER, make_named_teacher, (study,), weight=1)] if study.teacher else []
    return named + [
        Job(
            _teacher_job_name(side, seeds),
            make_teacher,
            (study, side, seeds, bases),
            (
                *(f"base s{s}" for s in sorted({*bases, *seeds})),
                *([TEACHER] if needs_named_teacher(study, side) else []),
            ),
            weight=5 * len(bases),
        )
        for side, groups in teacher_groups(study).items()
        for bases, seeds in groups.items()
    ]


def student_jobs(study: Study) -> list[Job]:
    """One job per student, after its base and its teacher; CE needs only its base."""
    groups = teacher_groups(study)
    teacher_job = {
        (side, seed): _teacher_job_name(side, seeds)
        for side in groups
        for seeds in groups[side].values()
        for seed in seeds
    }
    jobs = []
    for seed in study.seeds:
        for arm in study.student_arms:
            asked = study.teacher is not None and study.teacher.answers  # all learn what both have answers to
            sides = TEACHERS.values() if asked else [TEACHERS[arm]] if arm in TEACHERS else []
            needs = (f"base s{seed}", *(teacher_job[side, seed] for side in sides))
            jobs.append(
                Job(f"{arm} s{seed}", make_student, (study, arm, seed), needs, weight=10 * study.train.epochs)
            )
    return jobs


def jobs_until(study: Study, stage: str) -> list[Job]:
    """The jobs of a study up to a stage: `data`, `bases`, `teachers` (with their targets) or `students`."""
    stages = {"data": None, "bases": base_jobs, "teachers": teacher_jobs, "students": student_jobs}
    wanted = list(stages.values())[: list(stages).index(stage) + 1]
    return [job for jobs in wanted if jobs is not None for job in jobs(study)]


def run_all(study: Study, jobs: list[Job], title: str) -> None:
    """Runs jobs in parallel on the CPU of one machine; in turn on a GPU or in a distributed launch."""
    acc = accelerator()
    if acc.num_processes > 1 or acc.device.type != "cpu":
        if acc.is_main_process:
            print(f"{title}: {acc.num_processes} processes on {acc.device.type}", file=sys.stderr)
        run_in_turn(title, jobs, quiet=not acc.is_main_process)
    else:
        run_jobs(title, jobs, study.workers)


def train_study(study: Study, until: str) -> Path:
    """Trains a study that `distill.train.check_stages` accepted, up to a stage; returns its run folder."""
    acc = accelerator()
    with lock_folder(make_run_folder(study)) if acc.is_main_process else nullcontext():
        study = prepare_inputs(study, acc)
        run_all(study, jobs_until(study, until), until)
        if acc.is_main_process:
            if until in ("teachers", "students"):
                show_targets(study, until)
            if until == "students":
                mark_trained(study)
    return study.folder
