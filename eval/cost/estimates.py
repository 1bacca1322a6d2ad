"""From records of cost and load to numbers with bounds, before any limit is looked at.

Bounds under load: latencies of one queue are autocorrelated, so a process is one cluster: t bounds over the
processes' own values, each from arrivals of its own. The order statistic of all requests is taken where it is
wider; alone it would be too narrow.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.core.budget import UNITS
from eval.core.gate_file import Load, Number, Rate
from eval.core.records import Arrivals, CostRecord, Energy, LoadRecord, Process
from eval.cost.meters import BELOW
from eval.stats.crossed import cluster_bounds
from eval.stats.quantiles import largest_bounds, percentile_bounds, requests_needed
from eval.stats.queueing import knee, outcome
from eval.stats.ratios import Share, ratio_bounds

Array = NDArray[np.float64]
PERCENTILES = [f"{phase}_p{q}" for phase in ("prefill", "decode") for q in (50, 95, 99)]
BATCHED = [f"{phase}_p{q}" for phase in ("prefill", "decode") for q in (50, 95)]
SIZES = ("peak_memory", "device_memory")  # of which the largest of all processes is told
MIB = UNITS["MiB"]
LEVEL = 0.05  # of the bounds that are shown here; the gate takes the budget's alpha
NEVER = float("inf")  # the latency of what was not served


class Percentile(NamedTuple):
    """A percentile of the times of one phase at one batch size."""

    field: str
    q: float
    batch: int

    def values(self, process: Process) -> Array:
        """Timed values in ms."""
        timings = {1: process, **{batched.batch_size: batched for batched in process.batches}}[self.batch]
        return np.asarray(getattr(timings, self.field), float)


def parse_percentile(name: str) -> Percentile | None:
    """`decode_p95` is at batch 1, `decode_p95_batch8` at batch 8."""
    match = re.fullmatch(r"(prefill|decode)_p(\d\d)(?:_batch(\d+))?", name)
    return Percentile(f"{match[1]}_ms", int(match[2]) / 100, int(match[3] or 1)) if match else None


def tokens_per_s(process: Process, new_tokens: int, batch: int) -> float:
    """Generated tokens per second of service, back to back, prompts included."""
    steps, prefill = (Percentile(field, 0.5, batch).values(process) for field in ("decode_ms", "prefill_ms"))
    return len(prefill) * new_tokens * batch / (steps.sum() + prefill.sum()) * 1e3


def list_quantities(records: list[CostRecord]) -> list[str]:
    """Every quantity that these records hold."""
    runs = [process for record in records for process in record.processes]
    decodes = all(run.decode_ms for run in runs)  # a classifier does not
    timed = [name for name in PERCENTILES if decodes or not name.startswith("decode")]
    batched = [name for name in BATCHED if name in timed]
    quantities = [*timed, "peak_memory", "disk", "load_time", "tokens_per_s"]
    if all(run.device_memory_bytes is not None for run in runs):
        quantities.append("device_memory")
    if all(has_meter(run.energy) for run in runs):
        quantities.append("energy")
    sizes = [{batched.batch_size for batched in run.batches} for run in runs]
    for size in sorted(set.intersection(*sizes)):
        quantities += [f"{name}_batch{size}" for name in (*batched, "tokens_per_s")]
    return quantities


def has_meter(energy: Energy | None) -> bool:
    """There was a meter, whether or not it ticked meanwhile."""
    return energy is not None and (energy.joules is not None or energy.meter.endswith(BELOW))


def values_per_process(records: list[CostRecord], name: str) -> Array:
    """One value per process, in the unit of its number."""
    return np.asarray(
        [_value_of_process(record, run, name) for record in records for run in record.processes]
    )


def _value_of_process(record: CostRecord, process: Process, name: str) -> float:
    if percentile := parse_percentile(name):
        return float(np.quantile(percentile.values(process), percentile.q))
    if name.startswith("tokens_per_s"):
        return tokens_per_s(process, record.new_tokens, int(name.partition("_batch")[2] or 1))
    if name == "energy":
        spent = process.energy
        return math.nan if spent is None or spent.joules is None else spent.joules / spent.tokens
    if name == "device_memory":
        assert process.device_memory_bytes is not None
        return process.device_memory_bytes / MIB
    return {
        "peak_memory": process.peak_memory_bytes / MIB,
        "disk": record.disk_bytes / MIB,
        "load_time": process.load_s,
    }[name]


def estimate_quantity(records: list[CostRecord], name: str, alpha: float) -> Number:
    """One quantity of a variant with one-sided bounds at `alpha`."""
    if percentile := parse_percentile(name):
        runs = [run for record in records for run in record.processes]
        times = [percentile.values(run) for run in runs]
        requests = sum(len(percentile._replace(field="prefill_ms").values(run)) for run in runs)
        return percentile_number(times, percentile.q, alpha, sum(map(len, times)) // requests)
    values = values_per_process(records, name)
    if name in (*SIZES, "disk"):
        return _size_number(values, name, alpha)
    unit = {"energy": "J/token", "load_time": "s"}.get(name, "tokens/s")
    if np.isnan(values).any():  # a meter that did not tick
        nothing: dict[str, None] = dict.fromkeys(("value", "lower", "upper"))
        return Number(**nothing, unit="J/token", requests=len(values), processes=len(values))
    return mean_number(values, unit, alpha)


def percentile_number(processes: list[Array], q: float, alpha: float, each: int = 1) -> Number:
    """A percentile in ms; no value from too few requests, or where too many never ended (infinite).

    Args:
        each: values that one request gave: the tokens of a slow one are slow together.
    """
    pooled = np.concatenate(processes)
    low = high = value = None
    if ended := bool(np.isfinite([np.quantile(x, q, method="higher") for x in processes]).all()):
        low, high = percentile_bounds(processes, q, alpha, each)
        high = high if high is not None and np.isfinite(high) else None  # beyond what was served
    needs, requests = requests_needed(q, alpha), len(pooled) // each
    if ended and requests >= needs:
        value = float(np.quantile(pooled, q))
    return Number(
        value=value,
        lower=low,
        upper=high,
        unit="ms",
        requests=requests,
        processes=len(processes),
        needs=needs if requests < needs else None,
    )


def mean_number(values: Array, unit: str, alpha: float, requests: int | None = None) -> Number:
    """The mean over processes with t bounds, not below 0."""
    bounds = cluster_bounds(values, alpha)
    low, high = (max(bounds[0], 0.0), bounds[1]) if bounds else (None, None)
    facts = {"value": float(values.mean()), "lower": low, "upper": high, "unit": unit}
    return Number.model_validate(
        {**facts, "requests": len(values) if requests is None else requests, "processes": len(values)}
    )


def _size_number(values: Array, name: str, alpha: float) -> Number:
    """Largest value seen, with bounds of the largest of as many processes; bytes on disk are counted."""
    largest = float(values.max())
    low, high = (largest, largest) if name == "disk" else largest_bounds(values, alpha) or (None, None)
    requests = 1 if name == "disk" else len(values)
    return Number(value=largest, lower=low, upper=high, unit="MiB", requests=requests, processes=len(values))


def first_mismatch(
    records: list[CostRecord] | list[LoadRecord], other: list[CostRecord] | list[LoadRecord]
) -> tuple[str, object, object] | None:
    """The first thing for which two sets of records cannot be compared round by round."""

    def facts(records: list[CostRecord] | list[LoadRecord]) -> dict[str, object]:
        return {
            "host": sorted({r.provenance.machine.host for r in records}),
            "device": sorted({r.provenance.machine.device for r in records}),
            "seeds": [r.seed for r in records],
            "rounds of": [r.provenance.time for r in records],
            "threads": sorted({r.threads for r in records}),
            "prompts": sorted({r.prompts for r in records}),
            "prompt tokens": sorted({r.prompt_tokens for r in records}),
            "new tokens": sorted({r.new_tokens for r in records}),
            "processes": [len(r.processes) for r in records],
        }

    ours, theirs = facts(records), facts(other)
    return next(((name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]), None)


def estimate_ratio(
    records: list[CostRecord], other: list[CostRecord], name: str, alpha: float
) -> Share | None:
    """Ratio of two variants over paired rounds; None where they cannot be compared.

    Of sizes it is that of the largest, as these are told; bytes on disk are counted, so that the bounds are
    the ratio itself. A p95 or p99 of all processes has no bound of its ratio: the mean of the processes' own
    percentiles is another figure.
    """
    percentile = parse_percentile(name)
    if first_mismatch(records, other) or (percentile and percentile.q > 0.5):
        return None
    values, reference = values_per_process(records, name), values_per_process(other, name)
    if name == "disk":
        share = float(values.max() / reference.max())
        return Share(share, share, share)
    as_told = name in SIZES and records is not other  # a variant is as large as itself
    return positive_ratio(values, reference, alpha, largest_ratio if as_told else ratio_bounds)


def largest_ratio(values: Array, reference: Array, alpha: float) -> Share | None:
    """Ratio of the largest of S values to the largest of S others, with bounds each at level `alpha`.

    They hold for the largest of as many processes anew, of either: its bounds (`largest_bounds`) at alpha / 2
    each (Bonferroni). The rounds need not be paired. None of one value.
    """
    bounds = [largest_bounds(x, alpha / 2) for x in (values, reference)]
    if bounds[0] is None or bounds[1] is None:
        return None
    (low, high), (least, most) = bounds[0], bounds[1]
    return Share(float(np.max(values) / np.max(reference)), low / most, high / least)


def positive_ratio(
    values: Array,
    reference: Array,
    alpha: float,
    bounds: Callable[[Array, Array, float], Share | None] = ratio_bounds,
) -> Share | None:
    """None where a zero, or what a meter did not see, has no logarithm."""
    if not min(values.min(), reference.min()) > 0:
        return None
    return bounds(values, reference, alpha)


def estimate_knees(records: list[LoadRecord]) -> Array:
    """Requests per second, one value per process: each has its own times of service, and its own arrivals.

    Those of a round are the same for every variant, so that their chance cancels from a ratio; over the
    rounds it is in the bound.
    """
    return np.asarray([_estimate_knee(record, i) for record in records for i in range(len(record.processes))])


def _estimate_knee(record: LoadRecord, turn: int) -> float:
    slo = None if record.slo_ms is None else record.slo_ms / 1e3
    return knee(np.asarray(record.processes[turn].service_ms) / 1e3, slo, (record.seed, turn))


def load_number(records: list[LoadRecord], knees: Array, name: str, alpha: float) -> Number:
    """The `knee`, or the `throughput` there in generated tokens, from the knees of all processes."""
    requests = sum(len(server.service_ms) for record in records for server in record.processes)
    if name == "throughput":
        return mean_number(knees * records[0].new_tokens, "tokens/s", alpha, requests)
    return mean_number(knees, "requests/s", alpha, requests)


def summarize_load(records: list[LoadRecord], alpha: float) -> Load:
    """What a variant can serve on a target, pooled over its records."""
    knees, new_tokens = estimate_knees(records), records[0].new_tokens
    runs: dict[float, list[Run]] = {}
    for server in (server for record in records for server in record.processes):
        for arrivals in server.rates:
            runs.setdefault(arrivals.rate, []).append(Run(arrivals, np.asarray(server.service_ms) / 1e3))
    return Load(
        knee_rps=load_number(records, knees, "knee", alpha),
        knee_tokens_per_s=load_number(records, knees, "throughput", alpha),
        slo_ms=records[0].slo_ms,
        seconds=records[0].seconds,
        rates=[_rate(rate, runs[rate], new_tokens, alpha) for rate in sorted(runs)],
    )


class Run(NamedTuple):
    """Requests at one rate, and the times in s in which their server served others back to back."""

    arrivals: Arrivals
    services: Array


def _rate(rate: float, runs: list[Run], new_tokens: int, alpha: float) -> Rate:
    outcomes = [
        outcome(run.arrival_s, np.asarray(run.done_ms) / 1e3, services, rate) for run, services in runs
    ]
    first, done = ([_padded(getattr(run, name), run) for run, _ in runs] for name in ("first_ms", "done_ms"))
    per_second = np.asarray([result.throughput for result in outcomes])
    return Rate(
        rate=rate,
        offered_rps=mean_number(np.asarray([result.offered for result in outcomes]), "requests/s", alpha),
        throughput_rps=mean_number(per_second, "requests/s", alpha),
        throughput_tokens_per_s=mean_number(per_second * new_tokens, "tokens/s", alpha),
        ttft_p95=percentile_number(first, 0.95, alpha),
        p50=percentile_number(done, 0.50, alpha),
        p95=percentile_number(done, 0.95, alpha),
        p99=percentile_number(done, 0.99, alpha),
        follows=sum(result.follows for result in outcomes),
    )


def _padded(latencies: list[float], run: Arrivals) -> Array:
    """[n] ms: what was never served took forever."""
    return np.asarray([*latencies, *[NEVER] * (len(run.arrival_s) - len(latencies))])


def format_number(number: Number) -> str:
    """A figure, and its upper bound on a second line; what it would take where there is none."""
    if number.value is None:
        return f"needs {number.needs}" if number.needs else "never"
    bound = number.upper is not None and number.upper != number.value
    return f"{number.value:.4g}" + (f"\n≤ {number.upper:.4g}" if bound else "")
