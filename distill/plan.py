"""The jobs of a study's training side, in an order that respects what each needs."""

import sys

from accelerate import Accelerator

from distill.data import prepare
from distill.lessons import check_lesson, make_teacher
from distill.loop import accelerator
from distill.stages import make_base, make_student
from distill.student import train_tokenizer
from distill.teachers import TEACHERS, teacher_groups, teacher_name
from distill.tracking import check_trackers
from distill.tuning import check_device
from eval.artifacts import building, digest, is_done, read_manifest
from eval.documents import TRAIN, read_documents
from eval.study import Study, settle
from eval.workers import Job, run_in_turn, run_jobs


def make_tokenizer(study: Study) -> None:
    """The byte-level BPE of a study whose base is trained from nothing."""
    folder, data = study.folder / "tokenizer", read_manifest(study.folder / "data")
    key = digest([study.base.vocab_size, data.hash])
    if study.base.architecture is None or is_done(folder, key):
        return
    with building(
        folder, kind="tokenizer", name="tokenizer", key=key, parents={"data": data.hash}, facts={}
    ) as aside:
        texts = [document.text for document in read_documents(study.folder / "data", TRAIN)]
        tokenizer = train_tokenizer(texts, study.base.vocab_size)
        tokenizer.save_pretrained(str(aside))


def prepare_inputs(study: Study, acc: Accelerator) -> None:
    """The settled study, data and tokenizer, by the first process, which holds the folder."""
    check_trackers(study.trackers)
    check_device(study.student, acc.device)
    check_lesson(study)
    if acc.is_main_process:
        settle(study)
        prepare(study)
        make_tokenizer(study)
    acc.wait_for_everyone()


def base_jobs(study: Study) -> list[Job]:
    """One job per plain base: the seeds of the study, and what the teachers need beside them."""
    wanted = {seed for groups in teacher_groups(study).values() for bases in groups for seed in bases}
    steps = study.base.train.epochs if study.base.train else 0.2
    return [
        Job(f"base s{seed}", make_base, (study, seed), weight=10 * steps)
        for seed in sorted({*study.seeds, *wanted})
    ]


def _teacher_job(side: str, seeds: list[int]) -> str:
    return f"teacher {teacher_name(side, seeds)}"


def teacher_jobs(study: Study) -> list[Job]:
    """One job per distinct teacher, after its bases."""
    return [
        Job(
            _teacher_job(side, seeds),
            make_teacher,
            (study, side, seeds, bases),
            tuple(f"base s{s}" for s in sorted({*bases, *seeds})),
            weight=5 * len(bases),
        )
        for side, groups in teacher_groups(study).items()
        for bases, seeds in groups.items()
    ]


def student_jobs(study: Study) -> list[Job]:
    """One job per student, after its base and its teacher; plain CE needs its base alone."""
    groups = teacher_groups(study)
    after = {
        (side, seed): _teacher_job(side, seeds)
        for side in groups
        for seeds in groups[side].values()
        for seed in seeds
    }
    jobs = []
    for seed in study.seeds:
        for arm in study.arms:
            teacher = after.get((TEACHERS.get(arm, ""), seed))
            needs = (f"base s{seed}", *([teacher] if teacher else []))
            jobs.append(
                Job(f"{arm} s{seed}", make_student, (study, arm, seed), needs, weight=10 * study.train.epochs)
            )
    return jobs


def run(study: Study, jobs: list[Job], title: str) -> None:
    """Side by side on one machine's CPU; in turn on a GPU or where several processes train as one."""
    acc = accelerator()
    if acc.num_processes > 1 or acc.device.type != "cpu":
        if acc.is_main_process:
            print(f"{title}: {acc.num_processes} processes on {acc.device.type}", file=sys.stderr)
        run_in_turn(title, jobs, quiet=not acc.is_main_process)
    else:
        run_jobs(title, jobs, study.workers)
