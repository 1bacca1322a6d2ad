"""Has the input changed? Two-sample tests of new documents against those of the study.

Every test takes one value per document, because tokens of one document are not independent: over tokens
any two samples differ. The values are the size, how much a token covers, how the words are chosen (bits per
token under the unigram distribution of the training documents) and how hard the fallback finds the text.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.stats.multiplicity import holm

Array = NDArray[np.float64]
QUESTIONS = {
    "bytes": "size of a document, bytes",
    "bytes_per_token": "bytes per token",
    "unigram": "word choice, bits per token by the training unigram",
    "fallback": "difficulty for the fallback, bits per byte",
}


NEGLIGIBLE = 0.147  # below it Cliff's delta is called negligible (Romano et al. 2006)


class Drift(NamedTuple):
    """One test: the distance of two empirical distributions, its p-value, and that of all tests by Holm."""

    name: str
    before: float  # median
    now: float
    distance: float  # the largest difference of the two distribution functions, 0 to 1
    effect: float  # how much likelier a new document has the larger value than the smaller one, -1 to 1
    p: float
    holm_p: float


def surprise(counts: dict[int, int], vocabulary: int, ids: list[int]) -> float:
    """Bits per token of a document under a unigram distribution, smoothed by one (Laplace)."""
    total = sum(counts.values()) + vocabulary
    return float(np.mean([np.log2(total / (counts.get(token, 0) + 1)) for token in ids]))


def superiority(before: Array, now: Array) -> float:
    """Cliff's (1993) delta: the share of pairs whose new value is larger, less that whose is smaller.

    Of many documents any difference is significant; this says how large one is, on no matter what scale.
    """
    ordered = np.sort(before)
    larger, not_smaller = (np.searchsorted(ordered, now, side=side).mean() for side in ("left", "right"))
    return float(larger - (len(ordered) - not_smaller)) / len(ordered)


def drifts(before: dict[str, Array], now: dict[str, Array]) -> list[Drift]:
    """Kolmogorov-Smirnov tests of every value in `QUESTIONS`, with Holm's correction over them.

    Args:
        before, now: name -> one value per document.
    """
    from scipy.stats import ks_2samp

    tests = {name: ks_2samp(before[name], now[name]) for name in QUESTIONS}
    adjusted = holm([float(test.pvalue) for test in tests.values()])
    return [
        Drift(
            name,
            float(np.median(before[name])),
            float(np.median(now[name])),
            float(test.statistic),
            superiority(before[name], now[name]),
            float(test.pvalue),
            p,
        )
        for (name, test), p in zip(tests.items(), adjusted, strict=True)
    ]
