"""Has the input changed? Two-sample tests of new documents against those of the study.

Every test takes one value per document, or per group of documents that are not independent: tokens of one
document are not independent either, and over tokens any two samples differ. The values are the size, how much
a token covers, how the words are chosen (bits per token under the unigram distribution of the training
documents) and how hard the fallback finds the text.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.stats.crossed import cluster_bounds
from eval.stats.multiplicity import holm
from eval.stats.sequential import rate_bounds, start_level

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
    return float(placements(before, now).mean())


def drifts(before: dict[str, Array], now: dict[str, Array]) -> list[Drift]:
    """Kolmogorov-Smirnov tests of every value in `QUESTIONS`, with Holm's correction over them.

    Args:
        before, now: name -> one value per document or group.
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


class Moved(NamedTuple):
    """One question at every look: Cliff's delta of everything so far; its bounds hold for all questions."""

    name: str
    before: float  # median
    now: float
    effect: float
    low: float
    high: float
    since: int | None  # the look since which the effect is beyond doubt not negligible


def placements(before: Array, now: Array) -> Array:
    """[n] for each new value the share of old ones below, less that above; the mean is Cliff's delta."""
    ordered = np.sort(before)
    below, not_above = (np.searchsorted(ordered, now, side=side) for side in ("left", "right"))
    return (below + not_above) / len(ordered) - 1


def effect_bounds(before: Array, now: Array, alpha: float, tuned: float) -> tuple[float, float]:
    """Bounds of Cliff's delta, each at alpha over all looks at the new values; the old ones are seen once.

    A placement lies between -1 and 1, so that the bounds of a chance hold for its mean (Howard et al. 2021).
    What the old values leave open, the spread of their own placements among the new ones, is added to either.
    """
    total = float((placements(before, now) + 1).sum() / 2)
    low, high = rate_bounds(total, len(now), alpha / 2, tuned)
    sampled = cluster_bounds(placements(now, before), alpha / 2)
    if sampled is None:
        return -1.0, 1.0
    half = (sampled[1] - sampled[0]) / 2
    return max(2 * low - 1 - half, -1.0), min(2 * high - 1 + half, 1.0)


def drifts_so_far(
    before: dict[str, Array], since: list[dict[str, Array]], alpha: float, tuned: float
) -> list[Moved]:
    """Every value in `QUESTIONS` at any number of looks: ever calling one drifted wrongly has chance alpha.

    Args:
        since: of each look, name -> one value per document or group of everything since then; the first one
            has everything.
    """
    moved, level = [], alpha / (2 * len(QUESTIONS))  # two sides of each
    for name in QUESTIONS:
        old, new = before[name], since[0][name]
        moved_at = None
        for number, part in enumerate(since, 1):
            low, high = effect_bounds(old, part[name], start_level(level, number), tuned)
            if low > NEGLIGIBLE or high < -NEGLIGIBLE:
                moved_at = number
                break
        low, high = effect_bounds(old, new, level, tuned)
        medians = float(np.median(old)), float(np.median(new))
        moved.append(Moved(name, *medians, superiority(old, new), low, high, moved_at))
    return moved
