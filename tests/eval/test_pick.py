"""What is recommended, and what stands beside it: rivals that win, what is too good, what is gone."""

import dataclasses
import json

import numpy as np
import pytest

from eval.core.budget import load_budget
from eval.core.checks import check_budget
from eval.core.errors import UserError
from eval.gate.decision import judge
from eval.gate.evidence import collect_evidence
from eval.gate.quality import GAIN_OVER_CE, compare_rivals, quality_parts
from eval.stats.crossed import crossed_mean
from tests.eval.run_builder import HOST, Run, copy_run, edit, gate, row


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("pick")).make().folder


@pytest.fixture
def toy(toy_folder, tmp_path) -> Run:
    return copy_run(toy_folder, tmp_path)


def judged(run: Run, **changes):
    """The verdict with a budget of its own."""
    import yaml

    (run.folder / "budget.yaml").write_text(yaml.safe_dump({**run.budget, **changes}))
    return judge(run.path, str(run.folder / "budget.yaml"))


def test_among_variants_as_fast_the_larger_share_is_picked(tmp_path):
    """`quick` is 1 % faster by its median, which noise explains; it keeps less of the gain."""
    run = Run(tmp_path, recipes={"quick": ("torch", 0.8, 0.5), "good": ("torch", 1.0, 0.5)})
    run.make()
    noise = np.random.default_rng(3).normal(0.99, 0.03, 3)
    path = run.path / "records/cost/cpu/quick/S1-s0.json"
    for turn, factor in enumerate(noise):
        edit(
            path,
            lambda r, turn=turn, factor=factor: r["processes"][turn].update(
                decode_ms=[ms * factor for ms in r["processes"][turn]["decode_ms"]]
            ),
        )
    result = judge(run.path)
    quick, good = (row(result, name) for name in ("quick", "good"))
    assert quick.kept_share.point < good.kept_share.point
    assert (result.recommended["cpu"], result.as_good["cpu"]) == ("good", ["quick"])
    assert "on cpu ship good (as good: quick): it keeps" in result.reason
    assert "plain" not in result.as_good["cpu"], "it is slower beyond doubt"


def test_a_variant_without_its_parent_on_the_device_can_be_recommended(tmp_path):
    run = Run(tmp_path, recipes={"alone": ("torch", 1.0, 0.5)}).make()
    run.cost("alone", 0.5, "gpu", HOST.model_copy(update={"host": "other", "device": "Some GPU"}))
    result = judge(run.path)
    assert (row(result, "alone", "gpu").verdict, result.recommended["gpu"]) == ("PASS", "alone")


def test_a_rival_that_wins_is_in_the_headline_and_a_budget_can_demand_to_beat_it(tmp_path):
    run = Run(tmp_path)
    run.gains |= {"CE": 0.20}
    result = judge(run.make().path)
    (rival,) = result.rivals
    assert (rival.arm, rival.beats, result.verdict) == ("CE", True, "PASS")
    assert result.reason.startswith(
        "absorbed, and not worth it: plain training on the same rows is better by 0.0"
    )
    lead = crossed_mean(
        -collect_evidence(run.path, run.study, load_budget(run.study)).gain("validation", GAIN_OVER_CE)
    )
    assert (rival.lead.point, rival.lead.low) == pytest.approx((lead.point, lead.bounds(0.05)[0]))
    demanding = judged(run, over_ce=0.0)
    parts = {part.name: part.verdict for part in row(demanding, "int8").parts}
    assert (parts["over_ce"], demanding.verdict) == ("FAIL", "FAIL")


def test_a_student_that_beats_plain_training_passes_what_is_demanded_of_it(toy):
    result = judged(toy, over_ce=0.5)
    assert [one.beats for one in result.rivals] == [False]
    assert "not worth it" not in result.reason
    assert next(p.verdict for p in row(result, "int8").parts if p.name == "over_ce") == "PASS"
    without = toy.study.model_copy(update={"ce_arm": False})
    with pytest.raises(UserError, match="over_ce: the study has no arm CE"):
        check_budget(load_budget(toy.study, str(toy.folder / "budget.yaml")), without, ["validation", "far"])


