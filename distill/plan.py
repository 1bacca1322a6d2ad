"""The jobs of a study's training side, in an order that respects what each needs."""

import sys

from accelerate import Accelerator

from distill.data import prepare
from distill.loop import accelerator
from distill.stages import make_base, make_student, make_teacher, teacher_groups, teacher_name
from distill.student import train_tokenizer
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


def teaching_jobs(study: Study) -> list[Job]:
    """One job per distinct teacher, then one per student; plain CE needs its base alone."""
    jobs, after = [], dict[tuple[str, int], str]()
    for side, groups in teacher_groups(study).items():
        for bases, seeds in groups.items():
            name = f"teacher {teacher_name(side, seeds)}"
            needs = tuple(f"base s{s}" for s in sorted({*bases, *seeds}))
            jobs.append(Job(name, make_teacher, (study, side, seeds, bases), needs, weight=5 * len(bases)))
            after.update({(side, seed): name for seed in seeds})
    for seed in study.seeds:
        for arm in study.arms:
            teacher = after.get(({"S1": "T1", "S0": "T0"}.get(arm, ""), seed))
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
