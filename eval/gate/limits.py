"""The gate's cost part: what was measured on a target, held against the budget's limits there."""

import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.budget import AT_LOAD, UNITS, Limit, Quantity, Target
from eval.core.checks import FALLBACK, teacher_folder
from eval.core.gate_file import Load, Number, Part, Reference, Relative
from eval.core.records import PLAIN
from eval.cost.estimates import (
    estimate_knees,
    estimate_quantity,
    estimate_ratio,
    first_mismatch,
    list_quantities,
    load_number,
    positive_ratio,
    summarize_load,
)
from eval.gate.evidence import REFERENCES, Evidence
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict, t_quantile
from eval.stats.ratios import Share

SAVED = ("prefill_p50", "decode_p50", "peak_memory", "disk", "energy")  # what a pick may save of a reference
MOST_PROCESSES = 100
LEAST_LEVEL = 1e-6  # smaller p-values are told as this


def measure_command(folder: Path, target: str, device: str = "cpu", what: str = "cost") -> str:
    """What to run, and where if not on any machine; a shell takes the whole line."""
    run = f"absorb {what} --study {shlex.quote(str(folder))} --target {target}"
    if device == "cpu":
        return run
    join = f"absorb merge --study {shlex.quote(str(folder))} COPY"
    return f"{run}  # where there is a CUDA device, on a copy of the run folder; then here: {join}"


def measured_load(evidence: Evidence, target: str, recipe: str, alpha: float) -> Load | None:
    """What was measured of a variant under load, if anything was."""
    records = evidence.loads.get((target, recipe))
    return summarize_load(records, alpha) if records else None


def _with_ratio(number: Number, share: Share | None, of: str) -> Number:
    if share is None or number.value is None:
        return number
    relative = Relative(point=share.point, lower=share.low, upper=share.high, of=of)
    return number.model_copy(update={"relative": relative})


def variant_costs(
    evidence: Evidence, target: str, recipe: str, limits: Target, alpha: float
) -> dict[str, Number] | None:
    """Every quantity of one variant on one target, relative to the variant of its limit or to `plain`."""
    records = evidence.costs.get((target, recipe))
    if records is None:
        return None
    of = {str(name): limit.of for name, limit in limits.limits.items() if limit.of}
    names = [*list_quantities(records), *(AT_LOAD if (target, recipe) in evidence.loads else ())]
    return {name: quantity_at(evidence, target, recipe, name, of.get(name, PLAIN))(alpha) for name in names}


def reference_costs(
    evidence: Evidence, targets: dict[str, Target], picks: dict[str, str | None], alpha: float
) -> list[Reference]:
    """The teacher and the fallback where variants were measured, with the pick as a share of each."""
    references = []
    for target, arm in product(dict.fromkeys(target for target, _ in evidence.costs), REFERENCES):
        records = evidence.references.get((target, arm), [])
        plain, pick = (
            evidence.costs.get((target, recipe or ""), []) for recipe in (PLAIN, picks.get(target))
        )
        cost = {
            name: _with_ratio(
                estimate_quantity(records, name, alpha), estimate_ratio(records, plain, name, alpha), PLAIN
            )
            for name in (list_quantities(records) if records else [])
        }
        shares = {
            name: share
            for name in SAVED
            if name in cost and pick and (share := estimate_ratio(pick, records, name, alpha))
        }
        how = None if records else how_to_measure(evidence, target, arm, targets[target].device)
        references.append(
            Reference(
                arm=arm,
                target=target,
                cost=cost or None,
                pick={
                    name: Relative(point=s.point, lower=s.low, upper=s.high, of=arm)
                    for name, s in shares.items()
                },
                how=how,
            )
        )
    return references


def how_to_measure(evidence: Evidence, target: str, arm: str, device: str) -> str | None:
    """The command that measures a reference; None for a teacher that no engine can run by itself."""
    seed = evidence.study.seeds[0]
    manifest = teacher_folder(evidence.folder, arm, seed) / MANIFEST
    runs = arm == FALLBACK or (manifest.is_file() and "engine" in read_manifest(manifest.parent).facts)
    return measure_command(evidence.folder, target, device) if runs else None


