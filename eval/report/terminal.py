"""The verdict and the budget table as a terminal shows them."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from eval.core.gate_file import STYLES, GateFile, Variant
from eval.report.budget_table import WEIGHTS, BudgetTable, Row, build_budget_table
from eval.report.format import (
    FOOTNOTE,
    MISSING,
    Cell,
    measuring_commands,
    recommended_text,
    remarks,
    select_variants,
    test_set_line,
)

ROWS = 50  # more cannot be read here: table.md and the page have all


def upper_bounds(cells: list[Cell]) -> str:
    """The upper bounds of two percentiles, for the line below them."""
    bounds = [next((n.removeprefix("≤ ") for n in c.notes if n.startswith("≤")), MISSING) for c in cells]
    return f"≤ {' / '.join(bounds)}"


def weight_lines(variant: Variant) -> list[str]:
    """The shares of zero and of low-bit weights, where they are any."""
    shares = {"zeros": variant.zeros, "low-bit": variant.low_bit}
    return [f"{share:.0%} {name}" for name, share in shares.items() if share and share >= 0.01]


def table_row(table: BudgetTable, row: Row) -> list[Text]:
    """The cells of one row in fewer columns: two percentiles share one, and so do the slices."""
    v, quality = row.variant, row.quality
    costs = ["not measured", "", "", ""]
    if row.costs:
        pairs = [row.costs[0:2], row.costs[2:4]]
        costs = [f"{p50.main} / {p95.main}\n{upper_bounds([p50, p95])}" for p50, p95 in pairs]
        costs += [cell.main for cell in row.costs[4:6]]
    name = [f"{v.recipe}{' *' if v.recommended else ''}", v.engine, *weight_lines(v)]
    names = [Text("\n".join(name)), Text(v.target)]
    spans = ["\n".join([cell.main, *cell.notes]) for cell in quality[:3]]
    slices = [
        f"{column.title.removeprefix('retained, ')} {cell.verdict or MISSING}"
        for column, cell in zip(table.quality[3:], quality[3:], strict=True)
        if column.name not in WEIGHTS
    ]
    verdict = Text(v.verdict, style=STYLES[v.verdict])
    return [*names, verdict, *(Text(text) for text in [*spans, "\n".join(slices), *costs])]


def rich_table(gate: GateFile, budget: BudgetTable) -> Table:
    """The budget table as rich prints it; upper bounds stand below the percentiles."""
    title = Text(gate.title or gate.study)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    left = ["variant", "target", "verdict"]
    right = ["bits/byte", "gain\nretained", "guard\nshare"]
    costs = ["prefill ms\np50 / p95", "decode ms\np50 / p95", "peak\nMiB", "disk\nMiB"]
    for heading in [*left, *right, "slices", *costs]:
        justify: JustifyMethod = "left" if heading in (*left, "slices") else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in budget.rows:
        table.add_row(*table_row(budget, row))
    return table


def lines_below(gate: GateFile, variants: list[Variant]) -> Iterator[str]:
    """What stands below the table: reasons, what is not shown, what is not measured."""
    for v in variants:
        yield f"{v.recipe} on {v.target}: {v.reason}"
    if hidden := len(gate.variants) - len(variants):
        yield f"{hidden} more rows in table.md and report.html"
    for names, how in measuring_commands(gate).items():
        yield f"to measure {names}: {how}"


def print_report(gate: GateFile, console: Console, data: Iterable[str] = ()) -> None:
    """Prints the budget table, its reasons and, last, the verdict."""
    variants = select_variants(gate.variants, ROWS)
    console.print(rich_table(gate, build_budget_table(gate, variants)))
    for line in lines_below(gate, variants):
        console.print(Text(line))
    console.print(Text(f"* recommended ({recommended_text(gate)}). {FOOTNOTE}", style="dim"))
    for line in (
        *data,
        test_set_line(gate),
        *remarks(gate),
    ):
        if line:
            console.print(Text(line))
    console.print(Text(gate.verdict, style=STYLES[gate.verdict]), Text(gate.reason))
