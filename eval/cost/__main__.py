"""`python -m eval.cost --study runs/X [--target cpu] [--recipe NAME ...]`: what variants cost on a target.

Each measurement is a fresh process (`eval.cost.worker`), alone while it measures; this one sleeps meanwhile.
Processes run in rounds, one of every variant in each, so that a ratio to a named variant is taken within a
round, in one state of the machine. A variant is done when its record is of the same bytes and study and was
taken in the same rounds as that of the plain student: what was half measured is measured again. The fallback
and, where it can run here, the teacher with its method are measured beside them.

On a machine without the run folder: `python -m eval.cost --target gpu --device cuda --variant FOLDER ...
[--record FILE]`. Its records are joined with the run's by `python -m eval.cost.merge`.
"""

from rich.box import SIMPLE
from rich.table import Column, Table

from eval.core.commands import stamp_line
from eval.core.errors import entry
from eval.core.records import CostRecord, read_costs
from eval.cost.estimates import LEVEL, estimate_quantity, format_number
from eval.cost.plan import CostPlan, measure_from_command
from eval.cost.rounds import make_order, run_in_rounds

NOTHING = "\N{EN DASH}"
COLUMNS = {
    "prefill_p50": "prefill ms",
    "decode_p50": "decode ms/token",
    "peak_memory": "peak MiB",
    "disk": "disk MiB",
    "load_time": "load s",
    "energy": "J/token",
}


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


def build_table(plan: CostPlan, records: list[CostRecord]) -> Table:
    """Medians over all processes, of the peak the largest, with 95 % upper bounds below."""
    costs = Table(Column("variant", no_wrap=True), "engine", *COLUMNS.values(), box=SIMPLE, pad_edge=False)
    costs.title = f"cost on {plan.target}, batch 1: medians, of the peak the largest"
    for variant, record in zip(plan.variants, records, strict=True):
        figures = (_figure(record, name) for name in COLUMNS)
        costs.add_row(variant.name, record.engine, *figures)
    meters = {run.energy.meter for r in records for run in r.processes if run.energy is not None}
    bound = f"\N{LESS-THAN OR EQUAL TO}: {100 * (1 - LEVEL):g} % upper bound"
    costs.caption = "; ".join([bound, *sorted(meters), stamp_line("measured")])
    return costs


def _figure(record: CostRecord, name: str) -> str:
    """A dash where there is nothing to measure: no meter, no token after the first."""
    if name == "decode_p50" and not any(run.decode_ms for run in record.processes):
        return NOTHING
    number = estimate_quantity([record], name, LEVEL)
    return NOTHING if number.value is None and not number.needs else format_number(number)


@entry
def main() -> None:
    measure_from_command(
        __doc__, "cost.jsonl", read=read_costs, measure=measure_together, build_table=build_table
    )


if __name__ == "__main__":
    main()