def quantity_at(
    evidence: Evidence, target: str, recipe: str, name: str, of: str
) -> Callable[[float], Number]:
    """Level -> one quantity of a variant with bounds at it, and its ratio to that of the variant `of`."""
    if name in AT_LOAD:
        ours, theirs = evidence.loads[target, recipe], evidence.loads.get((target, of), [])
        knees = estimate_knees(ours)
        others = None if first_mismatch(ours, theirs) else estimate_knees(theirs)

        def at_load(alpha: float) -> Number:
            share = None if others is None else positive_ratio(knees, others, alpha)
            return _with_ratio(load_number(ours, knees, name, alpha), share, of)

        return at_load
    records, other = evidence.costs[target, recipe], evidence.costs.get((target, of), [])
    comparable = not other or name in list_quantities(other)

    def at_rest(alpha: float) -> Number:
        share = estimate_ratio(records, other, name, alpha) if comparable else None
        return _with_ratio(estimate_quantity(records, name, alpha), share, of)

    return at_rest


def _in_unit_of(number: Number, limit: Limit) -> tuple[float | None, float | None, float | None, str]:
    """Value, bounds and unit in which a limit is held."""
    if limit.of is not None:
        relative = number.relative
        bounds = (relative.point, relative.lower, relative.upper) if relative else (None, None, None)
        return *bounds, f"x {limit.of}"
    unit = limit.unit
    assert unit is not None
    scale = UNITS[number.unit] / UNITS[unit]
    value, low, high = (None if v is None else v * scale for v in (number.value, number.lower, number.upper))
    return value, low, high, unit


def least_level(quantity: Callable[[float], Number], limit: Limit) -> float:
    """The p-value of "it is within the limit": the least level, to 0.1 %, at which a bound lies beyond it.

    0.5 stands for that and for all above it.
    """

    def fails(alpha: float) -> bool:
        _, low, high, _ = _in_unit_of(quantity(alpha), limit)
        if limit.at_least is not None:
            return high is not None and high < limit.value
        return low is not None and low > limit.value

    least, most = np.log(LEAST_LEVEL), np.log(0.5)
    if not fails(0.5):
        return 0.5
    for _ in range(14):
        middle = (least + most) / 2
        least, most = (least, middle) if fails(float(np.exp(middle))) else (middle, most)
    return float(np.exp(most))


def _limit_part(name: str, number: Number, limit: Limit, alpha: float) -> Part:
    value, low, high, unit = _in_unit_of(number, limit)
    verdict: Verdict = INCONCLUSIVE
    bound, least = limit.value, limit.at_least is not None
    if number.value is None and number.needs:
        reason = f"{number.requests} requests; {name} needs {number.needs} at least"
    elif low is None or high is None:
        reason = f"{name} has no bound from {number.processes} process(es)"
    elif (low >= bound) if least else (high <= bound):
        verdict = PASS
        held = f"at least {low:.4g}" if least else f"at most {high:.4g}"
        reason = f"{name} is {held} {unit}, the limit is {bound:g}"
    elif (high < bound) if least else (low > bound):
        verdict = FAIL
        held = f"at most {high:.4g}" if least else f"at least {low:.4g}"
        reason = f"{name} is {held} {unit}, the limit is {bound:g}"
    else:
        reason = f"{name} lies between {low:.4g} and {high:.4g} {unit}, the limit is {bound:g}"
    return Part(
        name=f"cost:{name}",
        verdict=verdict,
        estimate=value,
        low=low,
        high=high,
        limit=bound,
        unit=unit,
        reason=reason,
        remedy=None if verdict == PASS else remedy(number, value, high if not least else low, limit, alpha),
    )


def remedy(number: Number, value: float | None, bound: float | None, limit: Limit, alpha: float) -> str:
    """What would bring a bound within its limit: more processes where the estimate is, else less cost."""
    if value is None:
        return f"{number.needs} timed requests" if number.needs else "a figure: it had none"
    beyond = value / limit.value - 1 if limit.at_least is None else 1 - value / limit.value
    if beyond >= 0:
        how = "lower" if limit.at_least is None else "higher"
        return f"{how} by {100 * abs(1 - limit.value / value):.2g} %"
    if bound is None:
        return "two processes at least"
    sizes = np.arange(number.processes, MOST_PROCESSES + 1)
    width = t_quantile(alpha, sizes - 1) / np.sqrt(sizes)  # of a bound, as it narrows
    enough = sizes[width / width[0] * abs(bound - value) <= abs(limit.value - value)]
    if not len(enough):
        return f"an estimate further from its limit than {100 * abs(beyond):.2g} %"
    return f"about {enough[0]} processes, now {number.processes}"


