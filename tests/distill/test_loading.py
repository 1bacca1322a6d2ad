"""What each step takes: the same rows, batches and targets by any number of processes that prepare them."""

import pytest
import torch

from distill.losses.teacher_output import StoredTargets
from distill.trainer.loading import load_steps
from distill.trainer.loop import accelerator, row_order
from eval.core.documents import collate
from eval.core.sections import Train
from tests.distill.test_loop import row_teacher, rows
from tests.helpers import run


def check_steps(workers):
    """Rows, batches and stored targets; the random numbers of the training are left alone."""

    class Stored(StoredTargets):
        def __call__(self, batch):
            return row_teacher(batch)

    some, config, acc = rows(), Train(rows=2, accumulate=2), accelerator()
    order = row_order(len(some), 6, 2, seed=3)
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    steps = list(load_steps(some, order, 2, config, acc, 0, Stored(), workers=workers))
    assert torch.rand(1) == drawn
    assert [[row.id for row in step.rows] for step in steps] == [[some[i].id for i in o] for o in order[2:]]
    for step in steps:
        for row, batch, target in zip(step.rows, step.batches, step.targets, strict=True):
            expected = collate([row], 0)
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(target.log_probs, row_teacher(expected).log_probs)
    (running, *_) = load_steps(some, order, 2, config, acc, 0, row_teacher, workers=workers)
    assert running.targets == [None, None], "a teacher that runs is asked when its step comes"


def test_steps_are_prepared_in_their_order():
    check_steps(0)


@pytest.mark.slow
def test_so_they_are_ahead_by_other_processes():
    """In a command of its own: what is forked here would hold the pipes of the test's process open."""
    done = run("-c", "from tests.distill.test_loading import check_steps; check_steps(2)")
    assert done.returncode == 0, done.stderr
