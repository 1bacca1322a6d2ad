"""The gate's verdicts through its command line, on synthetic runs."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.core.artifacts import file_sha256
from eval.core.config import ROOT
from eval.core.errors import UserError
from eval.core.gate_file import GateFile
from eval.gate.decision import judge
from eval.report.__main__ import refuse_stale
from eval.stats.multiplicity import holm
from tests.eval.run_builder import GAINS, HOST, Run, change_score, copy_run, edit, row


@pytest.fixture
def toy(tmp_path: Path) -> Run:
    return Run(tmp_path)


def verdicts(result: GateFile, recipe: str) -> dict[str, str]:
    return {part.name: part.verdict for part in row(result, recipe).parts}


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run; tests that change it take a copy."""
    return Run(tmp_path_factory.mktemp("gate")).make().folder


@pytest.fixture(scope="module")
def passed(
    toy_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, subprocess.CompletedProcess[str]]:
    run = copy_run(toy_folder, tmp_path_factory.mktemp("passed"))
    return run, run.gate()


def test_pass(passed):
    run, done = passed
    assert (done.returncode, done.stderr) == (0, "")
    result = run.result()
    assert result.verdict == "PASS"
    assert result.recommended == {"cpu": "int8", "gpu": None}
    assert row(result, "int8").verdict == "PASS"
    assert row(result, "half").verdict == "FAIL"
    parts = verdicts(result, "half")
    assert (parts["assay"], parts["retention"], parts["guard"]) == ("PASS", "FAIL", "FAIL")
    assert (parts["retention:far"], parts["cost:decode_p50"]) == ("FAIL", "PASS")
    assert "int8 * on cpu: PASS" in done.stdout
    assert "PASS: on cpu ship int8: it keeps 0.7" in done.stdout
    assert re.search(r"judged on \d{4}-\d\d-\d\d by absorb .*, budget test\n", done.stdout)


def test_numbers(passed):
    result = passed[0].result()
    share = result.kept_by_student.over_control
    assert share.point == pytest.approx((0.12 - 0.03) / 0.12, abs=0.05)
    assert share.low < share.point < share.high
    assert share.bootstrap_low == pytest.approx(share.low, abs=0.1)
    assert result.kept_by_student.over_ce.point == pytest.approx(0.10 / 0.12, abs=0.05)
    assert result.kept_by_student.over_base.point == pytest.approx(1.0, abs=0.05)
    assert result.teacher_gain.point == pytest.approx(0.12, abs=0.01)
    plain, int8 = row(result, "plain"), row(result, "int8")
    assert (plain.kept_of_student.point, plain.guard_share.point) == (1.0, 1.0)
    assert int8.cost["decode_p50"].relative.point == pytest.approx(0.6, rel=0.02)
    assert int8.cost["decode_p50"].relative.upper < 0.65  # slow rounds cancel
    assert int8.cost["decode_p50"].upper >= int8.cost["decode_p50"].value
    assert int8.cost["prefill_p99"].value is None
    assert int8.cost["prefill_p99"].needs == 299
    assert result.power.power_now > 0.9
    scored = result.scores["S1"]["validation"]
    assert scored.low < scored.point < scored.high


def test_scores_and_hashes_are_those_of_the_records(passed):
    run, _ = passed
    result = run.result()
    totals = []
    for seed in run.seeds:
        record = json.loads((run.path / f"records/score/int8/S1-s{seed}.json").read_text())
        documents = record["documents"]
        selected = [i for i, name in enumerate(documents["slice"]) if name == "far"]
        totals.append(
            sum(documents["bits"][i] for i in selected) / sum(documents["bytes"][i] for i in selected)
        )
        assert row(result, "int8").hashes.artifact[str(seed)] == record["provenance"]["artifact"]
    assert row(result, "int8").scores["far"].point == pytest.approx(np.mean(totals))
    assert result.provenance.config == run.study.hash()
    for path, sha256 in result.provenance.records.items():
        assert file_sha256(run.path / path) == sha256


