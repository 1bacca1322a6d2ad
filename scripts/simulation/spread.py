"""How far apart are the processes and the requests of real cost records? For the tails of `simulate_gate`.

    python -m scripts.simulation.spread --study runs/default

Standard deviations of the logarithm of a latency: between processes, what their means differ by beyond what
the requests of each explain, sqrt(max(0, Var(means) - mean(Var within / n))), and within a process. A
request of decoding is the mean of its tokens.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from eval.core.commands import new_console, new_parser, study_from_command, write_json
from eval.core.errors import UserError, entry
from eval.core.records import CostRecord, read_costs
from scripts.simulation.parts import Array


class Spread(NamedTuple):
    between: float
    within: float


def spread_of(processes: list[Array]) -> Spread:
    """Of [n] latencies of each of two processes or more."""
    logs = [np.log(latencies) for latencies in processes]
    means = np.array([x.mean() for x in logs])
    variances = np.array([x.var(ddof=1) for x in logs])
    explained = np.mean(variances / [len(x) for x in logs])
    return Spread(float(np.sqrt(max(0.0, means.var(ddof=1) - explained))), float(np.sqrt(variances.mean())))


def latencies_of(record: CostRecord) -> dict[str, list[Array]]:
    """Phase -> [n] milliseconds of the requests of each process."""
    prefill = [np.asarray(process.prefill_ms) for process in record.processes]
    decode = [
        np.asarray(process.decode_ms).reshape(len(process.prefill_ms), -1).mean(1)
        for process in record.processes
        if process.decode_ms
    ]
    return {"prefill": prefill} | ({"decode": decode} if decode else {})


def spreads_of(run: Path) -> dict[str, list[Spread]]:
    """Phase -> the spread of every model that was measured by two processes or more."""
    spreads: dict[str, list[Spread]] = {}
    for record in read_costs(run):
        for phase, processes in latencies_of(record).items():
            if len(processes) > 1:
                spreads.setdefault(phase, []).append(spread_of(processes))
    if not spreads:
        raise UserError(f"run {run}", "no model was measured by two processes", "run python -m eval.cost")
    return spreads


@entry
def main() -> None:
    study, args = study_from_command(new_parser(__doc__), trained=False, measures=True)  # reads alone: no log
    spreads = spreads_of(study.folder)
    for phase, of_models in spreads.items():
        between, within = np.array(of_models).T
        new_console().print(
            f"{phase}, {len(between)} models: between processes {np.median(between):.3f} (median), "
            f"{between.max():.3f} (largest); requests of one {np.median(within):.3f} (median)",
            soft_wrap=True,
        )
    write_json(args.json, {phase: [one._asdict() for one in some] for phase, some in spreads.items()})


if __name__ == "__main__":
    main()
