"""The verdict and the budget table as a terminal shows them."""

from collections.abc import Iterable, Iterator

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from eval.core.commands import STYLES
from eval.core.gate_file import GateFile, Variant
from eval.core.sections.classification import in_words
from eval.report.budget_table import WEIGHTS, BudgetTable, Row, build_budget_table, fold_lines
from eval.report.format import (
    FOOTNOTE,
    MISSING,
    NOT_MEASURED,
    SYMBOLS,
    Cell,
    cost_stamp,
    limit_text,
    measuring_commands,
    recommended_text,
    remarks,
    remedy_text,
    saved_text,
    select_variants,
    several,
    stamp,
    test_set_line,
)
from eval.stats.crossed import PASS

UNKNOWN = "the reason stands above; what would make it pass cannot be told"
ROWS = 50  # more cannot be read here: table.md and the page have all


def upper_bounds(cells: list[Cell]) -> str:
    """The upper bounds of two percentiles, for the line below them."""
    bounds = [next((n.removeprefix("≤ ") for n in c.notes if n.startswith("≤")), MISSING) for c in cells]
    return f"≤ {' / '.join(bounds)}"


def weight_lines(variant: Variant) -> list[str]:
    """The shares of zero and of low-bit weights, where they are any, and what a pass reached, if not all."""
    shares = {"zeros": variant.zeros, "low-bit": variant.low_bit}
    lines = [f"{share:.0%} {name}" for name, share in shares.items() if share and share >= 0.01]
    if variant.reached is not None and variant.reached < 1:
        lines.append(f"{int(100 * variant.reached)}% reached")
    return lines


def table_row(table: BudgetTable, row: Row) -> list[Text]:
    """The cells of one row in fewer columns: two percentiles share one, and so do the slices."""
    v, quality = row.variant, row.quality
    name = [f"{v.recipe}{' *' if v.recommended else ''}", f"{v.engine} on {v.target}", *weight_lines(v)]
    spans = ["\n".join([cell.main, *cell.notes]) for cell in quality[:3]]
    slices = [
        f"{column.title.removeprefix('retained, ')} {SYMBOLS.get(cell.verdict, MISSING)}"
        for column, cell in zip(table.quality[3:], quality[3:], strict=True)
        if column.name not in WEIGHTS
    ]
    verdict = Text.assemble((v.verdict, STYLES[v.verdict]), *(f"\n{one}" for one in slices))
    return [Text("\n".join(name)), verdict, *map(Text, [*spans, *cost_texts(row.costs, count_timed(table))])]


def count_timed(budget: BudgetTable) -> int:
    """How many of the first columns of cost are percentiles: two of prefill, two of decode if any."""
    return 4 if any(column.name.startswith("decode") for column in budget.costs) else 2


def cost_texts(costs: list[Cell], timed: int) -> list[str]:
    """Two percentiles of prefill and of decode with their upper bounds, the peak of memory, bytes on disk."""
    if not costs:
        return [NOT_MEASURED, *[""] * (timed // 2 + 1)]
    pairs = [costs[place : place + 2] for place in range(0, timed, 2)]
    texts = [f"{p50.main} / {short(p95)}\n{upper_bounds([p50, p95])}" for p50, p95 in pairs]
    return texts + [cell.main for cell in costs[timed : timed + 2]]


def short(cell: Cell) -> str:
    """Without the number of requests that it would need, which has no place here."""
    return cell.main if cell.value is not None else MISSING


def rich_table(budget: BudgetTable, task: str) -> Table:
    """The budget table as rich prints it; upper bounds stand below the percentiles."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    left, right = ["variant", "verdict"], ["bits/byte", "gain\nretained", "guard\nshare"]
    timed = count_timed(budget)
    latencies = ["prefill ms\np50 / p95", "decode ms\np50 / p95"][: timed // 2]
    right = [in_words(heading, task) for heading in right]
    costs = [*latencies, "peak\nMiB", "disk\nMiB"]
    for heading in [*left, *right, *costs]:
        justify: JustifyMethod = "left" if heading in left else "right"
        table.add_column(heading, justify=justify, overflow="fold")
    for row in budget.shown:
        table.add_row(*table_row(budget, row))
    for beside in budget.references:
        name = Text(f"{beside.name}\non {beside.target}")
        table.add_row(name, MISSING, "", "", "", *map(Text, cost_texts(beside.costs, timed)))
    return table


def lines_below(gate: GateFile, budget: BudgetTable) -> Iterator[str]:
    """What stands below the table: limits, reasons and what would do, what is not shown or not measured."""
    for v in (row.variant for row in budget.shown):
        limits = [
            f"{part.name.removeprefix('cost:').replace('_', ' ')} {limit_text(part)} {SYMBOLS[part.verdict]}"
            for part in v.parts
            if part.name.startswith("cost:") and part.estimate is not None
        ]
        if limits:
            yield f"{v.recipe} on {v.target}: {', '.join(limits)}"
    reasons: dict[str, list[str]] = {}
    for v in (row.variant for row in budget.shown if row.variant.verdict != PASS):
        reason = [] if v.reason in gate.reason else [v.reason]  # it stands above
        to_pass = [f"to pass: {text}"] if (text := remedy_text(v)) else []
        text = "; ".join(reason + to_pass) or UNKNOWN
        reasons.setdefault(text, []).append(f"{v.recipe} on {v.target}")
    yield from (f"{several(names)}: {text}" for text, names in reasons.items())
    if hidden := len(gate.variants) - len(budget.rows):
        yield f"{hidden} more rows in table.md and report.html"
    for line, how in fold_lines(gate, budget).items():
        yield f"{line}; measure with {how}" if how else line
    for names, how in measuring_commands(gate, budget.folded).items():
        yield f"{names}: {NOT_MEASURED}; measure with {how}"


def print_report(gate: GateFile, console: Console, data: Iterable[str] = ()) -> None:
    """Prints the verdict, the budget table, its reasons, and what it is conditional on."""
    console.print(Text.assemble((gate.verdict, STYLES[gate.verdict]), f" {gate.reason}"))
    console.print(Text(f"{gate.title or gate.study}: {stamp(gate)}; {cost_stamp(gate)}", style="dim"))
    for line in saved_text(gate):
        console.print(Text(line))
    budget = build_budget_table(gate, select_variants(gate.variants, ROWS))
    console.print(rich_table(budget, gate.task))
    for line in lines_below(gate, budget):
        console.print(Text(line))
    signs = ", ".join(f"{sign} {verdict}" for verdict, sign in SYMBOLS.items())
    console.print(Text(f"* recommended ({recommended_text(gate)}). {signs}. {FOOTNOTE}", style="dim"))
    for line in (*data, test_set_line(gate), *remarks(gate)):
        if line:
            console.print(Text(line))