def test_the_chain_multiplies_to_the_kept_share(toy_folder: Path, tmp_path: Path):
    run = copy_run(toy_folder, tmp_path)
    (tmp_path / "int8.yaml").write_text("name: int8\ntarget: cpu\npasses: [{pass: a}]\n")
    (tmp_path / "half.yaml").write_text("name: half\ntarget: cpu\npasses: [{pass: a}, {pass: b}]\n")
    run.gate("--recipes", json.dumps([str(tmp_path / f"{name}.yaml") for name in ("int8", "half")]))
    links = {v.recipe: [(link.step, link.over) for link in v.chain] for v in run.result().variants}
    first = ("distil", "teacher")
    assert links == {
        "plain": [first],
        "int8": [first, ("int8", "plain")],
        "half": [first, ("int8", "plain"), ("half", "int8")],
    }
    half = row(run.result(), "half")
    assert np.prod([link.share.point for link in half.chain]) == pytest.approx(half.kept_share.point)
    last = half.chain[-1].share
    assert last.low < last.point < last.high
    assert last.bootstrap_low == pytest.approx(last.low, abs=0.2)


def test_what_a_verdict_is_conditional_on_stands_beside_it(toy_folder: Path, tmp_path: Path):
    run = copy_run(toy_folder, tmp_path)
    for seed in run.seeds:
        change_score(lambda r: r["provenance"].update(artifact="one teacher"), f"plain/T1-s{seed}")(run)
        path = run.path / f"students/S1/s{seed}/manifest.json"
        edit(path, lambda m: m["parents"].update(teacher="one teacher"))
    done = run.gate()
    assert (
        "note: all 4 seeds share one teacher T1 (one teacher): the verdict holds for this very" in done.stdout
    )
    assert any("dated before their artifact was made" in note for note in run.result().notes)
    assert run.result().power.power_low <= run.result().power.power_now <= run.result().power.power_high


def test_same_records_same_bytes(passed):
    run, _ = passed
    first = (run.path / "gate.json").read_bytes()
    run.gate()
    assert (run.path / "gate.json").read_bytes() == first


def test_unmeasured_target_says_how(passed):
    run, done = passed
    variant = row(run.result(), "plain", "gpu")
    assert (variant.measured, variant.verdict) == (False, "INCONCLUSIVE")
    assert variant.how.startswith(f"absorb cost --study {run.path} --target gpu  # where there is a CUDA")
    assert variant.how.endswith(f"then here: absorb merge --study {run.path} COPY")
    assert variant.how in done.stdout
    assert not [v for v in run.result().variants if (v.recipe, v.target) == ("int8", "gpu")]


def test_required_target_without_costs_is_inconclusive(toy: Run):
    toy.budget["targets"]["gpu"]["required"] = True
    done = toy.make().gate()
    assert done.returncode == 2
    assert "its cost was not measured on gpu" in done.stdout


def test_costs_of_an_accelerator_count(toy: Run):
    toy.make()
    gpu = HOST.model_copy(update={"host": "other", "device": "Some GPU"})
    toy.cost("plain", 1.0, "gpu", gpu)
    toy.cost("half", 0.5, "gpu", gpu)
    toy.gate()
    variant = row(toy.result(), "half", "gpu")
    assert variant.measured
    assert variant.cost["decode_p50"].relative.of == "plain"
    assert toy.result().recommended["gpu"] == "plain"


def test_fail(toy: Run):
    toy.gains |= {"S1": 0.035}
    done = toy.make().gate()
    assert done.returncode == 1
    assert toy.result().verdict == "FAIL"
    assert "less than 0.5 of the teacher's gain is kept on validation" in done.stdout


