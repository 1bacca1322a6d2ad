"""`python -m eval.cost --study runs/X [--target cpu] [--recipe NAME ...]`: what variants cost on a target.

Each measurement is a fresh process (`eval.cost.worker`), alone while it measures; this one sleeps meanwhile.
Processes run in rounds, one of every variant in each, so that a ratio to a named variant is taken within a
round, in one state of the machine. A variant is done when its record is of the same bytes and study and was
taken in the same rounds as that of the plain student: what was half measured is measured again. The fallback
and, where it can run here, the teacher with its method are measured beside them.

On a machine without the run folder: `python -m eval.cost --target gpu --device cuda --variant FOLDER ...
[--record FILE]`. Its records are joined with the run's by `python -m eval.cost.merge`.
"""

import math
from statistics import median

from rich.table import Column, Table

from eval.core.commands import stamp_line
from eval.core.errors import entry
from eval.core.records import CostRecord, Process, read_costs
from eval.cost.plan import CostPlan, measure_from_command
from eval.cost.rounds import make_order, run_in_rounds


def measure_together(plan: CostPlan) -> list[CostRecord]:
    """The records of all variants of the plan, which share one time."""
    answers = run_in_rounds("cost", plan, plan.cost.processes, lambda variant, _: make_order(plan, variant))
    source = plan.provenance()
    return [
        CostRecord(
            **plan.facts(variant, source),
            disk_bytes=variant.bytes,
            processes=[a.process for a in answers[variant.label] if a.process],
        )
        for variant in plan.variants
    ]


def format_energy(runs: list[Process]) -> str:
    """Energy in J per generated token over all processes; a dash without a meter."""
    metered = [run.energy for run in runs if run.energy is not None and run.energy.joules is not None]
    if not metered:
        return "\N{EN DASH}"
    return f"{sum(e.joules or 0.0 for e in metered) / sum(e.tokens for e in metered):.3g}"


def _figure(value: float) -> str:
    return "\N{EN DASH}" if math.isnan(value) else f"{value:.2f}"


def build_table(plan: CostPlan, records: list[CostRecord]) -> Table:
    """Medians over all processes; the gate holds upper bounds against the limits, not these."""
    titles = ["prefill ms", "decode ms/token", "peak MiB", "disk MiB", "load s", "J/token"]
    costs = Table(Column("variant", no_wrap=True), "engine", *titles)
    costs.title = f"cost on {plan.target}, medians, batch 1"
    for variant, record in zip(plan.variants, records, strict=True):
        runs = record.processes
        figures = (
            median(ms for run in runs for ms in run.prefill_ms),
            median([ms for run in runs for ms in run.decode_ms] or [math.nan]),
            median(run.peak_memory_bytes for run in runs) / 2**20,
            record.disk_bytes / 2**20,
            median(run.load_s for run in runs),
        )
        costs.add_row(variant.name, record.engine, *(_figure(f) for f in figures), format_energy(runs))
    meters = {run.energy.meter for r in records for run in r.processes if run.energy is not None}
    costs.caption = "; ".join([*sorted(meters), stamp_line("measured")])
    return costs


@entry
def main() -> None:
    measure_from_command(
        __doc__, "cost.jsonl", read=read_costs, measure=measure_together, build_table=build_table
    )


if __name__ == "__main__":
    main()
