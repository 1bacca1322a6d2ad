"""What the report says of the documents: used, left out, in how many groups."""

from io import StringIO

from rich.console import Console

from eval.core.artifacts import Key, build_artifact, read_manifest
from eval.core.gate_file import read_gate
from eval.report.format import data_lines
from eval.report.html import render_page
from eval.report.markdown import render_markdown
from eval.report.terminal import print_report
from tests.eval.report_run import run_folder
from tests.eval.test_report import Page


def test_the_report_says_what_of_the_data_was_used(tmp_path):
    run = run_folder(tmp_path)
    facts = {
        **{"train_documents": 90, "validation_documents": 8, "rows": {"documents": 102, "far": 5}},
        **{
            "left_out": {"documents": {"no text": 1, "a copy of another": 3}},
            "groups": {"train": 20, "validation": 8},
        },
    }
    with build_artifact(
        run / "data", kind="data", name="data", key=Key("x"), parents={}, facts=facts
    ) as folder:
        (folder / "train.jsonl").write_text("")
    gate = read_gate(run)
    assert data_lines(run, gate) == [], "of other data than those that were judged"
    provenance = gate.provenance.model_copy(update={"data": read_manifest(run / "data").hash})
    gate = gate.model_copy(update={"provenance": provenance})
    lines = data_lines(run, gate)
    assert lines == [
        "data: 98 of 102 rows used; left out: 3 a copy of another, 1 no text",
        "far: 5 of 5 rows used",
        "groups: 90 train documents in 20, 8 validation documents in 8",
    ]
    out = Console(file=StringIO(), width=200)
    print_report(gate, out, lines)
    page = " ".join(Page(render_page(gate, run, "")).text)
    for line in lines:
        assert line in render_markdown(gate, lines)
        assert line in page
        assert line in out.file.getvalue()
