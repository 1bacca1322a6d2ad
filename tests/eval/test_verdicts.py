"""From the parts of a variant to its verdict: FAIL has a level, and a shared test is not multiplied."""

import json

import numpy as np
import pytest

from eval.core.gate_file import Part
from eval.gate.decision import judge
from eval.gate.quality import RESOLUTION, mean_part
from eval.gate.verdicts import hold_failures, join_verdicts, slice_verdict
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, crossed_mean
from eval.stats.multiplicity import holm
from scripts.simulation.parts import holm_rows
from tests.eval.run_builder import Run, edit, row
from tests.helpers import run as command


def part(name: str, verdict: str, p: float | None = 0.5, p_fail: float | None = 0.5) -> Part:
    bounds = {"estimate": 0.0, "low": -1.0, "high": 1.0, "limit": 0.0, "unit": "bits/byte"}
    return Part(name=name, verdict=verdict, p=p, p_fail=p_fail, reason=f"{name} is", **bounds)


def test_a_part_fails_alone_and_not_as_one_of_many():
    parts = [part("assay", PASS), *(part(f"p{i}", INCONCLUSIVE) for i in range(5))]
    weak, strong = part("retention", FAIL, p_fail=0.02), part("retention", FAIL, p_fail=0.001)
    assert join_verdicts(hold_failures([*parts[:1], weak], 0.05)) == FAIL, "0.04 of two"
    held = hold_failures([*parts, weak], 0.05)
    assert (held[-1].verdict, join_verdicts(held)) == (INCONCLUSIVE, INCONCLUSIVE)
    assert (
        held[-1].reason == "retention is; by itself, but not after Holm's correction for 7 tests (p = 0.140)"
    )
    assert join_verdicts(hold_failures([*parts, strong], 0.05)) == FAIL


def test_what_was_counted_fails_at_once_and_makes_no_test_weaker():
    disk = part("cost:disk", FAIL, p_fail=None)
    tests = [part("assay", PASS), part("retention", FAIL, p_fail=0.024)]
    assert [one.verdict for one in hold_failures([*tests, disk, disk], 0.05)] == [PASS, FAIL, FAIL, FAIL]


def test_pass_is_untouched():
    parts = [part("assay", PASS, p=0.049), part("retention", PASS, p=0.049)]
    assert hold_failures(parts, 0.05) == parts


def test_the_verdict_of_a_slice_is_of_its_two_parts():
    parts = [part("assay", PASS), part("assay:far", PASS), part("retention:far", INCONCLUSIVE)]
    assert slice_verdict(parts, "far") == INCONCLUSIVE
    assert slice_verdict([*parts[:1], part("assay:far", FAIL), parts[2]], "far") == FAIL
    assert slice_verdict(parts, "near") is None


def test_p_to_fail_is_that_of_the_bound():
    rng = np.random.default_rng(3)
    for shift in (-1.0, -0.3, 0.0, 0.4):
        mean = crossed_mean(rng.normal(shift, 1, size=(4, 20)))
        assert (mean.p_above(0.0) < 0.05) == (mean.verdict(0.05) == FAIL)
        assert mean.p_above(0.0) == pytest.approx(1 - mean.p)
        assert mean.p_above(mean.bounds(0.05)[1]) == pytest.approx(0.05)
        assert mean.p_at_most(mean.bounds(0.05)[0]) == pytest.approx(0.05)
    assert crossed_mean(np.ones((1, 9))).p_above(0.0) is None


def test_the_p_of_an_assay_is_of_the_limit_that_its_bound_is_held_against():
    """The smallest gains that float32 resolves: a mean above 0 and not above the resolution is no PASS."""
    rng = np.random.default_rng(3)
    decided = set()
    for shift in np.linspace(0, 3e-5, 13):
        one = mean_part("assay", rng.normal(shift, 1e-5, size=(4, 20)), 0.05, "", "", RESOLUTION)
        assert (one.p <= 0.05) == (one.verdict == PASS)
        decided.add(one.verdict)
    assert decided == {PASS, INCONCLUSIVE}


