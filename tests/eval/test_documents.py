"""Documents and the rows of tokens that every stage makes of them."""

import os
from types import SimpleNamespace

import pytest
import torch

from eval.core.documents import (
    Document,
    Row,
    batches,
    boundary_id,
    collate,
    free_bytes,
    read_documents,
    scored_slices,
    tokens_per_batch,
    windows,
)
from eval.core.errors import UserError
from tests.eval.run_builder import put_data, tokenizer
from tests.helpers import text

TEXTS = ["x", "é€😀\n\ttab", text("code", 1), text("prose", 2) * 3]


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.mark.parametrize("context", [2, 3, 16, 10_000])
@pytest.mark.parametrize("body", TEXTS)
def test_windows_cover_each_token_once(words, body, context):
    rows = windows(words, Document("d", "code", body), context)
    assert all(row.tokens[0] == boundary_id(words) for row in rows)
    assert all(2 <= len(row.tokens) <= context for row in rows)
    assert all(len(row.tokens) == context for row in rows[:-1])
    assert words.decode([t for row in rows for t in row.tokens[1:]]) == body
    assert [row.id for row in rows] == [f"d#{i}" for i in range(len(rows))]


def test_an_empty_document_is_refused(words):
    with pytest.raises(UserError, match="document 'nothing': no tokens"):
        windows(words, Document("nothing", "code", ""), 8)


def test_the_boundary_is_bos_or_else_eos():
    def tokenizer(bos=None, eos=None, cls=None):
        return SimpleNamespace(bos_token_id=bos, eos_token_id=eos, cls_token_id=cls)

    assert boundary_id(tokenizer(bos=0, eos=5)) == 0
    assert boundary_id(tokenizer(eos=5)) == 5
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        boundary_id(tokenizer())


def test_collate_pads_right_and_masks_what_it_padded():
    batch = collate([Row("a", "x", 0, [7, 8, 9]), Row("b", "y", 2, [7, 5])], pad=3)
    assert batch.input_ids.tolist() == [[7, 8, 9], [7, 5, 3]]
    assert batch.labels.tolist() == [[8, 9], [5, 3]]
    assert batch.mask.tolist() == [[True, True], [True, False]]
    assert (batch.ids, batch.documents, batch.domains) == (["a#0", "b#2"], ["a", "b"], ["x", "y"])
    assert torch.equal(batch.to("cpu").input_ids, batch.input_ids)


@pytest.mark.parametrize("size", [1, 12, 40, 4096])
def test_batches_hold_each_row_once_within_their_size(size):
    rows = [Row(f"d{i}", "x", 0, list(range(2 + i * 5 % 11))) for i in range(23)]
    packed = list(batches(rows, pad=0, batch_tokens=size))
    assert sorted(name for batch in packed for name in batch.ids) == sorted(row.id for row in rows)
    assert all(batch.input_ids.numel() <= size or len(batch.ids) == 1 for batch in packed)
    lengths = [batch.input_ids.shape[1] for batch in packed]
    assert lengths == sorted(lengths, reverse=True)
    again = list(batches(rows[::-1], pad=0, batch_tokens=size))
    assert [batch.ids for batch in again] == [batch.ids for batch in packed], (
        "the order given does not matter"
    )


def test_slices_are_read_by_name(tmp_path):
    put_data(tmp_path)
    assert scored_slices(tmp_path / "data") == ["validation", "far"]
    first = read_documents(tmp_path / "data", "validation")[0]
    assert (first.id, first.domain, first.text) == ("code-0", "code", text("code", 0, 30))
    assert first.bytes == len(first.text.encode())
    with pytest.raises(UserError, match=r"slice 'near': .*slices of this data: far, test, train, validation"):
        read_documents(tmp_path / "data", "near")


@pytest.mark.parametrize(
    ("free", "vocabulary", "tokens"),
    [
        (2**34, 1024, 4096),
        (2**34, 49_152, 512),
        (2**33, 49_152, 256),
        (2**33, 151_936, 64),
        (2**20, 151_936, 1),
    ],
)
def test_free_memory_decides_how_large_a_batch_is(monkeypatch, free, vocabulary, tokens):
    """On a CPU a sixteenth of it holds eight times the logits."""
    monkeypatch.setattr("eval.core.documents.free_bytes", lambda device: free)
    assert tokens_per_batch(vocabulary) == tokens
    assert tokens == 1 or 8 * 4 * vocabulary * tokens <= free / 16


def test_the_free_memory_of_this_machine():
    assert 2**20 < free_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert tokens_per_batch(2**16).bit_count() == 1
