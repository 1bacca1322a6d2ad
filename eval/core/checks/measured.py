"""Was a cost or load measured as the study asks, on such a device, and by processes that all ran?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.core.budget import Target
from eval.core.errors import UserError
from eval.core.records import (
    Batched,
    CostRecord,
    LoadRecord,
    Process,
    Server,
    TargetRecord,
    record_path,
)
from eval.core.records.measured import LEAST_SERVED
from eval.core.sections import Cost, Load
from eval.stats.queueing import poisson

BUSY = 0.5  # share of a load's seconds that its requests back to back take at least, pauses left out


def different_settings(record: CostRecord | LoadRecord, cost: Cost) -> dict[str, tuple[Any, Any]]:
    """Setting -> (as the record was measured, as the study asks), for those that differ in any process."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(record, name), getattr(cost, name))
        for name in ("prompt_tokens", "new_tokens", "threads")
    }
    pairs["warmup"] = "unknown" if record.warmup is None else record.warmup, cost.warmup
    pairs["processes"] = len(record.processes), cost.processes
    if isinstance(record, CostRecord):
        processes = record.processes
        timed: list[Process | Batched] = [*processes]
        timed += [batched for process in processes for batched in process.batches]
        sizes = [[1, *(batched.batch_size for batched in process.batches)] for process in processes]
        pairs["batch_sizes"] = _first_different(sizes, cost.batch_sizes)
        pairs["requests"] = _first_different([len(t.prefill_ms) for t in timed], cost.requests)
        steps = cost.requests * (cost.new_tokens - 1)
        pairs["number of decode steps"] = _first_different([len(t.decode_ms) for t in timed], steps)
        tokens = [
            (energy.tokens, cost.requests * size * cost.new_tokens)
            for t in timed
            if (energy := t.energy) is not None
            for size in [t.batch_size if isinstance(t, Batched) else 1]
        ]
        pairs["energy.tokens"] = next((pair for pair in tokens if pair[0] != pair[1]), (0, 0))
    else:
        load = cost.load or Load()
        pairs |= {"seconds": (record.seconds, load.seconds), "slo_ms": (record.slo_ms, load.slo_ms)}
        if load.rates is not None:
            rates = [[arrivals.rate for arrivals in server.rates] for server in record.processes]
            pairs["rates"] = _first_different(rates, load.rates)
        arrived = [
            (len(one.arrival_s), len(poisson(one.rate, record.seconds, (turn, place))))
            for turn, server in enumerate(record.processes)
            for place, one in enumerate(server.rates)
        ]
        pairs["number of arrivals"] = next((pair for pair in arrived if pair[0] != pair[1]), (0, 0))
        served = min(len(server.service_ms) for server in record.processes)
        pairs["requests back to back"] = served, max(served, LEAST_SERVED)
        seconds = min(sum(server.service_ms) for server in record.processes) / 1e3
        pairs["seconds back to back"] = seconds, max(seconds, BUSY * record.seconds)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _first_different(measured: list[Any], expected: Any) -> tuple[Any, Any]:
    """The first of the values that is not the expected one, or that itself; and the expected one."""
    return next((value for value in measured if value != expected), expected), expected


def check_device(record: TargetRecord, target: Target, place: str) -> None:
    """The record was measured on such a device as the target is."""
    device = record.provenance.machine.device
    if (target.device == "cpu") != (device == "cpu"):
        problem = f"measured on {device!r}, the target {record.target!r} is {target.device!r}"
        raise UserError(place, problem, "measure again on such a device")


def check_processes_differ(folder: Path, records: Sequence[CostRecord | LoadRecord]) -> None:
    """Copies of one process would count as processes and make every bound too narrow.

    A clock of nanoseconds gives no two processes the same list of times, whatever their order. Counted
    quantities, such as bytes, and what a meter says may well be the same.

    Args:
        records: of one variant on one target.
    """
    seen: dict[tuple[str, tuple[float, ...]], str] = {}
    for record in records:
        path = record_path(folder, record)
        processes: Sequence[Process | Server] = record.processes
        for number, process in enumerate(processes, start=1):
            here = f"process {number} of {path.name}"
            for name, times in process.timed:
                other = seen.setdefault((name, tuple(sorted(times))), here)
                if len(times) > 1 and other != here:
                    problem = f"process {number} has the {name} of {other}"
                    fix = "measure again: copies are no evidence about processes"
                    raise UserError(f"record {path}", problem, fix)