def _missing_part(evidence: Evidence, target: str, recipe: str, name: Quantity, limit: Limit) -> Part:
    """A limit on what the records do not hold."""
    reason = f"{name} was not measured on {target}"
    energies = [run.energy for record in evidence.costs[target, recipe] for run in record.processes]
    if name == "energy" and (why := next((one.meter for one in energies if one), None)):
        reason += f" ({why})"
    return Part(
        name=f"cost:{name}",
        verdict=INCONCLUSIVE,
        estimate=None,
        low=None,
        high=None,
        limit=limit.value,
        unit=limit.unit or f"x {limit.of}",
        reason=reason,
        remedy="measuring it",
    )


def cost_parts(
    evidence: Evidence, target: str, recipe: str, limits: Target, costs: dict[str, Number], alpha: float
) -> list[Part]:
    """One part per limit of the target; a ratio of measurements that were not paired decides nothing."""
    parts = []
    for name, limit in limits.limits.items():
        if name not in costs or (name == "energy" and costs[name].value is None):
            parts.append(_missing_part(evidence, target, recipe, name, limit))
            continue
        part = _limit_part(name, costs[name], limit, alpha)
        if part.low != part.high:  # what was counted is no test
            quantity = quantity_at(evidence, target, recipe, name, limit.of or PLAIN)
            part = part.model_copy(update={"p_fail": least_level(quantity, limit)})
        if limit.of is not None and (why := why_unpaired(evidence, target, recipe, name, limit.of)):
            reason, cure = f"{name} cannot be compared: {why}", "measuring both in the same rounds"
            part = part.model_copy(update={"reason": reason, "remedy": cure})
            assert part.verdict == INCONCLUSIVE
        parts.append(part)
    return parts


def why_unpaired(evidence: Evidence, target: str, recipe: str, name: Quantity, of: str) -> str | None:
    """Why a measured variant cannot be compared with another round by round, if so."""
    if name in AT_LOAD:
        loads, other_loads = evidence.loads.get((target, recipe)), evidence.loads.get((target, of))
        if loads is None or other_loads is None:
            return f"{recipe} was measured under load on {target}, {of} was not"
        apart = first_mismatch(loads, other_loads)
    else:
        other_costs = evidence.costs.get((target, of))
        if other_costs is None:
            return f"{recipe} was measured on {target}, {of} was not"
        apart = first_mismatch(evidence.costs[target, recipe], other_costs)
    return f"{recipe} has {apart[0]} {apart[1]}, {of} has {apart[2]}" if apart else None


def _lacks(evidence: Evidence, target: str, recipe: str, limits: dict[Quantity, Limit]) -> bool:
    return any(
        limit.of is not None and why_unpaired(evidence, target, recipe, name, limit.of)
        for name, limit in limits.items()
    )


def commands_to_measure(evidence: Evidence, target: str, recipe: str, limits: Target) -> str | None:
    """The commands that measure what the limits of a target lack for a variant, if anything."""
    split: dict[str, dict[Quantity, Limit]] = {"cost": {}, "load": {}}
    for name, limit in limits.limits.items():
        split["load" if name in AT_LOAD else "cost"][name] = limit
    missing = []
    if (target, recipe) not in evidence.costs or _lacks(evidence, target, recipe, split["cost"]):
        missing.append("cost")
    if split["load"] and (
        (target, recipe) not in evidence.loads or _lacks(evidence, target, recipe, split["load"])
    ):
        missing.append("load")
    if not missing:
        return None
    *before, last = missing
    first = [f"{measure_command(evidence.folder, target, what=what)} && " for what in before]
    return "".join(first) + measure_command(evidence.folder, target, limits.device, last)


def is_cost_expected(evidence: Evidence, target: Target, recipe: str) -> bool:
    """Where a cost should be known: every engine runs on a CPU, elsewhere that of the plain student does."""
    return target.device == "cpu" or evidence.engines[recipe] == evidence.engines[PLAIN]
