"""Training rows: tokens made once into a map, the same rows as from lists, packed full, and what they say."""

import hashlib
import json
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

from distill.data import tokens as tokens_module
from distill.data.rows import TokenMap, describe_rows, rows_taken, training_rows
from distill.data.split import prepare
from distill.data.tokens import make_tokens
from eval.core.artifacts import read_manifest
from eval.core.documents import TRAIN, read_documents, windows
from eval.core.documents.bins import best_fit
from eval.core.errors import UserError
from eval.core.study import load_study
from tests.distill.test_data import changed
from tests.helpers import tiny_study, tiny_tokenizer


def rows_of_lists(study, tokenizer):
    """What the map must give: a few rows of each document by hash, then the rest by hash."""
    key = lambda row: hashlib.sha256(row.id.encode()).hexdigest()  # noqa: E731
    first, rest = [], []
    for document in read_documents(study.folder / "data", TRAIN):
        rows = sorted(windows(tokenizer, document, study.data.context), key=key)
        first += rows[:4]
        rest += rows[4:]
    return first + sorted(rest, key=key)


@pytest.mark.parametrize("share", [2**25, 12_000])
def test_the_map_gives_the_rows_that_lists_gave(tmp_path, monkeypatch, share):
    """In one share, and in several by processes of their own."""
    monkeypatch.setattr(tokens_module, "LEAST_SHARE", share)
    study = changed(tiny_study(tmp_path), "data", train_rows="all", context=24)
    prepare(study)
    tokenizer = tiny_tokenizer()
    rows, expected = training_rows(study, tokenizer), rows_of_lists(study, tokenizer)
    assert list(rows) == expected
    assert rows[3:5] == expected[3:5]
    assert rows[-1] == expected[-1]
    assert all(type(token) is int for token in rows[0].tokens)
    few = changed(tmp_path / "study.yaml", "data", train_rows=7)
    assert list(training_rows(few, tokenizer)) == expected[:7]
    assert not list((study.folder / "scratch").iterdir())


def test_tokens_are_made_once_for_every_number_of_rows_and_again_for_another_context(study_and_tokens):
    study, tokenizer, path, folder = study_and_tokens
    made = read_manifest(folder)
    assert make_tokens(changed(path, "data", train_rows=5), tokenizer) == folder
    assert read_manifest(folder) == made
    assert make_tokens(changed(path, "data", context=20), tokenizer) == folder
    assert read_manifest(folder).hash != made.hash
    assert make_tokens(study, tiny_tokenizer(300)).name != folder.name
    (folder / "ids.bin").write_bytes(b"cut")
    assert make_tokens(changed(path, "data", context=20), tiny_tokenizer(300)).name != folder.name
    with pytest.raises(UserError, match=r"ids\.bin has sha256"):
        make_tokens(changed(path, "data", context=20), tokenizer)


@pytest.fixture
def study_and_tokens(tmp_path):
    path = tiny_study(tmp_path)
    study, tokenizer = load_study(path), tiny_tokenizer()
    prepare(study)
    return study, tokenizer, path, make_tokens(study, tokenizer)


def test_what_is_taken_of_what_there_is_is_said(study_and_tokens):
    study, tokenizer, path, folder = study_and_tokens
    every = rows_of_lists(study, tokenizer)
    expected = {
        "rows": 32,
        "of_rows": len(every),
        "tokens": sum(row.predicted for row in every[:32]),
        "of_tokens": sum(row.predicted for row in every),
    }
    assert rows_taken(study, tokenizer) == expected
    facts = read_manifest(folder).facts
    assert (facts["rows"], facts["tokens"]) == (expected["of_rows"], expected["of_tokens"])
    assert describe_rows(expected).startswith(
        f"training rows: 32 of {len(every)}, with {expected['tokens']:,} of"
    )
    every_row = changed(path, "data", train_rows="all")
    assert rows_taken(every_row, tokenizer)["rows"] == len(every)
    with pytest.raises(
        UserError, match=r"data\.train_rows: 100000, .* lower it, give `all`, or add documents"
    ):
        rows_taken(changed(path, "data", train_rows=100_000), tokenizer)


def test_who_asks_for_tokens_that_are_being_made_waits_for_them(study_and_tokens, monkeypatch):
    study, tokenizer, _, folder = study_and_tokens
    (folder / "manifest.json").unlink()
    made, write = [], tokens_module._write_share
    monkeypatch.setattr(
        tokens_module, "_write_share", lambda *args, **more: (made.append(1), write(*args, **more))
    )
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: list(training_rows(study, tokenizer)), range(3)))
    assert made == [1]
    assert answers[0] == answers[1] == answers[2]
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == [folder.name]


def test_the_rows_of_a_large_corpus_hold_no_tokens(tmp_path):
    """A corpus whose rows as lists would take 40 bytes a token."""
    lines = [{"id": i, "text": f"{i} the river and the old stone " * 60} for i in range(400)]
    corpus = tmp_path / "large.jsonl"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tiny_study(tmp_path)
    raw = yaml.safe_load(path.read_text())
    raw["data"] |= {
        "documents": [{"kind": "dataset", "path": "json", "data_files": str(corpus)}],
        "train_rows": "all",
        "shifted": {},
    }
    path.write_text(yaml.safe_dump(raw))
    study = load_study(path)
    prepare(study)
    folder = make_tokens(study, tiny_tokenizer())
    tokens = read_manifest(folder).facts["tokens"]
    assert tokens > 200_000
    tracemalloc.start()
    rows = TokenMap(folder)[:]
    read = sum(len(row.tokens) for row in rows)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == tokens + len(rows)
    assert peak < 0.1 * 39.7 * tokens
    assert held < tokens // 10


def test_best_fit_fills_bins_and_forgets_nothing():
    generator = random.Random(0)
    for _ in range(20):
        capacity = generator.randrange(5, 300)
        lengths = [min(capacity, 1 + int(generator.expovariate(4 / capacity))) for _ in range(400)]
        bins = best_fit(lengths, capacity)
        assert sorted(i for items in bins for i in items) == list(range(400))
        sums = [sum(lengths[i] for i in items) for items in bins]
        assert max(sums) <= capacity
        assert sum(lengths) / (capacity * len(bins)) > 0.95 or len(bins) == -(-sum(lengths) // capacity)
        assert bins == best_fit(list(lengths), capacity)
        assert bins == sorted(bins)
    assert best_fit([7, 6, 3, 5, 2], 10) == [[0, 2], [1, 4], [3]], "the fullest bin with room"
    assert best_fit([], 10) == []


def test_packed_rows_of_the_map_are_full(tmp_path):
    study = changed(tiny_study(tmp_path), "data", packing=True, context=250, train_rows="all")
    prepare(study)
    tokenizer = tiny_tokenizer()
    rows, alone = training_rows(study, tokenizer), rows_of_lists(study, tokenizer)
    assert len({row.id for row in rows}) == len(rows) < len(alone)
    assert sum(row.predicted for row in rows) == sum(row.predicted for row in alone)
    parts = []
    for row in rows:
        assert len(row.tokens) <= 250
        ends = np.cumsum([size for size, _ in row.parts])
        parts += [tuple(row.tokens[end - size : end]) for end, (size, _) in zip(ends, row.parts, strict=True)]
    assert sorted(parts) == sorted(tuple(row.tokens) for row in alone)
    assert {row.domain for row in rows} == {"code", "prose"}
