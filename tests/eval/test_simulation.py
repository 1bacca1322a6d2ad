"""How often the gate errs: the simulation, through its command line, with fewer studies than in the docs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.core.config import ROOT
from scripts.simulation.parts import (
    PICKS,
    Clustered,
    Tail,
    clustered_false_pass,
    draw_latencies,
    false_fail,
    picks,
)
from scripts.simulation.spread import spread_of
from tests.eval.run_builder import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> dict:
    path: Path = tmp_path_factory.mktemp("simulation") / "gate.json"
    names = ["false_pass", "beyond", "worst", "power", "placebo", "harmful"]
    command = [sys.executable, "-m", "scripts.simulate_gate", "--draws", "5000", "--json", str(path)]
    command += ["--tables", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "nominal 5 %" in done.stdout
    return json.loads(path.read_text())


def test_false_pass_holds(simulated):
    assert len(simulated["false_pass"]) == 24
    assert max(row["crossed"] for row in simulated["false_pass"]) <= 0.06


def test_false_pass_holds_in_the_worst_mixture_of_variances(simulated):
    """Three seeds and more; two seeds are known to be too few, and the cap of nu to be needed."""
    worst, few = ({row["seeds"]: row for row in rows} for rows in np.split(np.array(simulated["worst"]), 2))
    assert all(one[s]["crossed"] <= 0.06 for one in (worst, few) for s in (3, 4, 5, 7, 10))
    assert worst[3]["without the cap"] > worst[3]["crossed"]
    assert worst[2]["crossed"] > 0.06


def test_tests_that_forget_seeds_or_documents_do_not_hold(simulated):
    severe = [row for row in simulated["false_pass"] if row["scenario"] == "severe"]
    agree = [row for row in simulated["false_pass"] if row["scenario"] == "seeds agree"]
    assert min(row["documents only"] for row in severe) > 0.08
    assert min(row["seeds only"] for row in agree) > 0.08


def test_placebo_never_passes(simulated):
    assert [row["PASS"] for row in simulated["placebo"]] == [0] * 6
    assert all(row["studies"] == 200 for row in simulated["placebo"])


def test_a_harmful_method_fails(simulated):
    assert [row["PASS"] for row in simulated["harmful"]] == [0] * 6
    assert all(row["FAIL"] > 120 for row in simulated["harmful"])


def test_what_the_test_does_not_allow_for_is_shown(simulated):
    assert max(row["crossed"] for row in simulated["beyond"]) > 0.06


def test_power_grows_with_seeds_and_is_as_predicted(simulated):
    for share in {row["share"] for row in simulated["power"]}:
        rates = [row["simulated"] for row in simulated["power"] if row["share"] == share]
        assert rates == sorted(rates)
    assert max(abs(row["simulated"] - row["predicted"]) for row in simulated["power"]) < 0.1


def test_clusters_that_are_taken_for_independent_pass_false_claims():
    rates = clustered_false_pass(Clustered(6, 8, 0.3), 5, 3000)
    assert rates["by document"] > 0.08
    assert rates["by cluster"] <= 0.06


def test_fail_has_a_level_over_nine_parts():
    rates = false_fail(9, 5, 800)
    assert rates["any part alone"] > 0.12
    assert rates["Holm over the parts"] <= 0.06


def test_a_shared_test_that_is_not_multiplied_has_more_power_and_its_level():
    no_gain, small = (picks(case, 5, 800) for case in (PICKS[0], PICKS[3]))
    assert no_gain["false, in series"] <= 0.065
    assert small["right, in series"] > small["right, together"] + 0.05


def test_every_other_table_is_printed_by_the_command():
    names = {
        "clusters": "40 clusters of 2, correlation 0.3",
        "false_fail": "Holm over the parts",
        "tails": "10 processes of 120, apart by 0.19, requests by 0.16, 0% slow",
        "sizes": "5 processes, apart by 0.1 and 0.01",
        "returning": "20 groups every week, correlation 0.2, +1 errors",
        "picks": "a gain, one does not keep enough",
        "looks": "weeks until a broken one is found",
    }
    command = [sys.executable, "-m", "scripts.simulate_gate", "--draws", "100", "--tables", *names]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "160"}
    )
    for name, words in names.items():
        assert words in done.stdout, name
    assert len([line for line in done.stdout.splitlines() if line.startswith("┏")]) == len(names)
    assert "nan" not in done.stdout


def test_the_spread_of_processes_is_that_of_the_records(tmp_path):
    """Of processes that are apart by 0.2 and requests by 0.1, as drawn."""
    rng = np.random.default_rng(0)
    tail = Tail(400, 30, 0.2, 0.1)
    between, within = spread_of(list(draw_latencies(rng, tail, tail.processes, tail.requests)))
    assert between == pytest.approx(0.2, abs=0.02)
    assert within == pytest.approx(0.1, abs=0.003)
    run = Run(tmp_path).make()
    command = [sys.executable, "-m", "scripts.simulation.spread", "--study", str(run.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.match(
        r"prefill, 3 models: between processes 0\.0\d\d \(median\), 0\.\d+ \(largest\);", done.stdout
    )
