"""The gate's cost part: what was measured on a target, held against the budget's limits there."""

import shlex
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.budget import UNITS, Limit, Quantity, Target
from eval.evidence import Evidence
from eval.records import PLAIN, Measured
from eval.statistics import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    Share,
    Verdict,
    cluster_bounds,
    percentile_bounds,
    ratio_bounds,
    requests_needed,
)
from eval.verdict import Number, Part, Relative

PERCENTILES: dict[Quantity, tuple[str, float]] = {
    "prefill_p50": ("prefill_ms", 0.50),
    "prefill_p95": ("prefill_ms", 0.95),
    "prefill_p99": ("prefill_ms", 0.99),
    "decode_p50": ("decode_ms", 0.50),
    "decode_p95": ("decode_ms", 0.95),
    "decode_p99": ("decode_ms", 0.99),
}
QUANTITIES: list[Quantity] = [*PERCENTILES, "peak_memory", "disk"]
MIB = UNITS["MiB"]


def command(folder: Path, target: str) -> str:
    return f"python -m eval.cost --study {shlex.quote(str(folder))} --target {target}"


def _latencies(records: list[Measured], name: Quantity) -> list[NDArray[np.float64]]:
    """Timed values in ms of every process, in the order of seeds and rounds."""
    field, _ = PERCENTILES[name]
    return [np.asarray(getattr(p, field), float) for record in records for p in record.processes]


def _summary(records: list[Measured], name: Quantity) -> NDArray[np.float64]:
    """One value per process: its percentile in ms, its peak or the disk size in MiB."""
    if name in PERCENTILES:
        return np.asarray([np.quantile(x, PERCENTILES[name][1]) for x in _latencies(records, name)])
    if name == "peak_memory":
        return np.asarray([p.peak_memory_bytes / MIB for record in records for p in record.processes])
    return np.asarray([record.disk_bytes / MIB for record in records for _ in record.processes])


def _percentile(records: list[Measured], name: Quantity, alpha: float) -> Number:
    processes, q = _latencies(records, name), PERCENTILES[name][1]
    pooled = np.concatenate(processes)
    low, high = percentile_bounds(processes, q, alpha)
    enough = len(pooled) >= (needs := requests_needed(q, alpha))
    return Number(
        value=float(np.quantile(pooled, q)) if enough else None,
        lower=low,
        upper=high,
        unit="ms",
        requests=len(pooled),
        processes=len(processes),
        needs=None if enough else needs,
    )


def _size(records: list[Measured], name: Quantity, alpha: float) -> Number:
    """Largest value seen; bytes on disk are counted, not sampled."""
    values = _summary(records, name)
    low = high = largest = float(values.max())
    if name == "peak_memory" and (bounds := cluster_bounds(values, alpha)):
        low, high = bounds[0], max(largest, bounds[1])
    requests = 1 if name == "disk" else len(values)
    return Number(value=largest, lower=low, upper=high, unit="MiB", requests=requests, processes=len(values))


def difference(a: list[Measured], b: list[Measured]) -> tuple[str, object, object] | None:
    """The first thing for which two sets of records cannot be compared round by round."""

    def facts(records: list[Measured]) -> dict[str, object]:
        return {
            "host": sorted({r.provenance.machine.host for r in records}),
            "device": sorted({r.provenance.machine.device for r in records}),
            "seeds": [r.seed for r in records],
            "rounds of": [r.provenance.time for r in records],
            "threads": sorted({r.threads for r in records}),
            "prompt tokens": sorted({r.prompt_tokens for r in records}),
            "new tokens": sorted({r.new_tokens for r in records}),
            "processes": [len(r.processes) for r in records],
        }

    ours, theirs = facts(a), facts(b)
    return next(((name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]), None)


def ratio(records: list[Measured], other: list[Measured], name: Quantity, alpha: float) -> Share | None:
    """Ratio of two variants over paired rounds; None where they cannot be compared."""
    if difference(records, other):
        return None
    return ratio_bounds(_summary(records, name), _summary(other, name), alpha)


