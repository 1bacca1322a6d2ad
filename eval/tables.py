"""gate.json in words and cells, as Markdown and for the terminal. Nothing is decided here."""

import math
import re
from dataclasses import dataclass

from rich import box
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from eval.records import HELDOUT
from eval.verdict import Estimate, GateFile, Kept, Number, Variant

ARMS = {
    "B": "base, the fallback",
    "T0": "plain teacher",
    "T1": "teacher with the method",
    "CE": "student without a teacher",
    "S0": "control student, from T0",
    "S1": "student, from T1",
}
SYMBOLS = {"PASS": "✔", "FAIL": "✘", "INCONCLUSIVE": "?"}
STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}
LATENCIES = {
    "prefill_p50": "prefill p50",
    "prefill_p95": "prefill p95",
    "decode_p50": "decode p50",
    "decode_p95": "decode p95",
}
SIZES = {"peak_memory": "peak memory", "disk": "disk"}
NOT_HAD, TIMES = "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
FOOTNOTE = (
    f"≤ is the upper confidence bound that the limit is held against; {TIMES} is the ratio to the named "
    f"variant in the same run; {NOT_HAD} stands where no honest figure could be had from what was measured."
)


@dataclass(frozen=True)
class Cell:
    """A figure, the interval or bounds beside it, the verdict of its part, and the value to sort by."""

    main: str
    notes: tuple[str, ...] = ()
    verdict: str = ""
    sort: float | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.main, ", ".join(self.notes), self.verdict) if part)


def fixed(value: float | None, digits: int = 3) -> str:
    if value is None:
        return NOT_HAD
    return f"{value:.{digits}f}" if math.isfinite(value) else "unbounded"


def significant(value: float | None, digits: int = 3) -> str:
    """`value` with at least `digits` significant digits, in plain notation unless it is very small."""
    if value is None or not math.isfinite(value):
        return fixed(value)
    if abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded value: 0.9996 is 1.00
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def estimate(value: Estimate | Kept | None, verdict: str | None = None) -> Cell:
    """A point with its interval; `undefined` where the gate could not define the point."""
    if value is None or value.point is None:
        return Cell("undefined", verdict=verdict or "")
    if value.low is None and value.high is None:
        return Cell(fixed(value.point), ("no interval",), verdict or "", value.point)
    return Cell(
        fixed(value.point), (f"[{fixed(value.low)}, {fixed(value.high)}]",), verdict or "", value.point
    )


def part_verdict(variant: Variant, name: str) -> str:
    return next((part.verdict for part in variant.parts if part.name == name), "")


def shifted(gate: GateFile) -> list[str]:
    return [name for name in gate.documents if name != HELDOUT]


def quality_titles(gate: GateFile) -> list[str]:
    slices = [f"kept, {name}" for name in shifted(gate)]
    return ["held-out bits/byte", "kept share of the gain", "guard share", *slices]


def quality_cells(gate: GateFile, variant: Variant) -> list[Cell]:
    """Held-out bits per byte, kept share, guard share, then the kept share on every shifted slice."""
    cells = [
        estimate(variant.scores.get(HELDOUT)),
        estimate(variant.kept_share, part_verdict(variant, "retention")),
        estimate(variant.guard_share, part_verdict(variant, "guard")),
    ]
    found = [variant.slices[name] for name in shifted(gate)]
    return [*cells, *(estimate(one.kept_share, one.verdict) for one in found)]


def cost_titles() -> list[str]:
    return [*(f"{name}, ms" for name in LATENCIES.values()), *(f"{name}, MiB" for name in SIZES.values())]


def cost_cell(found: Number | None, recipe: str) -> Cell:
    """The figure with its upper bound and its ratio to another variant, or what it would need."""
    if found is None:
        return Cell(NOT_HAD)
    needs = f"needs {found.needs} requests" if found.needs else NOT_HAD
    if found.value is None:
        return Cell(needs)
    notes = [f"≤ {significant(found.upper)}" if found.upper is not None else f"bound {needs}"]
    if found.upper == found.value:
        notes = []  # counted, not estimated
    if found.relative is not None and found.relative.of != recipe:
        notes.append(f"{significant(found.relative.point)}{TIMES} {found.relative.of}")
    return Cell(significant(found.value), tuple(notes), sort=found.value)


def cost_cells(variant: Variant) -> list[Cell]:
    """Latencies in ms, then peak memory and disk in MiB; every cell says `not measured` where it was not."""
    names = [*LATENCIES, *SIZES]
    if variant.cost is None:
        return [Cell("not measured") for _ in names]
    return [cost_cell(variant.cost.get(name), variant.recipe) for name in names]


def gain(value: Estimate) -> str:
    cell = estimate(value)
    return f"{cell.main} bits/byte, 95 % interval {cell.notes[0]}" if cell.notes else cell.main


def recommended(gate: GateFile) -> str:
    """One clause per target: what may be shipped there."""
    found = gate.recommended.items()
    return "; ".join(f"{target}: {recipe or 'no variant'}" for target, recipe in found)


def by_recipe(gate: GateFile) -> list[Variant]:
    """One variant per recipe and engine: quality is the same on every target."""
    found: dict[tuple[str, str], Variant] = {}
    for variant in gate.variants:
        found.setdefault((variant.recipe, variant.engine), variant)
    return list(found.values())


