"""What each step of a training takes: rows, batches and stored targets, prepared ahead of it on a GPU."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from distill.losses.teacher_output import Aligned, StoredTargets, Target, Teacher
from eval.core.documents import Batch, Row, collate
from eval.core.errors import UserError
from eval.core.sections import Train

CUDA_WORKERS = 2  # processes that unpack targets while the GPU computes; on a CPU they would only share it


class StepInput(NamedTuple):
    """The rows of one step, and this process's share of them in micro-batches on the CPU."""

    rows: list[Row]
    batches: list[Batch]
    targets: list[Target | Aligned | None]  # of each batch; None where a teacher has to run


def step_input(
    rows: list[Row], config: Train, acc: Accelerator, pad: int, teacher: Teacher | None = None
) -> StepInput:
    """This process's share of a step: every process knows all rows, so nothing is exchanged.

    Raises:
        UserError: the rows cannot be shared out evenly.
    """
    parts = config.accumulate * acc.num_processes
    if len(rows) % parts:
        fix = f"give a multiple of accumulate x processes = {parts}, or change one of these"
        raise UserError("train.rows", len(rows), fix)
    size = len(rows) // parts
    mine = range(acc.process_index, parts, acc.num_processes)
    batches = [collate(rows[i * size : (i + 1) * size], pad) for i in mine]
    stored = teacher if isinstance(teacher, StoredTargets) else None
    return StepInput(rows, batches, [None if stored is None else stored(batch) for batch in batches])


class _Steps(Dataset[StepInput]):
    """The inputs of all steps, by number."""

    def __init__(
        self,
        rows: Sequence[Row],
        order: Sequence[Sequence[int]],
        config: Train,
        acc: Accelerator,
        pad: int,
        teacher: Teacher | None,
    ) -> None:
        self.rows, self.order = rows, order
        self.how = config, acc, pad, teacher

    def __getitem__(self, step: int) -> StepInput:
        return step_input([self.rows[i] for i in self.order[step]], *self.how)


def load_steps(
    rows: Sequence[Row],
    order: Sequence[Sequence[int]],
    start: int,
    config: Train,
    acc: Accelerator,
    pad: int,
    teacher: Teacher | None,
    workers: int | None = None,
) -> Iterator[StepInput]:
    """The inputs of the steps from `start` on, in their order; the same for any number of workers.

    Args:
        order: row numbers of every step.
        workers: processes that prepare ahead; none: `CUDA_WORKERS` beside a GPU, this process on a CPU.
    """
    if workers is None:
        workers = CUDA_WORKERS if acc.device.type == "cuda" else 0
    loader = DataLoader(
        _Steps(rows, order, config, acc, pad, teacher),
        batch_size=None,
        sampler=range(start, len(order)),
        num_workers=workers,
        generator=torch.Generator(),  # its seeds are not drawn from the training's random numbers
    )
    return iter(loader)
