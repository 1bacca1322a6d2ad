"""What records are made of: counts, times and sums, each within bounds that any real measurement keeps."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, model_validator

from eval.core.config import Stored

LEAST, MOST = 1e-9, 1e12  # of a time, a rate or an energy; 1e12 is also the most bits of a document
MOST_COUNT = 2**53  # whole numbers up to here are exact in float64
LEAST_SERVED = 10  # requests served back to back, however long they take
ROUNDING = 1e-3  # bits per token by which a divergence of 0 may come out below 0
Positive = Annotated[float, Field(ge=LEAST, le=MOST, allow_inf_nan=False)]
Counted = Annotated[int, Field(gt=0, le=MOST_COUNT)]
Held = Annotated[int, Field(ge=0, le=MOST_COUNT)]  # bytes
Times = Annotated[list[Positive], Field(min_length=1)]
Steps = list[Positive]  # none of what decodes nothing
Sums = list[Annotated[float, Field(ge=0, le=MOST_COUNT, allow_inf_nan=False)]]


class Bins(Stored):
    """Sums over the tokens of a slice by the confidence in them: 15 bins of equal width over [0, 1]."""

    tokens: Sums
    confidence: Sums  # probability of the likeliest token
    correct: Sums  # whether that was the token

    @model_validator(mode="after")
    def check(self) -> Self:
        if not len(self.tokens) == len(self.confidence) == len(self.correct) or sum(self.tokens) <= 0:
            raise ValueError("sums of different bins, or of no token")
        return self


class Energy(Stored):
    """What a meter counted while requests were served, idle power and neighbours of all it feeds included."""

    joules: Positive | None  # null: no meter
    tokens: Counted  # generated meanwhile
    meter: str  # its name; without one, why there is none


class Batched(Stored):
    """Several prompts served at once, in step."""

    batch_size: int
    prefill_ms: Times  # one entry per batch
    decode_ms: Steps  # one entry per step, which makes a token for every prompt of the batch
    peak_memory_bytes: Counted  # of the process so far; it takes the sizes in ascending order
    device_memory_bytes: Held | None
    energy: Energy


class Process(Stored):
    """What one fresh process measured; batch 1 unless stated otherwise."""

    prefill_ms: Times  # one entry per request: until its first token is known
    decode_ms: Steps  # one entry per generated token after the first
    load_s: Positive
    peak_memory_bytes: Counted  # VmHWM on a CPU, the reserved peak on CUDA
    device_memory_bytes: Held | None = (
        None  # of this process by the accelerator's own count, where it has one
    )
    energy: Energy | None = None  # null in older records
    batches: list[Batched] = Field(default_factory=list)  # the sizes above 1
    computed_in: str | None = None  # number format of the products, if it is not that of the weights

    @property
    def timed(self) -> Iterator[tuple[str, list[float]]]:
        """Lists of times by name: no two processes that ran have the same."""
        yield "times", [self.load_s, *self.prefill_ms, *self.decode_ms]
        yield "prefill_ms", self.prefill_ms
        yield "decode_ms", self.decode_ms
        for one in self.batches:
            yield f"prefill_ms of batch {one.batch_size}", one.prefill_ms
            yield f"decode_ms of batch {one.batch_size}", one.decode_ms


class Arrivals(Stored):
    """Requests of one rate, served in real time; latencies count from the intended arrival."""

    rate: Positive  # intended requests per second
    arrival_s: Times  # intended, from the start, ascending
    first_ms: Steps  # until the first token; shorter than `arrival_s` where the time was over
    done_ms: Steps  # until the last token

    @model_validator(mode="after")
    def check(self) -> Self:
        if not len(self.first_ms) == len(self.done_ms) <= len(self.arrival_s):
            raise ValueError("more requests were done than arrived, or than began")
        if any(a > b for a, b in pairwise(self.arrival_s)):
            raise ValueError("requests are in another order than they arrived in")
        if any(a > b for a, b in zip(self.first_ms, self.done_ms, strict=True)):
            raise ValueError("a last token came before the first one")
        return self


class Server(Stored):
    """What one fresh process served, one request after another in the order of arrival."""

    service_ms: Times  # of requests that followed each other without a pause
    rates: list[Arrivals]
    computed_in: str | None = None  # number format of the products, if it is not that of the weights

    @property
    def timed(self) -> Iterator[tuple[str, list[float]]]:
        """Lists of times by name: no two processes that ran have the same."""
        yield "service_ms", self.service_ms
        for one in self.rates:
            yield f"done_ms at {one.rate:g} requests/s", one.done_ms


class Rerun(Stored):
    """The same model once more, under other circumstances: what differs is noise."""

    tokens: Counted
    flips: int
    kl_bits: float = Field(le=MOST, allow_inf_nan=False)

    @model_validator(mode="after")
    def check(self) -> Self:
        if not 0 <= self.flips <= self.tokens:
            raise ValueError(f"{self.flips} flips of {self.tokens} tokens")
        if self.kl_bits < -ROUNDING * self.tokens:
            raise ValueError(f"a divergence of {self.kl_bits:g} bits; it is at least 0")
        return self
