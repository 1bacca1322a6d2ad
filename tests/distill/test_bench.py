"""The bench of the distillation step runs whole and tells its rows; its numbers are no matter of a test."""

import json

import pytest

from tests.helpers import run


@pytest.mark.bench
def test_the_bench_prints_every_row_and_writes_them_down(tmp_path):
    done = run("scripts/bench_distill.py", "--quick", "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["what"].split(",")[0]: row for row in report["rows"]}
    assert list(rows) == [
        "whole step / bare parts",
        "step from cached targets / bare CE step",
        "step from cached targets / our CE step",
        "extra peak memory of the chunked / the plain loss",
        "time of the chunked / the plain loss",
        "two processes of one thread / one process of two threads",
    ]
    for name, row in rows.items():
        assert name in done.stdout
        assert row["value"] > 0
        sign, limit = row["limit"].split()
        within = row["value"] <= float(limit) if sign == "<=" else row["value"] >= float(limit)
        assert row["met"] == within
    assert rows["two processes of one thread / one process of two threads"]["limit"] == ">= 0.9"
