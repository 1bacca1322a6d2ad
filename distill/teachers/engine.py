"""A teacher with its method as an engine: what a release replaces, measured beside it.

`eval.cost` finds the path of this module in the manifest of a teacher. Its texts are timed by its method's
own `write`, with whatever caches that has; token by token it reads everything again.
"""

import os
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from distill.data.rows import training_rows
from distill.method import OTHERS
from distill.teachers.local import LocalTeacher
from distill.teachers.run import run_local_teacher, study_method, teacher_group, teacher_tokenizer
from eval.core.artifacts import read_manifest
from eval.core.documents import Batch, Row, collate
from eval.core.sections import Generation
from eval.core.study import Study, load_study
from eval.engines import Engine, Writer, subject_of

DEVICES = ("cpu", "cuda")


class TeacherEngine(Engine):
    """Log-probabilities of the teacher; a state is the ids [B, T] that were read."""

    def __init__(self, folder: Path, study: Study, side: str, seed: int) -> None:
        bases, seeds = teacher_group(study, side, seed)
        self.running = ExitStack()
        self.teacher: LocalTeacher = self.running.enter_context(run_local_teacher(study, side, seeds, bases))
        tokenizer = teacher_tokenizer(study, side, seed)
        fronts = study_method(study, side).in_front(tokenizer)
        # the domain with the most in front; of a method that puts nothing there, that of the first row
        domain = max(fronts, key=lambda name: len(fronts[name])) if fronts else None
        self.domain = training_rows(study, tokenizer)[0].domain if domain in (None, OTHERS) else domain
        super().__init__(folder, self.teacher.vocabulary)

    def rows(self, ids: Tensor) -> list[Row]:
        return [Row(f"text {i}", self.domain or "", 0, tokens) for i, tokens in enumerate(ids.tolist())]

    def logits(self, batch: Batch) -> Tensor:
        return self.teacher.log_probs(batch)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.teacher.log_probs(collate(self.rows(ids), 0))[:, -1], ids

    def decode(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.prefill(torch.cat([state, tokens[:, None]], dim=1))


class WritingTeacher(TeacherEngine, Writer):
    """Texts are drawn at temperature 1; each call draws others."""

    calls = 0

    def write(self, ids: Tensor, new_tokens: int) -> int:
        self.calls += 1
        texts = self.teacher.write(self.rows(ids), Generation(new_tokens=new_tokens), self.calls)
        return max(map(len, texts))


def load(folder: Path, threads: int, device: str) -> Engine:
    """The teacher whose fitted method lies in `folder`, `method/T1/s0` of its run folder."""
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()  # before the accelerator is set up
    torch.set_num_threads(threads)
    subject = subject_of(read_manifest(folder))
    study = load_study(folder.parents[2])
    kind = WritingTeacher if study.task == "causal_lm" else TeacherEngine
    return kind(folder, study, subject.arm, subject.seed)
