"""`python -m eval.cost.load --study runs/X [--target cpu] [--recipe NAME ...]`: latency under open-loop load.

One server in a fresh process, first come first served, batch 1. Requests arrive as a Poisson process at
`cost.load.rates` for `cost.load.seconds` each, whether or not the one before is done, and are served by the
real engine in real time; latency counts from the intended arrival. Without rates, a first process that is
not counted serves requests back to back, and the rates are shares of the knee that its times of service
have by Lindley's recursion (`eval.stats.queueing`): below, near and beyond. Every process serves back to
back too, so each has a knee of its own.

Latencies within a queue follow each other (autocorrelation), so their number says little about what is
known: the processes, each with its own arrivals, are the clusters of every bound. In a round all variants
meet the same arrivals. Times of service do not depend on the rate here: nothing is batched.
"""

from rich.box import SIMPLE
from rich.table import Column, Table

from eval.core.commands import stamp_line
from eval.core.errors import UserError, entry
from eval.core.records import LoadRecord, Server, read_loads
from eval.core.sections import Load
from eval.cost.estimates import LEVEL, format_number, summarize_load
from eval.cost.orders import OpenLoop, Order
from eval.cost.plan import CostPlan, Variant, measure_from_command
from eval.cost.rounds import make_order, run_in_rounds
from eval.stats.queueing import knee

SHARES = (0.5, 0.8, 0.95, 1.1)  # of the knee, where no rates are stated
FEWEST = 200  # requests that a rate must bring on average: fewer tell no queue from a backlog


def load_settings(plan: CostPlan) -> Load:
    return plan.cost.load or Load()


def serve_in_rounds(
    plan: CostPlan, title: str, rounds: int, rates: dict[str, list[float]]
) -> dict[str, list[Server]]:
    """Label -> one server per round, each of which meets the rates of its variant."""
    seconds = load_settings(plan).seconds

    def order(variant: Variant, turn: int) -> Order:
        loop = OpenLoop(rates=rates[variant.label], seconds=seconds, seed=turn)
        return make_order(plan, variant).model_copy(update={"load": loop})

    answers = run_in_rounds(title, plan, rounds, order)
    return {label: [a.server for a in of_label if a.server] for label, of_label in answers.items()}


def choose_rates(plan: CostPlan) -> dict[str, list[float]]:
    """Label -> rates in requests per second, as stated or by the variant's knee.

    Raises:
        UserError: so few requests would arrive that no percentile is known.
    """
    load = load_settings(plan)
    if load.rates is not None:
        rates = {v.label: load.rates for v in plan.variants}
    else:
        pilot = serve_in_rounds(plan, "looking for the knee", 1, {v.label: [] for v in plan.variants})
        rates = {label: rates_from_knee(label, servers[0], load) for label, servers in pilot.items()}
    for label, values in rates.items():
        lowest = min(values)
        if lowest * load.seconds < FEWEST:
            thing = f"{lowest:g} requests/s of {label}"
            fix = f"set cost.load.seconds to {FEWEST / lowest:.0f} or more"
            raise UserError(thing, f"fewer than {FEWEST} requests would arrive in {load.seconds:g} s", fix)
    return rates


def rates_from_knee(label: str, server: Server, load: Load) -> list[float]:
    """Requests per second below, near and beyond the knee of the server."""
    slo = None if load.slo_ms is None else load.slo_ms / 1e3
    top = knee([ms / 1e3 for ms in server.service_ms], slo)
    if top == 0:
        raise UserError(
            f"cost.load.slo_ms: {load.slo_ms:g}" if load.slo_ms else "load",
            f"{label} takes longer even without a queue",
            "set a longer cost.load.slo_ms, or state cost.load.rates",
        )
    return [float(f"{share * top:.3g}") for share in SHARES]


def measure_together(plan: CostPlan) -> list[LoadRecord]:
    """The records of all variants of the plan, which share one time."""
    load = load_settings(plan)
    servers = serve_in_rounds(plan, "load", plan.cost.processes, choose_rates(plan))
    source = plan.provenance()
    return [
        LoadRecord(
            **plan.facts(variant, source),
            seconds=load.seconds,
            slo_ms=load.slo_ms,
            processes=servers[variant.label],
        )
        for variant in plan.variants
    ]


def build_table(plan: CostPlan, records: list[LoadRecord]) -> Table:
    """What was measured at each rate, with 95 % upper bounds below."""
    titles = ["variant", "knee/s", "rate/s", "done/s", "p50 ms", "p95 ms", "p99 ms", "follows"]
    results = Table(*(Column(title, no_wrap=True) for title in titles), box=SIMPLE, pad_edge=False)
    results.title = f"open-loop load on {plan.target}, latency from the intended arrival"
    results.caption = (
        "needs: requests without which there is no such percentile; never: too many were not served; "
        f"follows: processes that kept up; ≤: {100 * (1 - LEVEL):g} % upper bound; {stamp_line('measured')}"
    )
    for variant, record in zip(plan.variants, records, strict=True):
        result = summarize_load([record], LEVEL)
        for i, rate in enumerate(result.rates):
            first = [variant.name, f"{result.knee_rps.value:.4g}"] if i == 0 else ["", ""]
            figures = [f"{rate.rate:g}", f"{rate.throughput_rps.value:.4g}"]
            tails = [format_number(number) for number in (rate.p50, rate.p95, rate.p99)]
            results.add_row(*first, *figures, *tails, f"{rate.follows}/{len(record.processes)}")
    return results


@entry
def main() -> None:
    measure_from_command(
        __doc__,
        "load.jsonl",
        read=read_loads,
        measure=measure_together,
        build_table=build_table,
        teacher=False,
    )


if __name__ == "__main__":
    main()
