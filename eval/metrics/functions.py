"""Every metric once, as a pure function: the gate, the scorer and the `evaluate` modules here call these."""

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARTICLES = {"a", "an", "the"}


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 where the output is one of the answers, white space around both aside; else 0."""
    return float(output.strip() in {answer.strip() for answer in answers})


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's own script compares answers."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in bare.split() if word not in ARTICLES]


def token_f1(output: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words (Rajpurkar et al. 2016, SQuAD), for the best answer."""
    return max(_f1(words(output), words(answer)) for answer in answers)


def _f1(output: list[str], answer: list[str]) -> float:
    if not output or not answer:
        return float(output == answer)
    common = sum((Counter(output) & Counter(answer)).values())
    return 2 * common / (len(output) + len(answer))


def likeliest_choice(log_likelihoods: Sequence[float], sizes: Sequence[int] | None = None) -> int:
    """Index of the likeliest choice, or of the likeliest per byte where sizes are given; the first of equals.

    Long choices are less likely for their mere length; lm-evaluation-harness therefore divides by it too
    (its `acc_norm`, by characters).
    """
    values = [v / s for v, s in zip(log_likelihoods, sizes, strict=True)] if sizes else list(log_likelihoods)
    return values.index(max(values))


def bits_per_byte(bits: Sequence[float], sizes: Sequence[int]) -> float:
    """Sum of the bits of documents over the sum of their bytes (Gao et al. 2020, The Pile, section 3.1)."""
    return _ratio_of_sums(bits, sizes, "bytes")


def next_token_accuracy(correct: Sequence[int], tokens: Sequence[int]) -> float:
    """Sum of the correct tokens of documents over the sum of their predicted tokens."""
    return _ratio_of_sums(correct, tokens, "tokens")


def _ratio_of_sums(parts: Sequence[float], sizes: Sequence[int], unit: str) -> float:
    if min(sizes) < 1:
        raise ValueError(f"references: {min(sizes)} {unit}; every document must have at least 1")
    return sum(parts) / sum(sizes)


def calibration_error(
    confidence: Sequence[float], correct: Sequence[float], tokens: Sequence[float]
) -> float:
    """Sum over bins of |confidence - correct|, over all tokens (Guo et al. 2017, equation 3).

    Each argument has one sum per bin: of confidences, of correct tokens, of tokens.
    """
    if np.sum(tokens) < 1:
        raise ValueError("tokens: every bin is empty; at least one must hold a token")
    return float(np.abs(np.subtract(confidence, correct)).sum() / np.sum(tokens))


def f1_parts(
    predicted: NDArray[Any], labels: NDArray[Any], wanted: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[..., N] 2 TP and 2 TP + FP + FN of each text for one class: F1 is the ratio of their sums.

    Args:
        predicted: [..., N] numbers of classes; labels: [N].
    """
    said, true = predicted == wanted, labels == wanted
    return 2.0 * (said & true), 1.0 * said + true
