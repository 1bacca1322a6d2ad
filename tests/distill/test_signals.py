"""The cache of targets: the teacher's own answers, found by row and refused when foreign or damaged."""

import pytest
import torch

from distill.signals import CachedTeacher, write_targets
from eval.artifacts import building
from eval.documents import Row, collate
from eval.errors import UserError
from tests.distill.test_loop import row_teacher, rows


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "targets"
    shares = []
    with building(folder, kind="targets", name="targets", key="k", parents={}, facts={}) as aside:
        write_targets(aside, rows(), row_teacher, 320, 0, shares.append)
    assert shares[-1] == 1.0
    return folder


def test_cached_targets_are_the_teachers_in_any_order_and_batch(cache):
    cached, some = CachedTeacher(cache, rows()), rows()
    for chosen in (some[:3], some[5:1:-1], [some[7]]):
        batch = collate(chosen, 0)
        valid = batch.mask
        found, wanted = cached(batch)[:, :-1][valid], row_teacher(batch)[:, :-1][valid]
        # fp16 carries 11 bits, and log-probabilities here reach -16: half a unit in the last place.
        torch.testing.assert_close(found, wanted, atol=2**-7, rtol=0)
        assert float((found.exp().sum(-1) - 1).abs().max()) < 5e-3


def test_rows_of_other_tokens_are_refused(cache):
    other = [Row(r.document, r.domain, r.index, [*r.tokens[:-1], 5]) for r in rows()]
    with pytest.raises(UserError, match="row d0#0 is not of these tokens"):
        CachedTeacher(cache, other)
    with pytest.raises(UserError, match="row new#0 is not of these tokens"):
        CachedTeacher(cache, [Row("new", "code", 0, [1, 2])])


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
def test_damaged_targets_are_refused(cache, harm):
    path = cache / "log_probs.npy"
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[:-100])
    else:
        content[-7] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"artifact .*log_probs\.npy"):
        CachedTeacher(cache, rows())
