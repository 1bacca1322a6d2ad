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


class Drift(NamedTuple):
    """One test: the distance of two empirical distributions, its p-value, and that of all tests by Holm."""

    name: str
    before: float  # median
    now: float
    distance: float  # the largest difference of the two distribution functions, 0 to 1
    p: float
    holm_p: float


def surprise(counts: dict[int, int], vocabulary: int, ids: list[int]) -> float:
    """Bits per token of a document under a unigram distribution, smoothed by one (Laplace)."""
    total = sum(counts.values()) + vocabulary
    return float(np.mean([np.log2(total / (counts.get(token, 0) + 1)) for token in ids]))


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
            float(test.pvalue),
            p,
        )
        for (name, test), p in zip(tests.items(), adjusted, strict=True)
    ]
