"""What every form of the table says: the terminal, table.md, table.csv and the page."""

import csv
import re
from io import StringIO

import pytest
from rich.console import Console

from eval.core.commands import WIDTH
from eval.core.gate_file import read_gate
from eval.report.budget_table import csv_text
from eval.report.format import TIMES
from eval.report.html import render_page
from eval.report.markdown import render_markdown
from eval.report.terminal import print_report
from tests.eval.report_run import VARIANTS, run_folder, variant
from tests.eval.test_report import Page


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[str, str, str, str]:
    """The terminal, table.md, table.csv and the page."""
    run = run_folder(tmp_path_factory.mktemp("runs"))
    gate, out = read_gate(run), Console(file=StringIO(), width=WIDTH, highlight=False)
    print_report(gate, out)
    return out.file.getvalue(), render_markdown(gate), csv_text(gate), render_page(gate, run, "")


def test_every_form_says_when_and_by_what_it_was_judged_and_what_was_not_measured(demo):
    out, table, sheet, html = demo
    text = " ".join("".join(Page(html).text).split())
    for form in (out, table, text, sheet):
        words = " ".join(form.split())
        assert "judged on 2026-01-02 by absorb 9.8.7, budget" in words
        assert "measured on 2026-01-01 to 2026-01-02" in words
        assert "not measured yet" in words
        assert "about 5 seeds or 90 clusters if what was seen is true" in words
        assert "teacher T1" in words
    for form in (out, table, text):
        words = " ".join(form.replace("\N{NO-BREAK SPACE}", " ").split())
        assert f"0.310{TIMES} plain [0.248, 0.403] ≤ 1{TIMES}" in words, (
            "the bound that decides, beside its limit"
        )
        assert f"int8 on cpu takes, of teacher T1: 0.103{TIMES} [0.101, 0.106] of its decode p50" in words
    assert "| int4 | plain | -0.0050 [-0.0173, 0.0073] |" in table
    assert "-0.0050 [-0.0173, 0.0073]" in text
    assert "| T1 - T0, bits/byte | 0.116 | 0.128 | 0.134 |" in table, "seed by seed"
    assert html.count("0.116</td>") == 1
    rows = list(csv.DictReader(StringIO(sheet)))
    assert all(row["judged"].startswith("judged on 2026-01-02 by absorb 9.8.7") for row in rows)
    captions = re.findall(r"<caption.*?</caption>", html)
    assert len(captions) > 20
    assert all("judged on 2026-01-02 by absorb 9.8.7" in caption for caption in captions)
    short = "judged on 2026-01-02 by absorb 9.8.7"
    assert all(short in block.split("\n\n")[1] for block in table.split("\n| --- |")[1:])


def test_rows_of_a_target_without_any_figure_are_one_line_in_every_form(demo):
    out, table, _, html = demo
    for form in (out, table, "".join(Page(html).text)):
        words = " ".join(form.split())
        assert words.count("gpu: plain, int8, int4, wanda50, depth25: not measured yet") == 1
        assert "absorb cost --study runs/x --target gpu" in words
        assert "on gpu: not measured" not in words
    assert out.count("on gpu") == 0
    assert "| gpu |" not in table
    assert 'data-label="target">gpu' not in html


def test_every_form_says_what_was_not_measured_and_how_to(demo):
    out, table, sheet, html = demo
    page = " ".join(" ".join(Page(html).text).split())
    for form in (" ".join(out.split()), table, page, sheet):
        assert "absorb agreement --study runs/x" in form
    assert "flips and KL of nf4: not measured yet; measure with absorb" in " ".join(out.split())
    behaviour = next(line for line in table.splitlines() if line.startswith("| nf4 |") and "far" in line)
    assert behaviour.count("| not measured yet ") == 2
    assert "| nf4 | sums | not measured yet | 0.370 [0.300, 0.440] |" in table
    assert "nf4 sums not measured yet 0.370 [0.300, 0.440]" in page
    assert page.count("not measured yet not measured yet far") == 1


def test_pairs_of_variants_that_were_not_compared_are_told_and_a_spreadsheet_has_the_others(demo, tmp_path):
    _, table, sheet, html = demo
    rows = [row for row in csv.DictReader(StringIO(sheet)) if row["over"]]
    assert [(row["recipe"], row["over"], row["target"]) for row in rows][1] == ("int4", "plain", "cpu")
    figures = [
        float(rows[1][f"{name}{end}"]) for name in ("better_by", "decode_ratio") for end in ("", "_low")
    ]
    assert figures == [-0.005, -0.0173, 0.64 / 2.31, 0.2]
    told = "7 of 28 pairs: all of the first 12 recipes, the later ones against plain alone."
    assert told in table
    assert told in " ".join(Page(html).text)
    run = run_folder(tmp_path, variants=[variant(row) for row in VARIANTS[:2]])
    assert "pairs" not in render_markdown(read_gate(run)), "of two there are no others"


def test_a_rival_that_ended_worse_than_the_base_on_a_slice_is_marked_there(demo):
    _, table, _, html = demo
    mark = "worse than B by 0.022 [0.013, 0.030]"
    assert re.search(r"\| CE .*\| 3\.090 \[3\.060, 3\.120\], " + re.escape(mark) + r" \|\n", table)
    assert table.count(mark) == 1
    assert " ".join(Page(html).text).count(mark) == 1


def test_the_terminal_has_a_line_for_every_row_that_does_not_pass(tmp_path):
    """Even where its reason stands above and nothing is known that would make it pass."""
    gate = read_gate(run_folder(tmp_path))
    wanda = next(v for v in gate.variants if v.recipe == "wanda50")
    silent = wanda.model_copy(update={"parts": [p.model_copy(update={"remedy": None}) for p in wanda.parts]})
    rows = [silent if v is wanda else v for v in gate.variants]
    out = Console(file=StringIO(), width=WIDTH, highlight=False)
    print_report(gate.model_copy(update={"variants": rows, "reason": wanda.reason}), out)
    lines = out.file.getvalue().splitlines()
    assert "wanda50 on cpu: the reason stands above; what would make it pass cannot be told" in lines
    for v in (v for v in rows if v.verdict != "PASS" and v.target == "cpu"):
        assert any(f"{v.recipe} on cpu" in line for line in lines if "ms" not in line), v.recipe