def student_shares(gate: GateFile) -> dict[str, Kept]:
    """What the uncompressed student kept, by what it is held against."""
    found = gate.kept_by_student
    shares = {"student S1, over its control S0": found.over_control}
    if found.over_ce is not None:
        shares["student S1, over training without a teacher (CE)"] = found.over_ce
    return {**shares, "student S1 over the base, what a study without a control would claim": found.over_base}


# Markdown


def plain(text: str) -> str:
    """Free text that Markdown shows as it stands, on one line, inside a table too."""
    return re.sub(r"([\\`|<*]|(?<=\])\()", r"\\\1", " ".join(str(text).split()))


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [[plain(title) for title in titles], ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arms_table(gate: GateFile) -> str:
    slices = [HELDOUT, *shifted(gate)]
    rows = [
        [f"{arm} ({title})", *(str(estimate(gate.scores[arm].get(name))) for name in slices)]
        for arm, title in ARMS.items()
        if arm in gate.scores
    ]
    return markdown_table(["arm", *slices], rows)


def chain_table(gate: GateFile) -> str:
    """The share of the teacher's gain after each stage, and what compression alone kept of the student's."""
    rows = [[title, str(estimate(share)), ""] for title, share in student_shares(gate).items()]
    rows += [
        [plain(v.recipe), str(estimate(v.kept_share)), str(estimate(v.kept_of_student))]
        for v in by_recipe(gate)
    ]
    return markdown_table(["stage", "kept of the teacher's gain", "kept of the student's gain"], rows)


def quality_table(gate: GateFile) -> str:
    rows = [
        [plain(v.recipe), plain(v.engine), *(str(cell) for cell in quality_cells(gate, v))]
        for v in by_recipe(gate)
    ]
    return markdown_table(["recipe", "engine", *quality_titles(gate)], rows)


def cost_table(gate: GateFile) -> str:
    rows = []
    for v in gate.variants:
        names = [plain(v.recipe) + (" \\*" if v.recommended else ""), plain(v.target), plain(v.engine)]
        cells = [str(cell) for cell in cost_cells(v)]
        rows.append([*names, v.verdict, *cells, plain(v.reason)])
    return markdown_table(["recipe", "target", "engine", "verdict", *cost_titles(), "reason"], rows)


def unmeasured(gate: GateFile) -> list[str]:
    """How to measure what was not, one line per variant and target."""
    return [f"{v.recipe} on {v.target}: {v.how}" for v in gate.variants if v.how]


def gains(gate: GateFile) -> str:
    lines = [f"- Teacher gain (T1 - T0), held-out: {gain(gate.teacher_gain)}"]
    lines += [
        f"- Teacher gain, {plain(name)}: {gain(value)}" for name, value in gate.teacher_gain_slices.items()
    ]
    return "\n".join(lines)


def markdown(gate: GateFile) -> str:
    """table.md: the verdict, then quality (no figure of time), then cost and the verdicts it decides."""
    how = "".join(f"- {plain(line)}\n" for line in unmeasured(gate))
    sections = [
        f"# {plain(gate.title or gate.study)}",
        f"**{gate.verdict}**: {plain(gate.reason)}",
        f"Recommended: {plain(recommended(gate))}.",
        "## Quality",
        "Bits per byte, lower is better; intervals in brackets. Depends on the scores alone.",
        gains(gate),
        "### Arms",
        arms_table(gate),
        "### Gain kept, stage by stage",
        chain_table(gate),
        "### Variants",
        quality_table(gate),
        "## Cost and verdict",
        cost_table(gate),
        f"\\* recommended on its target. {FOOTNOTE}",
    ]
    return "\n\n".join([*sections, *([f"### Not measured\n\n{how.rstrip()}"] if how else [])]) + "\n"


# Terminal


def bounds(cells: list[Cell]) -> str:
    """The upper bounds of two percentiles, for the line below them."""
    found = [next((n.removeprefix("≤ ") for n in c.notes if n.startswith("≤")), NOT_HAD) for c in cells]
    return f"≤ {' / '.join(found)}"


def terminal_row(gate: GateFile, variant: Variant) -> list[Text]:
    name = variant.recipe + (" *" if variant.recommended else "")
    quality, cost = quality_cells(gate, variant), cost_cells(variant)
    spans = ["\n".join([cell.main, *cell.notes]) for cell in quality[:3]]
    slices = [f"{n} {c.verdict or NOT_HAD}" for n, c in zip(shifted(gate), quality[3:], strict=True)]
    costs = ["not measured", "", "", ""]
    if variant.cost is not None:
        pairs = [cost[0:2], cost[2:4]]
        costs = [f"{pair[0].main} / {pair[1].main}\n{bounds(pair)}" for pair in pairs]
        costs += [cell.main for cell in cost[4:]]
    names = [Text(f"{name}\n{variant.engine}"), Text(variant.target)]
    verdict = Text(variant.verdict, style=STYLES[variant.verdict])
    return [*names, verdict, *(Text(text) for text in [*spans, "\n".join(slices), *costs])]


def terminal(gate: GateFile) -> Table:
    """The budget table as rich prints it; upper bounds stand below the percentiles."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=Text(gate.title or gate.study), title_justify="left"
    )
    left = ["variant", "target", "verdict"]
    right = ["bits/byte", "kept share", "guard share"]
    costs = ["prefill ms\np50 / p95", "decode ms\np50 / p95", "peak\nMiB", "disk\nMiB"]
    for title in [*left, *right, "slices", *costs]:
        justify: JustifyMethod = "left" if title in (*left, "slices") else "right"
        table.add_column(title, justify=justify, overflow="fold")
    for variant in gate.variants:
        table.add_row(*terminal_row(gate, variant))
    return table
