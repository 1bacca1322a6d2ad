"""gate.json in words and cells, for every table that shows it. Nothing is decided here."""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.budget import AT_LOAD
from eval.core.commands import level_text, stamp_line
from eval.core.documents import describe_data
from eval.core.gate_file import Estimate, GateFile, KeptShare, Part, Relative, Variant
from eval.core.records import VALIDATION
from eval.gate.pick import PAIRED

ARMS = {
    "B": "base, the fallback",
    "T0": "plain teacher",
    "T1": "teacher with the method",
    "CE": "student without a teacher",
    "S0": "control student, from T0",
    "S1": "student, from T1",
}
PARTS = {
    "assay": "The study sees the teacher's gain",
    "retention": "The gain over the control is kept",
    "guard": "The lead over the fallback is kept",
    "fallback": "Better than the fallback",
    "over_ce": "Better than training without a teacher",
    "cost": "The cost is known",
}
SYMBOLS = {"PASS": "✔", "FAIL": "✘", "INCONCLUSIVE": "?"}
MISSING, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
NOT_MEASURED = "not measured yet"
FOOTNOTE = (
    f"{TIMES} is the ratio to the named variant in the same rounds; of [a, b] ≤ c, b is the bound that "
    f"decides and c the limit (of ≥, a); ≤ or ≥ alone is a bound without a limit; {MISSING} stands where no "
    "honest figure could be had from what was measured."
)
REFERENCES = {"T1": "teacher T1", "B": "fallback B"}


@dataclass(frozen=True)
class Cell:
    """A figure with its notes and the verdict of its part, as text; the value and its bounds, as numbers."""

    main: str
    notes: tuple[str, ...] = ()
    verdict: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.main, ", ".join(self.notes), self.verdict) if part)


