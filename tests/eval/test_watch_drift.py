"""What the script that watches real texts does by itself: pieces of speeches, and answers by group."""

import numpy as np
import pytest

from scripts.watch_drift import BYTES, Answers, pieces


def test_a_speech_is_cut_between_sentences():
    sentences = [
        f"Sentence number {number} says {'more ' * (number % 40)}to the Congress." for number in range(120)
    ]
    text = " ".join(sentences)
    cut = list(pieces(text))
    assert len(cut) > 5
    assert all(BYTES // 2 < len(piece) <= BYTES for piece in cut)
    assert all(piece.startswith("Sentence number") and piece.endswith("Congress.") for piece in cut)
    assert text.startswith(" ".join(cut)), "nothing is lost but what is left over at the end"
    assert list(pieces("Short.")) == []


def test_what_is_saved_counts_each_group_once():
    size = np.array([100.0, 300.0, 200.0])
    control, student = np.array([220.0, 640.0, 500.0]), np.array([200.0, 600.0, 400.0])
    answers = Answers(student, control, control + 10, size, ["a", "a", "b"])
    mean, low, high = answers.saved()
    assert mean == pytest.approx(np.mean([60 / 400, 100 / 200]))
    assert low < mean < high
    assert answers.level()[0] == pytest.approx(np.mean([880 / 400, 510 / 200]))
