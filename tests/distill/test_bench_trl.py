"""What the side-by-side with TRL is made of beside the two trainers; its numbers are no matter of a test."""

import sys

import pytest

from scripts.bench_trl import CONTEXT, DOCUMENTS, LIMITS, SHORTEST, SIDES, WARM, Pace, documents, rows_of
from tests.helpers import ROOT


def test_documents_are_the_same_in_every_process_and_of_unequal_length():
    texts = documents(8000)
    assert texts == documents(8000)
    assert len(texts) == DOCUMENTS
    lengths = [len(tokens) for tokens in texts]
    assert SHORTEST <= min(lengths) < 80
    assert 220 < max(lengths) <= CONTEXT
    assert all(tokens[0] == 1 and min(tokens[1:]) >= 3 and max(tokens[1:]) < 8000 for tokens in texts)


def test_a_trainer_makes_as_many_steps_as_it_is_given():
    answers = []
    pace = Pace(iter(["1", "2"]), answers.append)
    for step in range(WARM + 2):
        pace(10 + step, 1.0 / (step + 1))
    with pytest.raises(SystemExit):
        pace(10 + WARM + 2, 0.1)
    assert [answer["tokens"] for answer in answers] == [10 + 11, 12, 13 + 14]
    assert {answer["loss"] for answer in answers} == {1.0}
    assert all(answer["seconds"] >= 0 for answer in answers)


def test_a_row_is_the_median_of_the_rounds_ratios(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    rates = {kind: [2.0 * n, 4.0 * n, 3.0 * n] for n, kind in enumerate(SIDES, 1)}
    for vocabulary, limits in LIMITS.items():
        rows = rows_of(vocabulary, rates)
        assert [row["value"] for row in rows] == [2, 3, 4, 5]
        assert [row["limit"] for row in rows] == [f">= {limits[kind.split()[1]]}" for kind in SIDES[1:]]
        assert all(row["met"] for row in rows)
        assert (rows[0]["ours_per_s"], rows[0]["trl_per_s"]) == (6, 3)
    rates["padded online"] = [1.0, 9.0, 2.0]
    assert not rows_of(32000, rates)[0]["met"]
