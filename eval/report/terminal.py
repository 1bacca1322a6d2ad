"""The verdict and the budget table as a terminal shows them."""

from collections.abc import Iterator

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from eval.core.gate_file import STYLES, GateFile, Variant
from eval.report.format import (
    ALWAYS,
    FOOTNOTE,
    NOT_HAD,
    Cell,
    cost_cells,
    foremost,
    quality_cells,
    recommended,
    shifted,
    signed,
    test_set_line,
    unmeasured,
)
from eval.signoff.statement import SignOff

ROWS = 50  # more cannot be read here: table.md and the page have all


def bounds(cells: list[Cell]) -> str:
    """The upper bounds of two percentiles, for the line below them."""
    found = [next((n.removeprefix("≤ ") for n in c.notes if n.startswith("≤")), NOT_HAD) for c in cells]
    return f"≤ {' / '.join(found)}"


def terminal_row(gate: GateFile, variant: Variant) -> list[Text]:
    name = variant.recipe + (" *" if variant.recommended else "")
    quality, cost = quality_cells(gate, variant), cost_cells(variant, list(ALWAYS))
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


def terminal(gate: GateFile, variants: list[Variant]) -> Table:
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
    for variant in variants:
        table.add_row(*terminal_row(gate, variant))
    return table


def lines(gate: GateFile, variants: list[Variant]) -> Iterator[str]:
    """What stands below the table: reasons, what is not shown, what is not measured."""
    for v in variants:
        yield f"{v.recipe} on {v.target}: {v.reason}"
    if hidden := len(gate.variants) - len(variants):
        yield f"{hidden} more rows in table.md and report.html"
    for names, how in unmeasured(gate).items():
        yield f"to measure {names}: {how}"


def show(gate: GateFile, signoffs: list[SignOff], console: Console) -> None:
    """Prints the budget table, its reasons and, last, the verdict."""
    variants = foremost(gate.variants, ROWS)
    console.print(terminal(gate, variants))
    for line in lines(gate, variants):
        console.print(Text(line))
    console.print(Text(f"* recommended ({recommended(gate)}). {FOOTNOTE}", style="dim"))
    for line in (test_set_line(gate), *(f"note: {note}" for note in gate.notes), *map(signed, signoffs)):
        if line:
            console.print(Text(line))
    console.print(Text(gate.verdict, style=STYLES[gate.verdict]), Text(gate.reason))