def test_fail_by_cost(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {"decode_p50": {"at_most": 0.5, "unit": "ms"}}
    done = toy.make().gate()
    assert done.returncode == 1
    assert "decode_p50 is at least" in done.stdout


def test_no_teacher_gain_is_inconclusive_whatever_else_fails(toy: Run):
    toy.gains |= {"T1": 0.0, "S1": -0.05}
    done = toy.make().gate()
    assert done.returncode == 2
    assert "cannot see the gain" in done.stdout
    assert verdicts(toy.result(), "int8")["retention"] == "FAIL"


def test_a_harmful_method_fails_in_plain_words(toy: Run):
    toy.gains |= {"T1": -0.05, "S1": 0.0}
    done = toy.make().gate()
    assert done.returncode == 1
    harm = "there is no gain to keep: the method makes its teacher worse on validation (by 0.0"
    assert f"FAIL: {harm}" in done.stdout
    assert {v.verdict for v in toy.result().variants} == {"FAIL"}
    assert all(v.reason.startswith(harm) for v in toy.result().variants)
    assert toy.result().kept_by_student.over_control.point is None


def test_a_method_that_harms_on_a_mandatory_slice_fails(toy: Run):
    toy.far = {"T1": -0.05}
    assert toy.make().gate().returncode == 1
    assert verdicts(toy.result(), "int8")["assay"] == "PASS"
    assert "makes its teacher worse on far" in row(toy.result(), "int8").reason


def test_a_slice_without_a_teacher_gain_cannot_pass(toy: Run):
    toy.far = {"T1": 0.0}
    done = toy.make().gate()
    assert done.returncode == 2
    assert "no teacher gain is visible on far" in done.stdout
    assert row(toy.result(), "int8").slices["far"].kept_share.point is None


def test_a_gain_that_rounding_could_make_is_inconclusive(toy: Run):
    toy.noise = 1e-9
    toy.gains = {name: gain * 1e-6 for name, gain in GAINS.items()}
    assert toy.make().gate().returncode == 2
    assert verdicts(toy.result(), "int8")["assay"] == "INCONCLUSIVE"
    assert verdicts(toy.result(), "int8")["retention"] == "PASS"


def test_placebo_without_any_difference_is_inconclusive(toy: Run):
    toy.noise = 0.0
    toy.gains = dict.fromkeys(GAINS, 0.0)
    done = toy.make().gate()
    assert done.returncode == 2
    assert "do not vary at all" in done.stdout
    assert toy.result().kept_by_student.over_control.point is None


def test_one_seed_is_inconclusive(toy: Run):
    toy.seeds = [0]
    done = toy.make().gate()
    assert done.returncode == 2
    assert "one seed says nothing about other seeds" in done.stdout
    assert toy.result().teacher_gain.low is None
    assert toy.result().power is None


def test_a_student_worse_than_its_fallback_never_passes(toy: Run):
    toy.gains |= {"S1": -0.05, "S0": -0.14}
    assert toy.make().gate().returncode == 1
    parts = verdicts(toy.result(), "int8")
    assert (parts["retention"], parts["fallback"]) == ("PASS", "FAIL")


def test_only_a_limit_of_the_budget_keeps_a_variant_slower_than_its_parent_away(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {"disk": {"at_most": 22, "unit": "KiB"}}
    toy.make()
    toy.cost("plain", 0.3)
    toy.gate()
    result = toy.result()
    assert (row(result, "plain").verdict, row(result, "int8").verdict) == ("FAIL", "PASS")
    assert row(result, "plain").holm_p is None
    assert row(result, "int8").holm_p == pytest.approx(
        2 * row(result, "int8").p
    )  # it and `half` are affordable
    assert (result.verdict, result.recommended["cpu"]) == ("PASS", "int8")
    toy.budget["targets"]["cpu"]["limits"]["decode_p50"] = {"at_most": 1.0, "of": "plain"}
    (toy.folder / "budget.yaml").write_text(yaml.safe_dump(toy.budget))
    toy.gate("--budget", str(toy.folder / "budget.yaml"))
    assert toy.result().recommended["cpu"] is None
    assert "decode_p50 is at least" in row(toy.result(), "int8").reason


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda r: r["provenance"]["machine"].update(host="elsewhere"),
            "host ['elsewhere'], plain has ['box']",
        ),
        (lambda r: r["provenance"].update(time="2026-01-02T00:00:00+00:00"), "rounds of ['2026-01-02"),
        (lambda r: r.update(prompts="random"), "prompts ['random'], plain has ['training documents']"),
    ],
)
def test_a_ratio_of_other_rounds_decides_nothing(toy_folder: Path, tmp_path: Path, change, difference: str):
    run = copy_run(toy_folder, tmp_path)
    edit(run.path / "records/cost/cpu/int8/S1-s0.json", change)
    run.gate("--budget", str(tmp_path / "budget.yaml"))
    apart, plain = row(run.result(), "int8"), row(run.result(), "plain")
    assert (apart.verdict, apart.recommended, apart.measured) == ("INCONCLUSIVE", False, True)
    assert f"decode_p50 cannot be compared: int8 has {difference}" in apart.reason
    assert apart.cost["decode_p50"].relative is None
    assert (apart.how, plain.how) == (f"absorb cost --study {run.path} --target cpu", None)
    assert (plain.verdict, plain.recommended) == ("PASS", True)


def test_a_ratio_to_what_was_not_measured_decides_nothing(toy_folder: Path, tmp_path: Path):
    run = copy_run(toy_folder, tmp_path)
    (run.path / "records/cost/cpu/plain/S1-s0.json").unlink()
    assert run.gate("--budget", str(tmp_path / "budget.yaml")).returncode == 2
    variant = row(run.result(), "int8")
    assert (variant.verdict, variant.how) == ("INCONCLUSIVE", row(run.result(), "plain").how)
    assert "int8 was measured on cpu, plain was not" in variant.reason


