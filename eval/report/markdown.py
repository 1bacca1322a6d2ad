"""table.md: gate.json as Markdown, in step with the page and the terminal."""

import re
from collections.abc import Iterable

from eval.core.commands import level_text
from eval.core.gate_file import GateFile
from eval.core.records import VALIDATION
from eval.report.behaviour import (
    BEHAVIOUR,
    CLASSES,
    behaviour_cells,
    class_rows,
    task_arms,
    task_rows,
)
from eval.report.budget_table import BudgetTable, build_budget_table, fold_lines
from eval.report.format import (
    ARMS,
    FOOTNOTE,
    MISSING,
    NOT_MEASURED,
    arm_cell,
    by_recipe,
    comparison_rows,
    cost_stamp,
    estimate_cell,
    fixed,
    gain_text,
    measured_on,
    measuring_commands,
    pairs_left_out,
    recommended_text,
    remarks,
    remedy_text,
    saved_text,
    seed_rows,
    shifted,
    short_stamp,
    stamp,
    student_shares,
    test_set_line,
)

SIGNED = "Who signed what stands in [signoff/index.html](signoff/index.html), once anybody has."


def escape(text: str) -> str:
    """Free text that Markdown shows as it stands, on one line, inside a table too."""
    one = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`|*]|(?<=\])\()", r"\\\1", one)


def markdown_table(titles: list[str], rows: list[list[str]], made: str) -> str:
    """A table, and below it when and by what it was made."""
    lines = [[escape(title) for title in titles], ["---"] * len(titles), *rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", escape(made)])


def arms_table(gate: GateFile) -> str:
    slices = [VALIDATION, *shifted(gate)]
    rows = [
        [f"{arm} ({title})", *(str(arm_cell(gate, arm, name)) for name in slices)]
        for arm, title in ARMS.items()
        if arm in gate.scores
    ]
    return markdown_table(["arm", *slices], rows, short_stamp(gate))


def chain_table(gate: GateFile) -> str:
    """The share of the teacher's gain after each stage, and what compression alone kept of the student's."""
    rows = [[title, str(estimate_cell(share)), ""] for title, share in student_shares(gate).items()]
    rows += [
        [escape(v.recipe), str(estimate_cell(v.kept_share)), str(estimate_cell(v.kept_of_student))]
        for v in by_recipe(gate)
    ]
    titles = ["stage", "share of the teacher's gain retained", "share of the student's gain retained"]
    return markdown_table(titles, rows, short_stamp(gate))


def quality_table(table: BudgetTable, made: str) -> str:
    rows = [
        [escape(row.variant.recipe), escape(row.variant.engine), *map(str, row.quality)]
        for row in table.by_recipe()
    ]
    return markdown_table(["recipe", "engine", *(column.title for column in table.quality)], rows, made)


def cost_table(table: BudgetTable, made: str) -> str:
    rows = []
    for v, cells in ((row.variant, row.costs) for row in table.shown):
        names = [escape(v.recipe) + (" \\*" if v.recommended else ""), escape(v.target), escape(v.engine)]
        figures = list(map(str, cells)) or [NOT_MEASURED] * len(table.costs)
        rows.append([*names, v.verdict, *figures, escape(v.reason), escape(remedy_text(v) or MISSING)])
    for beside in table.references:
        figures = list(map(str, beside.costs)) or [NOT_MEASURED] * len(table.costs)
        rows.append([beside.name, escape(beside.target), *[MISSING] * 2, *figures, MISSING, MISSING])
    titles = [column.title for column in table.costs]
    return markdown_table(["recipe", "target", "engine", "verdict", *titles, "reason", "to pass"], rows, made)


def seeds_table(gate: GateFile) -> list[str]:
    """What each seed says by itself; nothing where gate.json does not hold it."""
    rows = [[escape(name), *(fixed(x) for x in values)] for name, values in seed_rows(gate)]
    heads = ["validation", *(f"seed {seed}" for seed in gate.seeds)]
    return ["### Seed by seed", markdown_table(heads, rows, short_stamp(gate))] if rows else []


def comparison_table(gate: GateFile) -> list[str]:
    titles, rows = comparison_rows(gate)
    if not rows:
        return []
    table = markdown_table(titles, [list(map(escape, row)) for row in rows], short_stamp(gate))
    left_out = [f"{line}."] if (line := pairs_left_out(gate)) else []
    return ["## Variant against variant", table, *left_out]


def gains(gate: GateFile) -> str:
    lines = [f"- Teacher gain (T1 - T0), validation: {gain_text(gate.teacher_gain, gate.level)}"]
    lines += [
        f"- Teacher gain, {escape(name)}: {gain_text(value, gate.level)}"
        for name, value in gate.teacher_gain_slices.items()
    ]
    return "\n".join(lines)


def behaviour_tables(gate: GateFile) -> list[str]:
    """What recipes do beside bits per byte, and the scores of tasks; nothing where nothing was measured."""
    rows = [
        [escape(recipe), *(escape(str(cell)) for cell in cells)]
        for recipe, cells in behaviour_cells(gate).items()
    ]
    scores = [[escape(recipe), escape(task), *map(str, cells)] for recipe, task, cells in task_rows(gate)]
    heads, made = ["recipe", "task", *task_arms(gate)], short_stamp(gate)
    sections = ["### Behaviour", markdown_table(["recipe", *BEHAVIOUR], rows, made)] if rows else []
    classes = [[escape(place), escape(model), *map(str, cells)] for place, model, cells in class_rows(gate)]
    if classes:
        sections += ["### Classes", markdown_table(["slice", "model", *CLASSES], classes, made)]
    return sections + (["### Tasks, mean score", markdown_table(heads, scores, made)] if scores else [])


def caveats(gate: GateFile, data: Iterable[str] = ()) -> str:
    """What was read, the test documents, what the verdict is conditional on, and where sign-offs are."""
    lines = [*(f"{line}." for line in data), test_set_line(gate), *(f"{line}." for line in remarks(gate))]
    return "\n\n".join([*(escape(line) for line in lines if line), SIGNED])


def render_markdown(gate: GateFile, data: Iterable[str] = ()) -> str:
    """table.md: the verdict, then quality (no figure of time), then cost and the verdicts it decides."""
    table = build_budget_table(gate)
    unmeasured = fold_lines(gate, table) | measuring_commands(gate, table.folded)
    how = "".join(f"- {escape(f'{names}: {how}')}\n" for names, how in unmeasured.items())
    sections = [
        f"# {escape(gate.title or gate.study)}",
        f"**{gate.verdict}**: {escape(gate.reason)}",
        f"Recommended: {escape(recommended_text(gate))}.",
        escape(f"{stamp(gate)}."),
        caveats(gate, data),
        "## Quality",
        f"Bits per byte, lower is better; {level_text(gate.level)} intervals in brackets.",
        gains(gate),
        "### Arms",
        arms_table(gate),
        "### Gain retained, stage by stage",
        chain_table(gate),
        "### Variants",
        quality_table(table, short_stamp(gate)),
        *seeds_table(gate),
        *behaviour_tables(gate),
        "## Cost and verdict",
        escape(f"Scores {measured_on(gate, 'scores')}; costs on {cost_stamp(gate)}."),
        cost_table(table, short_stamp(gate)),
        f"\\* recommended on its target. {FOOTNOTE}",
        *(f"{escape(line)}." for line in saved_text(gate)),
    ]
    if how:
        sections += ["### Not measured yet", how.rstrip()]
    return "\n\n".join([*sections, *comparison_table(gate)]) + "\n"
