"""The gate's cost part: what was measured on a target, held against the budget's limits there."""

import shlex
from pathlib import Path

from eval.core.budget import AT_LOAD, UNITS, Limit, Quantity, Target
from eval.core.gate_file import Load, Number, Part, Relative
from eval.core.records import PLAIN
from eval.cost.estimates import difference, knees, load_result, names, number, positive_ratio, ratio
from eval.gate.evidence import Evidence
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Share, Verdict


def measure_command(folder: Path, target: str, device: str = "cpu", what: str = "cost") -> str:
    """What to run, and where if not on any machine; a shell takes the whole line."""
    run = f"python -m eval.{what} --study {shlex.quote(str(folder))} --target {target}"
    if device == "cpu":
        return run
    join = f"python -m eval.cost.merge --study {shlex.quote(str(folder))} COPY"
    return f"{run}  # where there is a CUDA device, on a copy of the run folder; then here: {join}"


def measured_load(e: Evidence, target: str, recipe: str, alpha: float) -> Load | None:
    """What was measured of a variant under load, if anything was."""
    records = e.loads.get((target, recipe))
    return load_result(records, alpha) if records else None


def _relative(number: Number, share: Share | None, of: str) -> Number:
    if share is None or number.value is None:
        return number
    relative = Relative(point=share.point, lower=share.low, upper=share.high, of=of)
    return number.model_copy(update={"relative": relative})


def variant_costs(
    e: Evidence, target: str, recipe: str, limits: Target, alpha: float
) -> dict[str, Number] | None:
    """Every quantity of one variant on one target, relative to the variant of its limit or to `plain`."""
    records = e.costs.get((target, recipe))
    if records is None:
        return None

    def of(name: str) -> str:
        limit = next((limit for known, limit in limits.limits.items() if known == name), None)
        return limit.of if limit and limit.of else PLAIN

    found: dict[str, Number] = {}
    for name in names(records):
        other = e.costs.get((target, of(name)), [])
        comparable = not other or name in names(other)
        share = ratio(records, other, name, alpha) if comparable else None
        found[name] = _relative(number(records, name, alpha), share, of(name))
    if load := measured_load(e, target, recipe, alpha):
        ours = e.loads[target, recipe]
        for name, value in {"knee": load.knee_rps, "throughput": load.knee_tokens_per_s}.items():
            other_loads = e.loads.get((target, of(name)), [])
            share = None
            if not difference(ours, other_loads):
                share = positive_ratio(knees(ours), knees(other_loads), alpha)
            found[name] = _relative(value, share, of(name))
    return found


def _against(number: Number, limit: Limit) -> tuple[float | None, float | None, float | None, str]:
    """Value, bounds and unit in which a limit is held."""
    if limit.of is not None:
        r = number.relative
        found = (r.point, r.lower, r.upper) if r else (None, None, None)
        return *found, f"x {limit.of}"
    unit = limit.unit
    assert unit is not None
    scale = UNITS[number.unit] / UNITS[unit]
    value, low, high = (None if v is None else v * scale for v in (number.value, number.lower, number.upper))
    return value, low, high, unit


def _limit_part(name: str, number: Number, limit: Limit) -> Part:
    value, low, high, unit = _against(number, limit)
    verdict: Verdict = INCONCLUSIVE
    asked, least = limit.value, limit.at_least is not None
    if number.value is None and number.needs:
        reason = f"{number.requests} requests; {name} needs {number.needs} at least"
    elif low is None or high is None:
        reason = f"{name} has no bound from {number.processes} process(es)"
    elif (low >= asked) if least else (high <= asked):
        verdict = PASS
        held = f"at least {low:.4g}" if least else f"at most {high:.4g}"
        reason = f"{name} is {held} {unit}, the limit is {asked:g}"
    elif (high < asked) if least else (low > asked):
        verdict = FAIL
        held = f"at most {high:.4g}" if least else f"at least {low:.4g}"
        reason = f"{name} is {held} {unit}, the limit is {asked:g}"
    else:
        reason = f"{name} lies between {low:.4g} and {high:.4g} {unit}, the limit is {asked:g}"
    return Part(
        name=f"cost:{name}",
        verdict=verdict,
        estimate=value,
        low=low,
        high=high,
        limit=asked,
        unit=unit,
        reason=reason,
    )


def _missing_part(e: Evidence, target: str, recipe: str, name: Quantity, limit: Limit) -> Part:
    """A limit on what the records do not hold."""
    reason = f"{name} was not measured on {target}"
    energies = [run.energy for record in e.costs[target, recipe] for run in record.processes]
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
    )


def cost_parts(e: Evidence, target: str, recipe: str, limits: Target, found: dict[str, Number]) -> list[Part]:
    """One part per limit of the target; a ratio of measurements that were not paired decides nothing."""
    parts = []
    for name, limit in limits.limits.items():
        if name not in found:
            parts.append(_missing_part(e, target, recipe, name, limit))
            continue
        part = _limit_part(name, found[name], limit)
        if limit.of is not None and (why := why_unpaired(e, target, recipe, name, limit.of)):
            part = part.model_copy(update={"reason": f"{name} cannot be compared: {why}"})
            assert part.verdict == INCONCLUSIVE
        parts.append(part)
    return parts


def why_unpaired(e: Evidence, target: str, recipe: str, name: Quantity, of: str) -> str | None:
    """Why a measured variant cannot be compared with another round by round, if so."""
    what: tuple[str, object, object] | None
    if name in AT_LOAD:
        ours_loaded, loads = e.loads.get((target, recipe)), e.loads.get((target, of))
        if loads is None or ours_loaded is None:
            return f"{recipe} was measured under load on {target}, {of} was not"
        what = difference(ours_loaded, loads)
    else:
        others = e.costs.get((target, of))
        if others is None:
            return f"{recipe} was measured on {target}, {of} was not"
        what = difference(e.costs[target, recipe], others)
    return f"{recipe} has {what[0]} {what[1]}, {of} has {what[2]}" if what else None


def _lacks(e: Evidence, target: str, recipe: str, limits: dict[Quantity, Limit]) -> bool:
    return any(
        limit.of is not None and why_unpaired(e, target, recipe, name, limit.of)
        for name, limit in limits.items()
    )


def commands_to_measure(e: Evidence, target: str, recipe: str, limits: Target) -> str | None:
    """The commands that measure what the limits of a target lack for a variant, if anything."""
    split: dict[str, dict[Quantity, Limit]] = {"cost": {}, "load": {}}
    for name, limit in limits.limits.items():
        split["load" if name in AT_LOAD else "cost"][name] = limit
    missing = []
    if (target, recipe) not in e.costs or _lacks(e, target, recipe, split["cost"]):
        missing.append("cost")
    if split["load"] and ((target, recipe) not in e.loads or _lacks(e, target, recipe, split["load"])):
        missing.append("load")
    if not missing:
        return None
    *before, last = missing
    first = [f"{measure_command(e.folder, target, what=what)} && " for what in before]
    return "".join(first) + measure_command(e.folder, target, limits.device, last)


def is_cost_expected(e: Evidence, target: Target, recipe: str) -> bool:
    """Where a cost should be known: every engine runs on a CPU, elsewhere that of the plain student does."""
    return target.device == "cpu" or e.engines[recipe] == e.engines[PLAIN]