def test_of_on_policy_students_the_control_without_a_teacher_counts_like_s0(tmp_path):
    run = Run(tmp_path)
    run.gains |= {"CE": 0.10}  # half of the teacher's gain would leave 0.06
    run.make()
    budget = load_budget(run.study)
    evidence = collect_evidence(run.path, run.study, budget)
    study = run.study.model_copy(update={"ce_arm": "on_policy"})
    on_policy = dataclasses.replace(evidence, study=study)
    assert "over_ce" not in {part.name for part in quality_parts(evidence, budget, "int8")}
    part = next(part for part in quality_parts(on_policy, budget, "int8") if part.name == "over_ce")
    assert part.verdict == "FAIL"
    assert "training on its own texts without a teacher by 0.5 of" in part.reason
    assert compare_rivals(on_policy, 0.05)[0].what == "training on its own texts without a teacher"


def test_the_interval_that_is_shown_is_the_one_that_decides(toy):
    """Of f just below and just above the lower end the first passes, the second does not."""
    share = row(judge(toy.path), "int8").kept_share
    for f, verdict in (
        (share.low - 1e-4, "PASS"),
        (share.low + 1e-4, "INCONCLUSIVE"),
        (share.high + 1e-4, "FAIL"),
    ):
        result = judged(toy, f=f, g=0.1, slices={})
        part = next(p for p in row(result, "int8").parts if p.name == "retention")
        assert (part.verdict == "PASS") == (verdict == "PASS"), f
        assert verdict != "FAIL" or part.p_fail < 0.05
        assert result.level == pytest.approx(0.9)
    assert "(90 % interval" in judge(toy.path).reason


def test_two_seeds_say_so_first(tmp_path):
    result = judge(Run(tmp_path, seeds=[0, 1]).make().path)
    assert result.reason.startswith("from two seeds alone: ")
    assert result.notes[0].startswith("two seeds tell little of others")


def test_what_is_too_good_is_told(tmp_path):
    run = Run(tmp_path, recipes={"better": ("torch", 1.3, 0.5), "int8": ("torch", 1.0, 0.6)})
    run.gains |= {"S1": 0.15}
    run.make()
    rng = np.random.default_rng(8)
    for seed in run.seeds:  # else it differs from its student by the same on every document
        noise = rng.normal(0, 2.0, sum(run.sizes.values())).tolist()
        change = lambda r, noise=noise: r["documents"].update(  # noqa: E731
            bits=[b + n for b, n in zip(r["documents"]["bits"], noise, strict=True)]
        )
        edit(run.path / f"records/score/better/S1-s{seed}.json", change)
    (tmp_path / "better.yaml").write_text("name: better\ntarget: cpu\npasses: [{pass: int8}, {pass: more}]\n")
    result = judge(run.path)
    first, second, third = result.anomalies
    assert first.startswith("better is better than the student that it was made of by 0.0")
    assert second.startswith("better is better than int8 before it by 0.0")
    assert third.startswith("the student S1 is better than its teacher T1 by 0.0")
    for anomaly in result.anomalies:
        assert " on validation; by 0.0" in anomaly
        assert " on far (p by Holm over 8 comparisons): " in anomaly
    assert "ANOMALOUS: better is better than" in run.gate().stdout
    assert judge(Run(tmp_path / "plain").make().path).anomalies == []


def test_evidence_that_is_gone_since_the_last_verdict_is_named_for_ever(toy):
    gate(toy)
    (toy.path / "records/cost/cpu/half/S1-s0.json").unlink()
    told = "an earlier verdict of this run rested on more evidence: "
    for _ in range(2):
        toy.gate()
        (anomaly,) = json.loads((toy.path / "gate.json").read_text())["anomalies"]
        assert anomaly.startswith(told)
        assert "3 variants measured, summed over targets, now 2" in anomaly
    (toy.path / "gate.json").unlink()
    gate(toy)
    assert toy.result().anomalies == [anomaly], "every verdict of gate-runs.jsonl says how much there was"
    assert [run.extent.variants for run in toy.result().runs] == [3, 2]
    assert toy.result().extent.variants == 3