def fixed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return MISSING
    return f"{value:.{digits}f}" if math.isfinite(value) else "unbounded"


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, in plain notation unless it is very small."""
    if value is None or not math.isfinite(value):
        return fixed(value)
    if abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.9996 is 1.00
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def estimate_cell(value: Estimate | KeptShare | None, verdict: str | None = None) -> Cell:
    """A point with its interval; `undefined` where the gate could not define the point."""
    if value is None or value.point is None:
        return Cell("undefined", verdict=verdict or "")
    bounded = value.low is not None or value.high is not None
    note = f"[{fixed(value.low)}, {fixed(value.high)}]" if bounded else "no interval"
    return Cell(fixed(value.point), (note,), verdict or "", value.point, value.low, value.high)


def part_title(name: str) -> str:
    """What a part of the gate asks, in plain words."""
    kind, _, rest = name.partition(":")
    if kind == "cost" and rest:
        return f"Within the limit: {rest.replace('_', ' ')}"
    return f"{PARTS.get(kind, kind)} on the slice {rest}" if rest else PARTS.get(name, name)


def part_verdict(variant: Variant, name: str) -> str:
    return next((part.verdict for part in variant.parts if part.name == name), "")


def arm_cell(gate: GateFile, arm: str, name: str) -> Cell:
    """Bits per byte of an arm on a slice; of a rival, too, by how much it ended worse than the base there."""
    cell, harm = estimate_cell(gate.scores[arm].get(name)), gate.below_base.get(arm, {}).get(name)
    if harm is None:
        return cell
    span = f"[{fixed(harm.low)}, {fixed(harm.high)}]"
    return replace(cell, notes=(*cell.notes, f"worse than B by {fixed(harm.point)} {span}"))


def shifted(gate: GateFile) -> list[str]:
    return [name for name in gate.documents if name != VALIDATION]


def gain_text(value: Estimate, level: float) -> str:
    cell = estimate_cell(value)
    return f"{cell.main} bits/byte, {level_text(level)} interval {cell.notes[0]}" if cell.notes else cell.main


def limit_text(part: Part) -> str:
    """The figure, its bounds and the limit, in the unit of the limit; of what was counted, no bounds."""
    if part.estimate is None:
        return ""
    relative = part.unit.startswith("x ")
    unit = f"{TIMES}" if relative else f" {part.unit}"
    figure = f"{significant(part.estimate)}{unit}{part.unit[1:] if relative else ''}"
    counted = part.low == part.high and part.low is not None
    bounds = "" if counted else f"[{significant(part.low)}, {significant(part.high)}] "
    sign = "≥" if part.name.removeprefix("cost:") in AT_LOAD else "≤"
    held = f"{bounds}{sign} {part.limit:g}{unit}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{figure} {held}"


def remedy_text(variant: Variant) -> str:
    """What would make a variant pass, part by part; empty where it does."""
    wanted = [(part.name.removeprefix("cost:"), part.remedy) for part in variant.parts if part.remedy]
    return "; ".join(f"{name.replace(':', ' ').replace('_', ' ')}: {remedy}" for name, remedy in wanted)


def short_stamp(gate: GateFile) -> str:
    """When and by what was judged: for a table that others lie around."""
    tool = gate.provenance.tool or "an earlier version"
    return stamp_line("judged", gate.runs[-1].time, tool) if gate.runs else f"judged by {tool}"


def stamp(gate: GateFile) -> str:
    """The same with the budget, and how often this run was judged."""
    repeats = ", repeats not counted" if len(gate.runs) > 1 else ""
    count = f"; verdict {len(gate.runs)} of this run{repeats}" if gate.runs else ""
    return f"{short_stamp(gate)}, budget {judged_by(gate)}{count}"


def measured_on(gate: GateFile, what: str) -> str:
    """The day or days of the records of `scores`, or of costs on a target."""
    days = dict.fromkeys(map(day, gate.provenance.times.get(what, [])))
    return f"measured on {' to '.join(days)}" if days else NOT_MEASURED


def cost_stamp(gate: GateFile) -> str:
    """The same of every target on which something was measured."""
    measured = [target for target in gate.budget["targets"] if target in gate.provenance.times]
    return "; ".join(f"{target}: {measured_on(gate, target)}" for target in measured) or NOT_MEASURED


def saved_text(gate: GateFile) -> list[str]:
    """What the pick of each target costs as a share of the teacher with its method, and of the fallback."""
    lines = []
    for reference in (r for r in gate.references if r.pick and gate.recommended[r.target]):
        shares = [
            f"{ratio_text(share)} of its {name.replace('_', ' ')}" for name, share in reference.pick.items()
        ]
        pick, what = gate.recommended[reference.target], REFERENCES[reference.arm]
        lines.append(f"{pick} on {reference.target} takes, of {what}: {', '.join(shares)}")
    return lines


def judged_by(gate: GateFile) -> str:
    """The budget, and how it stands to the one that was fixed when training began."""
    name, fixed = gate.budget["name"], gate.fixed
    if fixed is None:
        return f"{name}, no budget was fixed beforehand"
    how = "another budget than the one fixed" if fixed.other else "fixed"
    return f"{name}, {how} on {day(fixed.time)}"


def remarks(gate: GateFile) -> list[str]:
    """What is too good to be true, then what the verdict is conditional on."""
    return [*(f"ANOMALOUS: {one}" for one in gate.anomalies), *(f"Note: {note}" for note in gate.notes)]


def recommended_text(gate: GateFile) -> str:
    """One clause per target: what may be shipped there."""
    clauses = []
    for target, recipe in gate.recommended.items():
        others = f" (as good: {', '.join(names)})" if (names := gate.as_good.get(target)) else ""
        clauses.append(f"{target}: {recipe or 'no variant'}{others}")
    return "; ".join(clauses)


def by_recipe(gate: GateFile) -> list[Variant]:
    """One variant per recipe and engine: quality is the same on every target."""
    first: dict[tuple[str, str], Variant] = {}
    for variant in gate.variants:
        first.setdefault((variant.recipe, variant.engine), variant)
    return list(first.values())


def select_variants(variants: Iterable[Variant], most: int) -> list[Variant]:
    """At most so many: the recommended ones, then by verdict; in the order in which they came."""
    candidates = list(variants)
    rank = {name: i for i, name in enumerate(SYMBOLS)}
    best = sorted(candidates, key=lambda v: (not v.recommended, rank[v.verdict]))[:most]
    chosen = {id(v) for v in best}
    return [v for v in candidates if id(v) in chosen]


def student_shares(gate: GateFile) -> dict[str, KeptShare]:
    """What the uncompressed student kept, by what it is held against."""
    students = gate.kept_by_student
    shares = {"student S1, over its control S0": students.over_control}
    if students.over_ce is not None:
        harm = gate.below_base.get("CE", {}).get(VALIDATION)
        spoiled = "" if harm is None else f", which ended worse than the base by {significant(harm.point, 2)}"
        shares[f"student S1, over training without a teacher (CE{spoiled})"] = students.over_ce
    return {
        **shares,
        "student S1 over the base, what a study without a control would claim": students.over_base,
    }


def comparison_rows(gate: GateFile) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of what can be told between two variants: bits per byte, and decode on each target."""
    targets = list(dict.fromkeys(target for one in gate.comparisons for target in one.decode))
    rows = []
    for one in gate.comparisons:
        ratios = [one.decode.get(target) for target in targets]
        rows.append([one.recipe, one.over, lead_text(one.lead), *map(ratio_text, ratios)])
    return ["variant", "over", "better by, bits/byte", *(f"decode p50, {t}" for t in targets)], rows