def test_holm_by_rows_is_holm():
    p = np.random.default_rng(1).random((50, 4))
    np.testing.assert_allclose(holm_rows(p), [holm(list(one)) for one in p])


def test_assay_and_retention_of_a_slice_show_their_own_figures(tmp_path):
    run = Run(tmp_path)
    run.make().gate()
    parts = {one.name: one for one in row(run.result(), "int8").parts}
    assert [*parts][:6] == ["assay", "retention", "guard", "fallback", "assay:far", "retention:far"]
    for one in parts.values():
        if one.p is not None:
            assert (one.p < 0.05) == (one.low > one.limit), one.name
            assert one.p_fail == pytest.approx(1 - one.p, abs=1e-3), one.name


def test_the_teachers_gain_is_in_no_p_that_holm_multiplies(tmp_path):
    """A gain that is just seen, kept beyond doubt: once it was multiplied by the number of variants."""
    run = Run(tmp_path, seeds=[0, 1, 2], noise=0.01)
    run.budget |= {"slices": {}, "f": 0.1, "g": 0.01}
    run.budget["targets"]["cpu"]["limits"] = {}
    run.gains |= {"T1": 0.06, "S1": 0.16, "S0": -0.02}
    run.make().gate()
    result = run.result()
    int8 = row(result, "int8")
    parts = {one.name: one for one in int8.parts}
    assert 0.05 / 3 < parts["assay"].p < 0.05
    assert int8.p == max(parts[name].p for name in ("retention", "guard", "fallback"))
    assert int8.holm_p <= 0.05
    assert (result.verdict, result.recommended["cpu"]) == ("PASS", "int8")


def test_power_of_a_pick_multiplies_the_retention_alone(tmp_path):
    run = Run(tmp_path, seeds=[0, 1]).make()
    words = ["--study", str(run.path), "--among", "4", "--json", str(tmp_path / "power.json")]
    assert command("-m", "eval.gate.power", *words).returncode == 0
    rows = json.loads((tmp_path / "power.json").read_text())["tests"]
    assert [one["alpha"] for one in rows] == [0.05, 0.0125] * 2


def test_limits_have_a_level_to_fail_at(tmp_path):
    """Reference: the t test of the costs of the processes."""
    from scipy import stats

    run = Run(tmp_path)
    limit = {"load_time": {"at_most": 0.09, "unit": "s"}, "disk": {"at_most": 1, "unit": "KiB"}}
    run.budget["targets"]["cpu"]["limits"] = limit
    run.make()
    path, loads = run.path / "records/cost/cpu/int8/S1-s0.json", [0.1, 0.12, 0.13, 0.11, 0.1]
    record = json.loads(path.read_text())
    for process, load in zip(record["processes"], loads, strict=False):
        process["load_s"] = load
    path.write_text(json.dumps(record))
    run.gate()
    parts = {one.name: one for one in row(run.result(), "int8").parts}
    used = loads[: len(record["processes"])]
    expected = stats.ttest_1samp(used, 0.09, alternative="greater").pvalue
    assert parts["cost:load_time"].p_fail == pytest.approx(expected, rel=2e-3)
    assert (parts["cost:disk"].verdict, parts["cost:disk"].p_fail) == ("FAIL", None)


def test_a_cost_of_another_number_format_than_the_stored_one_is_a_note(tmp_path):
    run = Run(tmp_path).make()
    assert not [note for note in judge(run.path).notes if "computed in" in note]

    def computed(record):
        for process in record["processes"]:
            process["computed_in"] = "float32"

    edit(run.path / "records/cost/cpu/int8/S1-s0.json", computed)
    notes = [note for note in judge(run.path).notes if "computed in" in note]
    assert notes == [
        "on cpu, int8 computed in float32: this machine is slower in the number format of the weights"
    ]