@pytest.mark.parametrize("limit", [1.25, 1.27])
def test_limits_are_held_against_bounds(toy: Run, limit: float):
    """The estimate is just above or below the limit; three processes do not show where the truth is."""
    toy.budget["targets"]["cpu"]["limits"] = {"decode_p50": {"at_most": limit, "unit": "ms"}}
    assert toy.make().gate().returncode == 2
    parts = {name: row(toy.result(), name).parts[-1] for name in ("plain", "int8")}
    assert (parts["int8"].estimate < limit) == (limit == 1.27)
    assert parts["int8"].low < limit < parts["int8"].high
    assert (parts["int8"].verdict, parts["plain"].verdict) == ("INCONCLUSIVE", "FAIL")


def test_too_few_requests_are_no_percentile(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {"prefill_p99": {"at_most": 50, "unit": "ms"}}
    done = toy.make().gate()
    assert done.returncode == 2
    assert "30 requests; prefill_p99 needs 299 at least" in done.stdout


def test_documents_in_another_order_are_the_same_documents(passed, toy_folder: Path, tmp_path: Path):
    run = copy_run(toy_folder, tmp_path)
    change_score(lambda r: r.update(documents={n: c and c[::-1] for n, c in r["documents"].items()}))(run)
    run.gate()
    assert row(run.result(), "plain").kept_share == row(passed[0].result(), "plain").kept_share


def test_records_of_recipes_that_the_study_no_longer_names_are_left_alone(
    passed, toy_folder: Path, tmp_path: Path
):
    run = copy_run(toy_folder, tmp_path)
    shutil.copytree(run.path / "records/score/half", run.path / "records/score/old")
    for path in (run.path / "records/score/old").iterdir():
        edit(path, lambda r: r.update(recipe="old", data="f" * 64))
    shutil.copy(run.path / "records/score/plain/B-s2.json", run.path / "records/score/plain/B-s9.json")
    edit(run.path / "records/score/plain/B-s9.json", lambda r: r.update(seed=9))
    assert run.gate().returncode == 0
    assert run.result().variants[0] == passed[0].result().variants[0]
    assert {f"records/score/{name}.json" for name in ("old/S1-s0", "plain/B-s9")} <= set(
        run.result().provenance.records
    )
    check_freshness(run)


def check_freshness(run: Run) -> None:
    """The report takes what the gate wrote, and notices a record that came later."""
    refuse_stale(run.result(), run.study, run.path, "run the gate")
    shutil.copytree(run.path / "records/score/half", run.path / "records/score/new")
    with pytest.raises(UserError, match=r"score/new/S0-s0.json was absent"):
        refuse_stale(run.result(), run.study, run.path, "run the gate")


def test_picking_among_many_is_corrected(toy: Run):
    """Just significant alone, but not as one of three that could have been picked."""
    toy.seeds, toy.noise = [0, 1, 2], 0.006
    toy.gains |= {"S1": 0.14}
    toy.budget |= {"slices": {}}
    toy.budget["targets"]["cpu"]["limits"] = {}
    done = toy.make().gate()
    assert done.returncode == 2
    result = toy.result()
    rows = [v for v in result.variants if v.target == "cpu"]
    assert [v.holm_p for v in rows] == pytest.approx(holm([v.p for v in rows]))
    assert (row(result, "int8").verdict, result.recommended["cpu"]) == ("PASS", None)
    assert "passes alone, but not after the correction" in result.reason


def fields(model: dict) -> set[str]:
    """Names of all fields of a JSON schema."""
    inner = [model, *model.get("$defs", {}).values()]
    return {name for part in inner for name in part.get("properties", {})}


def test_the_documentation_names_every_field():
    text = (ROOT / "docs" / "statistics.md").read_text()
    names = fields(GateFile.model_json_schema())
    assert {"holm_p", "bootstrap_low", "needs", "machines"} <= names
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_costs_of_another_library_or_processor_are_a_note(toy_folder, tmp_path):
    run = copy_run(toy_folder, tmp_path)
    assert not [note for note in judge(run.path).notes if "measured with different" in note]

    def elsewhere(record):
        record["provenance"]["machine"]["cpu"] = "another"
        record["provenance"]["versions"]["torch"] = "0.1"

    edit(run.path / "records/cost/cpu/int8/S1-s0.json", elsewhere)
    notes = [note for note in judge(run.path).notes if "measured with different" in note]
    assert [note.split(" (")[0] for note in notes] == [
        "costs on cpu were measured with different cpu",
        "costs on cpu were measured with different torch",
    ]
