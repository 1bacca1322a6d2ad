"""One server, first come first served: what waits how long. Pure functions of arrays, no clock.

Times of service are measured; the waiting follows from them and from the arrivals by Lindley's recursion
(1952), which is no model but the definition of this queue. A study measures its stated rates in real time;
the recursion finds the knee, where every rate between would take a run of its own.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.stats.crossed import random_stream

Array = NDArray[np.float64]
VIRTUAL = 20_000  # requests of a virtual run
SELDOM = 1e-3  # share of arrivals that find a longer queue than a healthy server is allowed
TAIL = 0.95  # the percentile that an SLO holds


def poisson(rate: float, seconds: float, seed: tuple[int, ...]) -> Array:
    """Arrival times in s of a Poisson process of `rate` per second within `seconds`.

    The same seed gives the same process at every rate but for its scale (common random numbers).
    """
    rng = random_stream(seed)
    block, times = int(rate * seconds + 10), np.empty(0)
    while not len(times) or times[-1] < seconds:
        last = times[-1] if len(times) else 0.0
        times = np.concatenate([times, last + rng.standard_exponential(block).cumsum() / rate])
    return times[times < seconds]


def finished(arrivals: ArrayLike, services: ArrayLike) -> Array:
    """When each request is done: d[n] = max(a[n], d[n-1]) + s[n] (Lindley 1952), in the unit of both.

    Without a loop: with C the running sum of s, d[n] - C[n] is the running maximum of a[n] - C[n-1].
    """
    a, s = np.asarray(arrivals, float), np.asarray(services, float)
    total = s.cumsum()
    return np.maximum.accumulate(a - (total - s)) + total


class Served(NamedTuple):
    """What a run at one rate came to."""

    offered: float  # requests per second that arrived
    throughput: float  # requests per second that were done, until the last one was
    follows: bool


def outcome(arrivals: ArrayLike, latencies: ArrayLike, services: ArrayLike, rate: float) -> Served:
    """Whether the server kept up: as many requests waited at the end as in a queue with its times of service.

    Below capacity the queue has a stationary length, which is simulated (`VIRTUAL` requests at this rate); a
    server follows if the rate is below its capacity, and no more of its requests are unserved at the last
    arrival than `SELDOM` of those of the simulated queue.

    Args:
        arrivals: [n] s from the start.
        latencies: [m <= n] s from the arrival; the last n - m were never served.
        services: [k] s of requests served back to back, in their order.
        rate: at which requests were meant to arrive, per second.
    """
    a, latency = np.asarray(arrivals, float), np.asarray(latencies, float)
    if not len(latency):
        return Served(len(a) / float(a[-1]), 0.0, False)
    done = a[: len(latency)] + latency
    unserved = len(a) - int((done <= a[-1]).sum())
    follows = rate < capacity(services) and unserved <= longest_queue(np.asarray(services, float), rate)
    return Served(len(a) / float(a[-1]), len(latency) / float(done[-1]), bool(follows))


def longest_queue(services: Array, rate: float, seed: tuple[int, ...] = (0,)) -> float:
    """Requests in the system, a new one counted, that all but `SELDOM` of the arrivals at `rate` find."""
    arrivals = random_stream(seed).standard_exponential(VIRTUAL).cumsum() / rate
    done = finished(arrivals, np.resize(services, VIRTUAL))
    waiting = np.arange(1, VIRTUAL + 1) - np.searchsorted(done, arrivals, side="right")
    return float(np.quantile(waiting, 1 - SELDOM))


def capacity(services: ArrayLike) -> float:
    """Requests per second of a server that never waits: beyond it every queue grows (Loynes 1962).

    Args:
        services: [n] s.
    """
    return 1 / float(np.asarray(services, float).mean())


def tail(services: Array, rate: float, seed: tuple[int, ...]) -> float:
    """p95 in s of the latency at `rate` in a virtual run of `VIRTUAL` requests."""
    gaps = random_stream(seed).standard_exponential(VIRTUAL)
    arrivals = gaps.cumsum() / rate
    repeated = np.resize(services, VIRTUAL)  # in their order: neighbours stay neighbours
    return float(np.quantile(finished(arrivals, repeated) - arrivals, TAIL))


def knee(services: ArrayLike, slo: float | None, seed: tuple[int, ...] = (0,)) -> float:
    """The highest rate, in requests per second, at which the p95 latency is within `slo` seconds.

    The rate is found by bracketing between 0 and the capacity, to 0.1 %. Every rate meets the same random
    gaps, scaled: waiting then grows with the rate for every single request, so the answer is unique.
    Without an SLO it is the capacity itself, where throughput ceases to follow the offered rate and the queue
    begins to grow. 0 where the service alone takes longer than the SLO.

    Args:
        services: [n] s, in the order in which they were measured.
    """
    times = np.asarray(services, float)
    low, high = 0.0, capacity(times)
    if slo is None or tail(times, high, seed) <= slo:
        return high
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if tail(times, middle, seed) <= slo else (low, middle)
        if high < 1e-3 * capacity(times):
            return 0.0
    return low
