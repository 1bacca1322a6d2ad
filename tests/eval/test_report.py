"""The report, through its command line, on synthetic run folders."""

import base64
import csv
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from eval.core.errors import UserError
from eval.core.gate_file import KeptShare, Students, read_gate
from eval.core.study import load_study
from eval.report import slice_figures as spread
from eval.report import terminal
from eval.report.__main__ import refuse_stale
from eval.report.budget_table import build_budget_table
from eval.report.figures import smooth
from eval.report.format import part_verdict
from eval.report.html import render_page
from eval.report.markdown import render_markdown
from tests.eval.report_run import HOSTILE, SLICES, VARIANTS, run_folder, unmeasured, variant

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "input", "img", "hr", "link", "path", "use", "rect"}


def report(run: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "eval.report", "--study", str(run)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)


def outputs_of(run: Path) -> tuple[str, str, str]:
    """stdout, table.md and report.html of a run that succeeds."""
    done = report(run)
    assert done.returncode == 0, done.stderr
    return done.stdout, (run / "table.md").read_text(), (run / "report.html").read_text()


class Page(HTMLParser):
    """Every tag with its attributes; asserts that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def made_here(run: Path) -> tuple[str, str]:
    """table.md and the page, in this process."""
    gate = read_gate(run)
    return render_markdown(gate), render_page(gate, run, (run / "study.yaml").read_text())


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str, str, str]:
    run = run_folder(tmp_path_factory.mktemp("runs"))
    return run, *outputs_of(run)


def test_terminal_shows_the_table_and_ends_with_the_path(demo):
    run, out, _, _ = demo
    assert out.splitlines()[-1] == str(run / "report.html")
    for row in VARIANTS:
        assert row[0] in out
    assert "int8 *" in out
    assert "99% low-bit" in out, "what was done to the weights, below the name"
    assert out.count("% reached") == out.count("93% reached") > 0, "only where it is not all of them"
    assert "zero weights" not in out, "and not among the slices"
    assert "absorb cost --study runs/x --target gpu" in out
    assert "The test documents were opened once, last by Ada on 2026-01-03 for int8 on cpu: PASS" in out
    assert "Note: all 3 seeds share one teacher" in out


def test_page_is_one_file_that_asks_for_nothing(demo):
    html = demo[3]
    render_page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    names = {tag for tag, _ in render_page.tags}
    assert names.isdisjoint({"link", "img", "iframe", "object", "embed", "base", "form"})
    for _, attributes in render_page.tags:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        href = attributes.get("href") or "#"
        assert href.startswith("#") or href == "signoff/index.html", "the page of sign-offs, beside it"


def test_the_policy_of_the_page_allows_its_own_script_and_no_network(demo):
    render_page = Page(demo[3])
    policy = next(a["content"] for tag, a in render_page.tags if tag == "meta" and "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    script = demo[3].rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == "'none'"
    assert not {"connect-src", "img-src", "font-src"} & set(rules)


def test_page_can_be_read_by_ear_and_keyboard(demo):
    render_page = Page(demo[3])
    ids = [a["id"] for _, a in render_page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in render_page.tags:
        for name in ("aria-labelledby", "aria-describedby", "aria-controls", "for"):
            assert name not in attributes or attributes[name] in ids
    assert all("scope" in a for tag, a in render_page.tags if tag == "th")
    tags = [tag for tag, _ in render_page.tags]
    assert tags.count("caption") == tags.count("table")
    pictures = [a for tag, a in render_page.tags if tag == "svg"]
    # the chain, two of a measured target, slices, documents, lineage, and four arms with curves
    assert len(pictures) == 1 + 2 + 2 + 1 + 4
    assert all(a["role"] == "img" for a in pictures)
    assert dict(render_page.tags)["html"]["lang"] == "en"
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_page_shows_everything_that_gate_json_holds(demo):
    run, _, _, html = demo
    text = " ".join(" ".join(Page(html).text).split())
    for words in (
        "PASS: ship int8 on cpu",
        "The test documents were opened once, last by Ada",
        "Note: all 3 seeds share one teacher T1",
        "Behaviour and tasks",
        "sums 0.410 [0.340, 0.480] 0.410",
        "noise 0.00170",
        "Under load for 10 s per rate and process",
        "A. Uthor 2017, arXiv:1612.01474",
        "Size, latency and gain",
        "the share that the budget asks is 0.86",
        "absorb cost --study",
    ):
        assert words in text, words
    for path, sha in json.loads((run / "gate.json").read_text())["provenance"]["records"].items():
        assert path in text
        assert sha in text


def test_hostile_words_stay_words(tmp_path):
    odd = {**variant(VARIANTS[1]), "recipe": HOSTILE, "reason": HOSTILE, "engine": HOSTILE}
    run = run_folder(tmp_path, HOSTILE, [odd, variant(VARIANTS[0])])
    table, html = made_here(run)
    render_page = Page(html)
    assert sum(tag == "script" for tag, _ in render_page.tags) == 2  # data and program
    assert "<script>alert" not in html
    assert "alert('x')" in " ".join(render_page.text)
    assert HOSTILE in " ".join(render_page.text).partition("least of all")[2]  # the name of a document
    assert "<script>" not in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    for above, below in pairwise(rows):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in (above, below)]
        assert bars[0] == bars[1] or below.startswith(
            ("| arm", "| stage", "| recipe", "| valid", "| variant")
        )


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_of_the_table_is_the_gates(demo):
    run, _, table, _ = demo
    known = numbers(json.loads((run / "gate.json").read_text()))
    prose = re.sub(r"The test documents .*|Note: .*|.* pairs: .*|judged on .*|.*measured on .*", "", table)
    bare = re.sub(r"p(50|95|99)|90 % interval|\b[A-Z]\d|[a-z]+[-a-z]*\d+(-[a-z]\w+)?", "", prose)
    shown = re.findall(r"\d+(?:\.\d+)?", re.sub(r"reason .*|[^|]*(?=\|$)", "", bare, flags=re.M))
    assert len(shown) > 250
    for text in shown:
        half = 0.5000001 * 10 ** -len(text.partition(".")[2])
        assert any(abs(abs(n) - float(text)) <= half for n in known), text


def test_page_terminal_and_table_show_the_same_cells(demo):
    run, out, table, html = demo
    gate = read_gate(run)
    budget = build_budget_table(gate)
    text = "".join(Page(html).text)
    assert {"knee", "throughput"} < {column.name for column in budget.costs}
    for row in budget.shown:
        for cell in row.quality + row.costs:
            assert str(cell) in table
            assert cell.main in text
        assert row.quality[0].main in out
    for beside in budget.references:
        assert beside.name in out
        for cell in beside.costs:
            assert str(cell) in table
            assert cell.main in text


def test_the_verdict_comes_first_and_no_line_is_wider_than_120_columns(demo):
    out = demo[1]
    assert out.startswith("PASS int8 keeps the method's gain on cpu")
    assert max(map(len, out.splitlines()[:-1])) <= 120
    assert out.count("decode is slower than the uncompressed student") == 1, "each reason once"


def test_a_spreadsheet_reads_every_variant_with_bounds_and_verdicts(demo):
    run, gate = demo[0], read_gate(demo[0])
    with (run / "table.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    *rows, teacher, fallback = (row for row in rows if not row["over"])
    assert [(row["recipe"], row["target"], row["verdict"]) for row in rows] == [
        (v.recipe, v.target, v.verdict) for v in gate.variants
    ]
    assert (teacher["recipe"], fallback["recipe"]) == ("teacher T1", "fallback B")
    assert float(teacher["decode_p50"]) == gate.references[0].cost["decode_p50"].value
    measured, rest = rows[: len(VARIANTS)], rows[len(VARIANTS) :]
    assert {row["cost"] for row in measured} == {"measured on 2026-01-01 to 2026-01-02"}
    assert [row["cost"] for row in rest] == ["not measured yet"] * 5
    for row, v in zip(rows, gate.variants, strict=True):
        assert [float(row[f"gain_retained_s{seed}"]) for seed in gate.seeds] == v.kept_share.by_seed
        share = v.kept_share
        cells = [row[f"gain_retained{end}"] for end in ("", "_low", "_high")]
        assert cells == ["" if x is None else repr(x) for x in (share.point, share.low, share.high)]
        assert row["gain_retained_verdict"] == part_verdict(v, "retention")
        assert row["recommended"] == str(v.recommended).lower()
        latency = v.cost["decode_p95"] if v.cost else None
        assert row["decode_p95_high"] == (
            "" if latency is None or latency.upper is None else repr(latency.upper)
        )


def test_same_gate_same_bytes_and_other_times_same_quality(demo, tmp_path):
    run, _, table, html = demo
    assert made_here(run) == (table, html)
    slower = [variant((*row[:5], row[5] * 3, *row[6:])) for row in VARIANTS]
    other = run_folder(tmp_path, variants=[*slower, *unmeasured("gpu")])
    quality = render_markdown(read_gate(other)).partition("## Cost")
    assert quality[2] != table.partition("## Cost")[2]
    assert quality[0] == table.partition("## Cost")[0]


def test_percentiles_that_could_not_be_had_are_not_printed(tmp_path):
    first = variant(VARIANTS[0])
    first["cost"]["decode_p95"] |= {"value": None, "upper": None, "needs": 59}
    first["cost"]["prefill_p95"] |= {"value": None, "upper": None}
    table, html = made_here(run_folder(tmp_path, variants=[first]))
    cells = [cell.strip() for cell in table.partition("## Cost")[2].splitlines()[6].split("|")]
    assert cells[6] == "\N{EN DASH}"
    assert cells[8] == "needs 59 requests"
    assert "needs 59 requests" in html
    assert "None" not in table + html
    assert "nan" not in table


def test_a_study_that_shows_nothing_is_reported_without_figures_that_it_lacks(tmp_path):
    run = run_folder(tmp_path, variants=[variant((f"r{i}", *VARIANTS[0][1:])) for i in range(30)])
    gate = read_gate(run)
    none = KeptShare()
    rows = [
        v.model_copy(
            update={"kept_share": none, "chain": [], "recommended": False, "verdict": "INCONCLUSIVE"}
        )
        for v in gate.variants
    ]
    blind = {"variants": rows, "verdict": "INCONCLUSIVE", "recommended": {"cpu": None, "gpu": None}}
    blind |= {"kept_by_student": Students(over_control=none, over_ce=None, over_base=none)}
    blind |= {"test_set": None, "quality": {}, "power": None, "notes": []}
    text = " ".join(Page(render_page(gate.model_copy(update=blind), run, "")).text)
    assert "INCONCLUSIVE: not decided, more evidence is needed" in text
    assert "plain, document by document" in text
    assert "24 of 30 variants are drawn; the budget table holds all." in text
    assert "undefined" in text
    for absent in ("test documents", "Behaviour", "Note:", "Signed", "nan", "None"):
        assert absent not in text


def changed(run: Path) -> str:
    """The study with another seed."""
    return (run / "study.yaml").read_text().replace("- 2", "- 7")


def opened(run: Path) -> None:
    """As `eval.gate.test_set` leaves it."""
    (run / "records/test").mkdir(exist_ok=True)
    (run / "records/test/opening-1.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "gate.json").unlink(), "missing"),
        (lambda run: (run / "gate.json").write_text("{"), "Invalid JSON"),
        (lambda run: (run / "gate.json").write_text('{"schema_version": 99}'), "expected 3"),
        (lambda run: (run / "records/score/int8/S1-s0.json").write_text("{}"), "score/int8/S1-s0.json was"),
        (lambda run: (run / "records/score/int8/S1-s0.json").unlink(), "is absent"),
        (lambda run: (run / "records/score/int8/S1-s7.json").write_text("{}"), "was absent"),
        (
            lambda run: (run / "study.yaml").write_text(changed(run)),
            "older than what it judged: study.yaml was",
        ),
        (opened, "the test documents were opened after it: records/test/opening-1.json was absent"),
    ],
)
def test_missing_or_stale_gate_is_refused(tmp_path, spoil, words):
    run = run_folder(tmp_path)
    spoil(run)
    with pytest.raises(UserError, match=words) as error:
        refuse_stale(read_gate(run), load_study(run), run, f"run `absorb gate --study {run}` first")
    assert f"absorb gate --study {run}" in str(error.value)


def test_what_is_refused_leaves_nothing(tmp_path):
    run = run_folder(tmp_path)
    (run / "records/score/int8/S1-s0.json").unlink()
    done = report(run)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert not (run / "table.md").exists()
    assert not (run / "report.html").exists()


def test_documents_are_those_of_the_records(demo):
    run = demo[0]
    gate = read_gate(run)
    spreads = {one.slice: one for one in spread.documents(run, gate, "int8")}
    assert {name: len(one.ids) for name, one in spreads.items()} == SLICES
    assert spreads["validation"].weakest[0][0] == HOSTILE

    def bits(arm: str, recipe: str) -> np.ndarray:
        records = [
            json.loads((run / f"records/score/{recipe}/{arm}-s{s}.json").read_text()) for s in range(3)
        ]
        return np.mean([np.divide(r["documents"]["bits"], r["documents"]["bytes"]) for r in records], axis=0)

    saved = (bits("S0", "int8") - bits("S1", "int8"))[: SLICES["validation"]]
    np.testing.assert_allclose(spreads["validation"].variant, np.sort(saved), atol=1e-12)
    assert spreads["validation"].better == (saved > 0).sum()
    teacher = (bits("T0", "plain") - bits("T1", "plain"))[: SLICES["validation"]]
    np.testing.assert_allclose(spreads["validation"].teacher, teacher[np.argsort(saved)], atol=1e-12)


def test_smoothed_curves_are_means():
    values = np.random.default_rng(0).normal(size=60)
    wanted = [values[max(0, i - 3) : i + 4].mean() for i in range(60)]
    np.testing.assert_allclose(smooth(values), wanted)


def test_a_terminal_is_not_flooded(demo):
    gate = read_gate(demo[0])
    many = [
        gate.variants[0].model_copy(update={"recipe": f"r{i}", "recommended": i == 299}) for i in range(300)
    ]
    out = Console(file=StringIO(), width=160)
    terminal.print_report(gate.model_copy(update={"variants": many}), out)
    text = out.file.getvalue()
    assert "r299 *" in text
    assert "250 more rows in table.md and report.html" in text
