"""How an answer is marked: pure functions, for `eval.score.tasks` and the `evaluate` modules beside them."""

import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}


def exact_match(output: str, answers: Sequence[str]) -> float:
    """1 where the output is one of the answers, white space around both aside; else 0."""
    return float(output.strip() in {answer.strip() for answer in answers})


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles, as SQuAD's own script compares answers."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ARTICLES]


def token_f1(output: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words (Rajpurkar et al. 2016, SQuAD), for the best answer."""
    return max(_f1(words(output), words(answer)) for answer in answers)


def _f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def chosen(log_likelihoods: Sequence[float], sizes: Sequence[int] | None = None) -> int:
    """The likeliest choice, or the likeliest per byte where sizes are given; the first one of equals.

    Long choices are less likely for their mere length; lm-evaluation-harness therefore divides by it too
    (its `acc_norm`, by characters).
    """
    values = [v / s for v, s in zip(log_likelihoods, sizes, strict=True)] if sizes else list(log_likelihoods)
    return values.index(max(values))
