"""Draws from a distribution, and few bytes to keep them in. Pure functions; nothing here depends on a batch.

The numbers that decide a draw come from a key (a row), never from a running generator: so a row's draws are
the same in any order, in any batch and on any number of processes.
"""

import math

import numpy as np
import torch
from torch import Tensor

from distill.models.generation import inverse_cdf

AT_ONCE = 2**24  # entries of a float64 table


def draw(log_probs: Tensor, points: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draws of each token at a temperature, and the entropy of what was drawn from.

    Stratified: the i-th of N draws inverts the point (i + u_i) / N, so that the expected count of an id is N
    times its probability, exactly, and no sum over draws varies more than with independent ones (Douc, Cappe
    and Moulines 2005, arXiv:cs/0507025, section 3.2).

    Args:
        log_probs: [n, V] at T = 1.
        points: [n, N] independent numbers u in [0, 1).

    Returns:
        ids: [n, N] int64, ascending; entropy: [n] float32 in nats, at `temperature`.
    """
    n, draws = points.shape
    strata = (torch.arange(draws, device=points.device) + points) / draws
    ids, entropy = [], []
    step = max(1, AT_ONCE // log_probs.shape[1])
    for start in range(0, n, step):
        logs = torch.log_softmax(log_probs[start : start + step].float() / temperature, dim=-1)
        probabilities = logs.exp()
        ids.append(inverse_cdf(probabilities, strata[start : start + step]))
        entropy.append(torch.special.entr(probabilities).sum(-1))
    return torch.cat(ids), torch.cat(entropy)


def low_bits(draws: int, vocabulary: int) -> int:
    """Bits of an id that are written as they are; the rest is written as a step in a rising line."""
    return max(0, int(math.log2(max(1.0, vocabulary / draws))))


def _layout(distinct: np.ndarray, draws: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token with `distinct` ids [n]: where its steps and its low bits begin, and its bytes."""
    low = low_bits(draws, vocabulary)
    steps = np.where(distinct < draws, draws, 0)  # counts are all 1 where every draw is another id
    lows = steps + distinct + ((vocabulary - 1) >> low)
    return steps, lows, -(-(lows + distinct * low) // 8)


def packed_bytes(distinct: np.ndarray, draws: int, vocabulary: int) -> np.ndarray:
    """[n] bytes that tokens with `distinct` ids [n] take when packed."""
    return _layout(distinct.astype(np.int64), draws, vocabulary)[2]


def pack(ids: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending draws [n, N] as bytes laid end to end, and the number of distinct ids of each token [n].

    A token's distinct ids are a rising sequence, written as Elias (1974) and Fano (1971) do: the low bits as
    they are, the high ones as a line of steps; which draws repeat the one before is one bit each. With 50
    draws that is at most 45 bytes at V = 1k and 76 at V = 32k, whatever the distribution, and far less where
    draws repeat.
    """
    n, draws = ids.shape
    low = low_bits(draws, vocabulary)
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    distinct = new.sum(1)
    steps, lows, sizes = _layout(distinct, draws, vocabulary)
    bits = np.zeros((n, 8 * int(sizes.max(initial=0))), dtype=np.uint8)
    counted = steps > 0
    bits[counted, :draws] = new[counted]
    token, place = np.nonzero(new)
    rank, found = np.cumsum(new, axis=1)[token, place] - 1, ids[token, place]
    bits[token, steps[token] + (found >> low) + rank] = 1
    for bit in range(low):
        bits[token, lows[token] + rank * low + bit] = (found >> bit) & 1
    table = np.packbits(bits, axis=1)
    return table[np.arange(table.shape[1]) < sizes[:, None]], distinct


def unpack(
    packed: np.ndarray, distinct: np.ndarray, draws: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `pack` wrote: ids [n, K] int64 and counts [n, K] float32, 0 where a place is unused."""
    distinct = distinct.astype(np.int64)
    low, n = low_bits(draws, vocabulary), len(distinct)
    steps, lows, sizes = _layout(distinct, draws, vocabulary)
    table = np.zeros((n, int(sizes.max(initial=0))), dtype=np.uint8)
    table[np.arange(table.shape[1]) < sizes[:, None]] = packed
    bits = np.unpackbits(table, axis=1)
    column = np.arange(bits.shape[1])
    stepped = bits.astype(bool) & (column >= steps[:, None]) & (column < lows[:, None])
    token, place = np.nonzero(stepped)
    rank = np.arange(len(token)) - np.repeat(np.cumsum(distinct) - distinct, distinct)
    found = (place - steps[token] - rank) << low
    for bit in range(low):
        found |= bits[token, lows[token] + rank * low + bit].astype(np.int64) << bit
    ids = np.zeros((n, int(distinct.max(initial=0))), dtype=np.int64)
    ids[token, rank] = found
    return ids, _counts(bits[:, :draws], steps > 0, distinct, ids.shape[1])


def _counts(new: np.ndarray, counted: np.ndarray, distinct: np.ndarray, width: int) -> np.ndarray:
    """[n, width] how often each distinct id was drawn, from the bits that mark a new one."""
    n = len(distinct)
    counts = (np.arange(width) < distinct[:, None]).astype(np.float32)  # as if every draw were another id
    rank = np.cumsum(new, axis=1, dtype=np.int64) - 1
    token = np.flatnonzero(counted)
    flat = (token[:, None] * width + rank[counted]).ravel()
    times = np.bincount(flat, minlength=n * width).reshape(n, width)
    counts[counted] = times[counted]
    return counts