def pairs_left_out(gate: GateFile) -> str:
    """Which pairs of variants were not compared; empty where all were."""
    count = len({v.recipe for v in gate.variants})
    pairs, shown = count * (count - 1) // 2, len(gate.comparisons)
    if not gate.comparisons or shown >= pairs:
        return ""
    return f"{shown} of {pairs} pairs: all of the first {PAIRED} recipes, the later ones against plain alone"


def bounds_text(value: Estimate | None) -> str:
    """A difference in bits per byte, with its sign and bounds."""
    if value is None:
        return MISSING
    if value.low is None or value.high is None:
        return f"{value.point:+.3f}"
    return f"{value.point:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def ratio_text(ratio: Relative | None) -> str:
    if ratio is None:
        return MISSING
    return f"{significant(ratio.point)}{TIMES} [{significant(ratio.lower)}, {significant(ratio.upper)}]"


def lead_text(value: Estimate) -> str:
    """A difference of scores: small beside them, and so with more digits."""
    bounds = f" [{fixed(value.low, 4)}, {fixed(value.high, 4)}]" if value.low is not None else ""
    return f"{fixed(value.point, 4)}{bounds}"


def seed_rows(gate: GateFile) -> list[tuple[str, list[float]]]:
    """What every seed says by itself, where gate.json has it: arms, the teacher's gain, shares of it."""
    rows = [(f"{arm}, bits/byte", gate.scores[arm][VALIDATION].by_seed) for arm in ARMS if arm in gate.scores]
    rows.append(("T1 - T0, bits/byte", gate.teacher_gain.by_seed))
    rows += [(f"{v.recipe}, share of the gain retained", v.kept_share.by_seed) for v in by_recipe(gate)]
    return [(name, values) for name, values in rows if values]


def measuring_commands(gate: GateFile, folded: Collection[str] = ()) -> dict[str, str]:
    """How to measure what was not: what one command measures, and of which variants -> that command.

    Args:
        folded: targets that are told elsewhere.
    """
    recipes: dict[tuple[str, str], list[str]] = {}
    for v in gate.variants:
        if v.how and v.target not in folded:
            recipes.setdefault((v.target, v.how), []).append(v.recipe)
    commands = {f"{several(names)} on {target}": how for (target, how), names in recipes.items()}
    beside: dict[tuple[str, str], list[str]] = {}
    for recipe, quality in gate.quality.items():
        for what, how in quality.how.items():
            beside.setdefault((what, how), []).append(recipe)
    return commands | {f"{what} of {several(names)}": how for (what, how), names in beside.items()}


def several(names: list[str], most: int = 6) -> str:
    """Names in a row; the last ones are only counted where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def data_lines(run: Path, gate: GateFile) -> list[str]:
    """What of the sources was used and left out; nothing where the run's data are not those judged."""
    if not (run / "data" / MANIFEST).is_file():
        return []
    manifest = read_manifest(run / "data")
    return describe_data(manifest.facts) if manifest.hash == gate.provenance.data else []


def test_set_line(gate: GateFile) -> str:
    """What the test documents said, and how often anybody looked; empty where nobody did."""
    look = gate.test_set
    if look is None:
        return ""
    times = "once" if look.openings == 1 else f"{look.openings} times"
    where = f" on {look.target}" if look.target else ""
    last = f"last by {look.by} on {day(look.time)} for {look.recipe}{where}"
    start = f"The test documents were opened {times}, {last}"
    if look.verdict is None:
        return f"{start}; they are not scored to the end yet."
    old = "" if look.current else " They are of earlier artifacts or an earlier budget."
    shares = {"": look.kept_share, **{f"on those of {name} ": kept for name, kept in look.slices.items()}}
    cells = {where: estimate_cell(kept) for where, kept in shares.items()}
    figures = "; ".join(f"{where}{' '.join([cell.main, *cell.notes])}" for where, cell in cells.items())
    retained = f"share of the gain retained {figures}"
    return f"{start}: {look.verdict} on {look.documents} documents, {retained}.{old}"


def day(time: str) -> str:
    """The day of a time in ISO 8601."""
    return time[:10]
