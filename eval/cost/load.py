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

from eval.core.errors import UserError, entry
from eval.core.gate_file import Number
from eval.core.records import Loaded, Server, read_loads
from eval.core.sections import Load
from eval.cost.estimates import load_result
from eval.cost.plan import CostPlan, Variant, measure_from_command
from eval.cost.rounds import in_rounds, order_of
from eval.cost.worker import OpenLoop, Order
from eval.stats.queueing import knee

SHARES = (0.5, 0.8, 0.95, 1.1)  # of the knee, where no rates are stated
FEWEST = 10  # requests that a rate must bring on average
LEVEL = 0.05  # of the bounds that are shown here; the gate takes the budget's alpha


def settings(bench: CostPlan) -> Load:
    return bench.cost.load or Load()


def served(
    bench: CostPlan, title: str, rounds: int, rates: dict[str, list[float]]
) -> dict[str, list[Server]]:
    """Label -> one server per round, each of which meets the rates of its variant."""
    seconds = settings(bench).seconds

    def order(variant: Variant, turn: int) -> Order:
        loop = OpenLoop(rates=rates[variant.label], seconds=seconds, seed=turn)
        return order_of(bench, variant).model_copy(update={"load": loop})

    answers = in_rounds(title, bench, rounds, order)
    return {label: [a.server for a in found if a.server] for label, found in answers.items()}


def rates_of(bench: CostPlan) -> dict[str, list[float]]:
    """Label -> rates in requests per second, as stated or by the variant's knee.

    Raises:
        UserError: so few requests would arrive that nothing could be said.
    """
    load = settings(bench)
    if load.rates is not None:
        found = {v.label: load.rates for v in bench.wanted}
    else:
        pilot = served(bench, "looking for the knee", 1, {v.label: [] for v in bench.wanted})
        found = {label: shares(label, servers[0], load) for label, servers in pilot.items()}
    for label, rates in found.items():
        if min(rates) * load.seconds < FEWEST:
            thing = f"{min(rates):g} requests/s of {label}"
            fix = f"cost.load.seconds of {FEWEST / min(rates):.0f} would bring enough"
            raise UserError(thing, f"fewer than {FEWEST} requests in {load.seconds:g} s", fix)
    return found


def shares(label: str, server: Server, load: Load) -> list[float]:
    slo = None if load.slo_ms is None else load.slo_ms / 1e3
    top = knee([ms / 1e3 for ms in server.service_ms], slo)
    if top == 0:
        raise UserError(
            f"cost.load.slo_ms: {load.slo_ms:g}" if load.slo_ms else "load",
            f"{label} takes longer even without a queue",
            "state a longer one, or cost.load.rates",
        )
    return [float(f"{share * top:.3g}") for share in SHARES]


def measure_together(bench: CostPlan) -> list[Loaded]:
    """The records of all variants of the bench, which share one time."""
    load = settings(bench)
    servers = served(bench, "load", bench.cost.processes, rates_of(bench))
    source = bench.provenance()
    return [
        Loaded(
            **bench.facts(variant, source),
            seconds=load.seconds,
            slo_ms=load.slo_ms,
            processes=servers[variant.label],
        )
        for variant in bench.wanted
    ]


def shown(number: Number) -> str:
    if number.value is None:
        return f"needs {number.needs}" if number.needs else "never"
    return f"{number.value:.4g}" + (f"\n≤ {number.upper:.4g}" if number.upper is not None else "")


def table(bench: CostPlan, records: list[Loaded]) -> Table:
    """What was measured at each rate, with 95 % upper bounds below."""
    titles = ["variant", "knee/s", "rate/s", "done/s", "p50 ms", "p95 ms", "p99 ms", "follows"]
    made = Table(*(Column(title, no_wrap=True) for title in titles), box=SIMPLE, pad_edge=False)
    made.title = f"open-loop load on {bench.target}, latency from the intended arrival"
    made.caption = (
        "needs: requests without which there is no such percentile; never: too many were not served; "
        "follows: processes that kept up"
    )
    for variant, record in zip(bench.wanted, records, strict=True):
        result = load_result([record], LEVEL)
        for i, rate in enumerate(result.rates):
            first = [variant.name, f"{result.knee_rps.value:.4g}"] if i == 0 else ["", ""]
            figures = [f"{rate.rate:g}", f"{rate.throughput_rps.value:.4g}"]
            tails = [shown(number) for number in (rate.p50, rate.p95, rate.p99)]
            made.add_row(*first, *figures, *tails, f"{rate.follows}/{len(record.processes)}")
    return made


@entry
def main() -> None:
    measure_from_command(__doc__, "load.jsonl", before=read_loads, measure=measure_together, table=table)


if __name__ == "__main__":
    main()
