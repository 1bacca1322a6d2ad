"""Codecs of the target cache: log-probabilities to few bytes per token, and back to what a loss takes.

The random numbers of a sample come from the key of its row, never from a running generator: so they are the
same in any order, in any batch and on any number of processes.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill.losses.teacher_output import Dense, Sampled, Target, TopK
from distill.models.generation import inverse_cdf, uniforms
from eval.core.errors import UserError
from eval.core.sections import Targets

Columns = dict[str, np.ndarray]  # an entry per token; of "bytes", as many as the tokens need
MAX_ENTRIES = 2**24  # entries of a float64 table
LEAST = -65504.0  # the least number of fp16: methods mask with -1e9, which would be stored as -inf


class Codec(ABC):
    """Encodes the distributions of a row into columns, and decodes them into a target."""

    name: ClassVar[str]
    vocabulary: int

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """All that decoding needs; it must equal the settings of the study that reads."""

    @abstractmethod
    def max_bytes(self) -> int:
        """Largest number of bytes of one token, for any distribution."""

    @abstractmethod
    def encode(self, log_probs: Tensor, key: str) -> Columns:
        """Columns of the n predicted tokens of the row `key`, from [n, V] float32 at T = 1."""

    @abstractmethod
    def decode(self, columns: Columns) -> Target:
        """The target of the tokens in these columns."""


class DenseCodec(Codec):
    """Every log-probability in fp16: a probability above e^-8 has a relative error of at most 2^-9.

    What is less than fp16 can hold becomes its least number, a probability of 0 all the same.
    """

    name = "dense"

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    @property
    def facts(self) -> dict[str, Any]:
        return {"form": self.name, "vocabulary": self.vocabulary}

    def max_bytes(self) -> int:
        return 2 * self.vocabulary

    def encode(self, log_probs: Tensor, key: str) -> Columns:
        return {"log_probs": log_probs.clamp(min=LEAST).half().cpu().numpy()}

    def decode(self, columns: Columns) -> Target:
        return Dense(torch.from_numpy(columns["log_probs"]))


class SampledCodec(Codec):
    """N ids sampled at the temperature of the loss, packed, and the entropy of the sampled distribution."""

    name = "sampled"

    def __init__(self, vocabulary: int, draws: int, temperature: float) -> None:
        self.vocabulary, self.draws, self.temperature = vocabulary, draws, temperature
        self.count_dtype = np.min_scalar_type(draws)

    @property
    def facts(self) -> dict[str, Any]:
        settings = {"draws": self.draws, "temperature": self.temperature}
        return {"form": self.name, "vocabulary": self.vocabulary, **settings}

    def max_bytes(self) -> int:
        sizes = packed_bytes(np.arange(1, self.draws + 1), self.draws, self.vocabulary)
        return int(sizes.max()) + self.count_dtype.itemsize + 2

    def encode(self, log_probs: Tensor, key: str) -> Columns:
        points = torch.from_numpy(uniforms(f"targets {key}", len(log_probs), self.draws))
        ids, entropy = draw_ids(log_probs, points.to(log_probs.device), self.temperature)
        packed, distinct = pack_ids(ids.cpu().numpy(), self.vocabulary)
        return {
            "bytes": packed,
            "distinct": distinct.astype(self.count_dtype),
            "entropy": entropy.half().cpu().numpy(),
        }

    def decode(self, columns: Columns) -> Target:
        ids, counts = unpack_ids(columns["bytes"], columns["distinct"], self.draws, self.vocabulary)
        entropy = torch.from_numpy(columns["entropy"]).float()
        return Sampled(torch.from_numpy(ids), torch.from_numpy(counts), entropy, self.temperature)


class TopKCodec(Codec):
    """The k most likely ids; log-probabilities in fp16, rounded down so that the tail is never negative."""

    name = "top_k"

    def __init__(self, vocabulary: int, k: int) -> None:
        if k >= vocabulary:
            fix = "lower it, or use targets.form: dense"
            raise UserError("targets.k", f"{k}, must be below the vocabulary of {vocabulary}", fix)
        self.vocabulary, self.k = vocabulary, k
        self.id_dtype = np.min_scalar_type(vocabulary - 1)

    @property
    def facts(self) -> dict[str, Any]:
        return {"form": self.name, "vocabulary": self.vocabulary, "k": self.k}

    def max_bytes(self) -> int:
        return self.k * (self.id_dtype.itemsize + 2)

    def encode(self, log_probs: Tensor, key: str) -> Columns:
        values, ids = (tensor.cpu().numpy() for tensor in log_probs.clamp(min=LEAST).topk(self.k, dim=-1))
        return self.encode_top_k(ids, values)

    def encode_top_k(self, ids: np.ndarray, values: np.ndarray) -> Columns:
        """Columns of n tokens whose k likeliest ids [n, k] and log-probabilities [n, k] float32 are known.

        An unused entry, -inf, stays one.
        """
        rounded = values.astype(np.float16)
        rounded_down = np.nextafter(rounded, np.float16(LEAST))
        return {
            "ids": ids.astype(self.id_dtype),
            "log_probs": np.where(rounded.astype(np.float32) > values, rounded_down, rounded),
        }

    def decode(self, columns: Columns) -> Target:
        ids = torch.from_numpy(columns["ids"].astype(np.int64))
        return TopK(ids, torch.from_numpy(columns["log_probs"]).float())


def make_codec(targets: Targets, vocabulary: int, temperature: float) -> Codec:
    """The codec of `targets.form`; ids are sampled at the temperature of the loss."""
    if targets.form == "sampled":
        return SampledCodec(vocabulary, targets.draws, temperature)
    return TopKCodec(vocabulary, targets.k) if targets.form == "top_k" else DenseCodec(vocabulary)


def draw_ids(log_probs: Tensor, points: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Samples ids of each token at a temperature; also returns the entropy of the sampled distribution.

    Stratified: sample i of N inverts the CDF at (i + u_i) / N. So the expected count of an id is exactly N
    times its probability, and no sum over samples varies more than with independent ones (Douc, Cappe
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
    step = max(1, MAX_ENTRIES // log_probs.shape[1])
    for start in range(0, n, step):
        logs = torch.log_softmax(log_probs[start : start + step].float() / temperature, dim=-1)
        probabilities = logs.exp()
        ids.append(inverse_cdf(probabilities, strata[start : start + step]))
        entropy.append(torch.special.entr(probabilities).sum(-1))
    return torch.cat(ids), torch.cat(entropy)


def low_bits(draws: int, vocabulary: int) -> int:
    """Number of low bits of an id that are stored directly; the high bits are stored as unary steps."""
    return max(0, int(math.log2(max(1.0, vocabulary / draws))))


def _bit_layout(
    distinct: np.ndarray, draws: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token with `distinct` ids [n]: the first bit of its steps, of its low bits, and its bytes."""
    low = low_bits(draws, vocabulary)
    steps = np.where(distinct < draws, draws, 0)  # no repeats are stored where all ids differ
    lows = steps + distinct + ((vocabulary - 1) >> low)
    return steps, lows, -(-(lows + distinct * low) // 8)


def packed_bytes(distinct: np.ndarray, draws: int, vocabulary: int) -> np.ndarray:
    """[n] bytes that tokens with `distinct` ids [n] take when packed."""
    return _bit_layout(distinct.astype(np.int64), draws, vocabulary)[2]


def pack_ids(ids: np.ndarray, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Ascending samples [n, N] as concatenated bytes, and the number of distinct ids of each token [n].

    The distinct ids of a token ascend and are stored in Elias-Fano code (Elias 1974, Fano 1971): low bits
    directly, high bits in unary steps. One more bit per sample marks whether it repeats the one before. With
    50 samples that takes at most 45 bytes at V = 1k and 76 at V = 32k, far less where samples repeat.
    """
    n, draws = ids.shape
    low = low_bits(draws, vocabulary)
    new = np.ones(ids.shape, dtype=bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    distinct = new.sum(1)
    steps, lows, sizes = _bit_layout(distinct, draws, vocabulary)
    bits = np.zeros((n, 8 * int(sizes.max(initial=0))), dtype=np.uint8)
    has_repeats = steps > 0
    bits[has_repeats, :draws] = new[has_repeats]
    token, position = np.nonzero(new)
    rank, distinct_ids = np.cumsum(new, axis=1)[token, position] - 1, ids[token, position]
    bits[token, steps[token] + (distinct_ids >> low) + rank] = 1
    for bit in range(low):
        bits[token, lows[token] + rank * low + bit] = (distinct_ids >> bit) & 1
    table = np.packbits(bits, axis=1)
    return table[np.arange(table.shape[1]) < sizes[:, None]], distinct


def unpack_ids(
    packed: np.ndarray, distinct: np.ndarray, draws: int, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack_ids`: ids [n, K] int64 and counts [n, K] float32, 0 where an entry is unused."""
    distinct = distinct.astype(np.int64)
    low, n = low_bits(draws, vocabulary), len(distinct)
    steps, lows, sizes = _bit_layout(distinct, draws, vocabulary)
    table = np.zeros((n, int(sizes.max(initial=0))), dtype=np.uint8)
    table[np.arange(table.shape[1]) < sizes[:, None]] = packed
    bits = np.unpackbits(table, axis=1)
    column = np.arange(bits.shape[1])
    step_bits = bits.astype(bool) & (column >= steps[:, None]) & (column < lows[:, None])
    token, position = np.nonzero(step_bits)
    rank = np.arange(len(token)) - np.repeat(np.cumsum(distinct) - distinct, distinct)
    distinct_ids = (position - steps[token] - rank) << low
    for bit in range(low):
        distinct_ids |= bits[token, lows[token] + rank * low + bit].astype(np.int64) << bit
    ids = np.zeros((n, int(distinct.max(initial=0))), dtype=np.int64)
    ids[token, rank] = distinct_ids
    return ids, _decode_counts(bits[:, :draws], steps > 0, distinct, ids.shape[1])


def _decode_counts(new: np.ndarray, has_repeats: np.ndarray, distinct: np.ndarray, width: int) -> np.ndarray:
    """[n, width] count of each distinct id, from the bits that mark the first sample of an id."""
    n = len(distinct)
    counts = (np.arange(width) < distinct[:, None]).astype(np.float32)  # right where no id repeats
    rank = np.cumsum(new, axis=1, dtype=np.int64) - 1
    token = np.flatnonzero(has_repeats)
    flat = (token[:, None] * width + rank[has_repeats]).ravel()
    times = np.bincount(flat, minlength=n * width).reshape(n, width)
    counts[has_repeats] = times[has_repeats]
    return counts