def costs(e: Evidence, target: str, recipe: str, limits: Target, alpha: float) -> dict[str, Number] | None:
    """Every quantity of one variant on one target, relative to the variant of its limit or to `plain`."""
    records = e.costs.get((target, recipe))
    if records is None:
        return None
    found: dict[str, Number] = {}
    for name in QUANTITIES:
        measure = _percentile if name in PERCENTILES else _size
        number = measure(records, name, alpha)
        limit = limits.limits.get(name)
        of = limit.of if limit and limit.of else PLAIN
        share = ratio(records, e.costs.get((target, of), []), name, alpha)
        if share and number.value is not None:
            relative = Relative(point=share.point, lower=share.low, upper=share.high, of=of)
            number = number.model_copy(update={"relative": relative})
        found[name] = number
    return found


def _against(number: Number, limit: Limit) -> tuple[float | None, float | None, float | None, float, str]:
    """Value, bounds, limit and unit in which a limit is held."""
    if limit.of is not None:
        r = number.relative
        found = (r.point, r.lower, r.upper) if r else (None, None, None)
        return *found, limit.at_most, f"x {limit.of}"
    unit = limit.unit
    assert unit is not None
    scale = UNITS[number.unit] / UNITS[unit]
    values = [None if v is None else v * scale for v in (number.value, number.lower, number.upper)]
    return values[0], values[1], values[2], limit.at_most, unit


def _limit_part(name: str, number: Number, limit: Limit) -> Part:
    value, low, high, most, unit = _against(number, limit)
    verdict: Verdict = INCONCLUSIVE
    if number.value is None and number.needs:
        reason = f"{number.requests} requests; {name} needs {number.needs} at least"
    elif low is None or high is None:
        reason = f"{name} has no bound from {number.processes} process(es)"
    elif high <= most:
        verdict, reason = PASS, f"{name} is at most {high:.4g} {unit}, the limit is {most:g}"
    elif low > most:
        verdict, reason = FAIL, f"{name} is at least {low:.4g} {unit}, the limit is {most:g}"
    else:
        reason = f"{name} lies between {low:.4g} and {high:.4g} {unit}, the limit is {most:g}"
    return Part(
        name=f"cost:{name}",
        verdict=verdict,
        estimate=value,
        low=low,
        high=high,
        limit=most,
        unit=unit,
        reason=reason,
    )


def cost_parts(e: Evidence, target: str, recipe: str, limits: Target, found: dict[str, Number]) -> list[Part]:
    """One part per limit of the target; a ratio of measurements that were not paired decides nothing."""
    parts = []
    for name, limit in limits.limits.items():
        part = _limit_part(name, found[name], limit)
        if limit.of is not None and (apart := unpaired(e, target, recipe, limit.of)):
            part = part.model_copy(update={"reason": f"{name} cannot be compared: {apart}"})
            assert part.verdict == INCONCLUSIVE
        parts.append(part)
    return parts


def unpaired(e: Evidence, target: str, recipe: str, of: str) -> str | None:
    """Why a measured variant cannot be compared with another round by round, if so."""
    others = e.costs.get((target, of))
    if others is None:
        return f"{recipe} was measured on {target}, {of} was not"
    if apart := difference(e.costs[target, recipe], others):
        what, ours, theirs = apart
        return f"{recipe} has {what} {ours}, {of} has {theirs}"
    return None


def remedy(e: Evidence, target: str, recipe: str, limits: Target) -> str | None:
    """The command that measures what the limits of a target lack for a variant, if anything."""
    others = [limit.of for limit in limits.limits.values() if limit.of is not None]
    missing = (target, recipe) not in e.costs
    return (
        command(e.folder, target)
        if missing or any(unpaired(e, target, recipe, of) for of in others)
        else None
    )


def expected(e: Evidence, target: Target, recipe: str) -> bool:
    """Where a cost should be known: every engine runs on a CPU, elsewhere that of the plain student does."""
    return target.device == "cpu" or e.engines[recipe] == e.engines[PLAIN]
