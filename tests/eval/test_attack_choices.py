"""Attacks by choosing again: another budget, another name, or fewer rivals once a verdict is known."""

import shutil
from datetime import UTC, datetime

import pytest
import yaml

from eval.core.artifacts import read_manifest
from eval.core.plan import fix_plan, read_plan
from eval.core.study import load_study
from eval.gate.history import write_opening
from eval.signoff.verify import row_of, signable_verdict, to_waive
from tests.eval.run_builder import GAINS, Run, an_opening, gate

LATE = "the budget was fixed on {}, after the first figure or verdict"


def lower_budget(run: Run) -> None:
    budget = yaml.safe_load((run.folder / "budget.yaml").read_text())
    (run.folder / "budget.yaml").write_text(
        yaml.safe_dump({**budget, "f": 0.1, "g": 0.1, "slices": {"far": 0.1}})
    )


def put_again(run: Run, records: dict) -> None:
    """What scoring and measuring the same models once more writes."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for path, text in records.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(run.time, now))


@pytest.fixture
def failed(tmp_path):
    """A run whose int8 failed, as its budget then was."""
    run = Run(tmp_path)
    run.recipes = {"int8": ("openvino", 0.3, 0.6)}
    run.make()
    gate(run)
    return run


def doubt(run: Run) -> str:
    result = run.result()
    row = row_of(result, "int8", "cpu")
    return to_waive(result, *signable_verdict(result, row))


def test_a_budget_lowered_after_a_verdict_is_not_fixed_where_the_records_are_deleted(failed):
    plan = read_plan(failed.path)
    records = {path: path.read_text() for path in (failed.path / "records").rglob("*.json")}
    shutil.rmtree(failed.path / "records")
    lower_budget(failed)
    assert fix_plan(load_study(failed.path)) == plan
    put_again(failed, records)
    gate(failed)
    assert row_of(failed.result(), "int8", "cpu").verdict == "FAIL"
    assert "f was 0.5, is 0.1 in the file of the budget" in "\n".join(failed.result().notes)


def test_a_budget_lowered_with_new_settings_after_a_verdict_needs_a_waiver(failed, monkeypatch):
    """The settings change, so that a plan may be fixed anew."""
    before = load_study(failed.path).hash
    monkeypatch.setattr("eval.core.study.Study.hash", lambda study: "other settings")
    lower_budget(failed)
    plan = fix_plan(load_study(failed.path))
    monkeypatch.setattr("eval.core.study.Study.hash", lambda study: before())
    records = {path: path.read_text() for path in (failed.path / "records").rglob("*.json")}
    put_again(failed, records)
    assert plan.budget.f == 0.1
    gate(failed)
    assert row_of(failed.result(), "int8", "cpu").verdict == "PASS"
    assert doubt(failed) == LATE.format(plan.time)
    assert LATE.format(plan.time) in failed.result().notes


def test_the_same_budget_fixed_with_new_settings_needs_none(failed, monkeypatch):
    before = load_study(failed.path).hash
    monkeypatch.setattr("eval.core.study.Study.hash", lambda study: "other settings")
    fix_plan(load_study(failed.path))
    monkeypatch.setattr("eval.core.study.Study.hash", lambda study: before())
    put_again(failed, {path: path.read_text() for path in (failed.path / "records").rglob("*.json")})
    gate(failed)
    assert doubt(failed).startswith("the verdict is FAIL: ")
    assert "was fixed" not in doubt(failed)


class TwinRun(Run):
    """`int8b` has the bytes of `int8`."""

    def artifact(self, place, parents=None, content=""):
        return super().artifact(place, parents, place.replace("int8b", "int8"))


def test_what_failed_on_the_test_documents_fails_under_another_name(tmp_path):
    run = TwinRun(tmp_path)
    run.recipes = {
        "int8": ("openvino", 1.0, 0.6),
        "int8b": ("openvino", 1.0, 0.6),
        "half": ("torch", 0.9, 0.8),
    }
    run.make()
    first, twin = (read_manifest(run.path / f"variants/{name}/S1/s0").hash for name in ("int8", "int8b"))
    assert first == twin
    gate(run)
    opening = an_opening(run, 1, "FAIL")
    names = {name: sha for name, sha in opening.artifacts.items() if name.split("/")[2] in ("plain", "int8")}
    write_opening(run.path, opening.model_copy(update={"artifacts": names}))
    gate(run)
    result = run.result()
    signed = {v.recipe: signable_verdict(result, v)[0] for v in result.variants if v.target == "cpu"}
    assert (signed["int8"], signed["int8b"], signed["half"]) == ("FAIL", "FAIL", "PASS")
    assert result.test_set.history[0].seen == ["int8", "int8b"]


def test_a_rival_that_is_taken_out_of_the_study_is_told(tmp_path):
    run = Run(tmp_path)
    run.gains = {**GAINS, "S1": 0.12, "T1": 0.135}
    run.make()
    path = run.path / "study.yaml"
    study = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**study, "rivals": {"T1": "the mean of its weights"}}, sort_keys=False))
    gate(run)
    assert run.result().rivals[-1].beats
    path.write_text(yaml.safe_dump({**study, "rivals": {}}, sort_keys=False))
    (run.path / "gate.json").unlink()
    told = "an earlier verdict of this run rested on more evidence: the rival T1, now not"
    for _ in range(2):
        gate(run)
        assert told in run.result().anomalies
