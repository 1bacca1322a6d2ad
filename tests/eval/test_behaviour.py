"""What gate.json tells beside the gain: from records of a run, and only from those that fit it."""

import numpy as np
import pytest

from eval.core.budget import load_budget
from eval.core.records import Agreement, Bins, Rerun, SampleScores, TaskScore, read_scores, write_record
from eval.core.sections import Task
from eval.gate.decision import evaluate_gate
from eval.gate.evidence import collect_evidence
from eval.score.samples import task_digest
from tests.eval.run_builder import Run

PICK = Task(kind="multiple_choice", path="pick.jsonl")


def with_accuracy(run, share=0.4):
    """Gives every score of S1 after int8 its correct tokens and bins."""
    for record in read_scores(run.path):
        if (record.arm, record.recipe) != ("S1", "int8"):
            continue
        columns = record.documents
        correct = [round(share * n) for n in columns.tokens]
        bins = {}
        for name in dict.fromkeys(columns.slice):
            n = sum(t for t, s in zip(columns.tokens, columns.slice, strict=True) if s == name)
            bins[name] = Bins(tokens=[n], confidence=[0.5 * n], correct=[(0.4 - 0.01 * record.seed) * n])
        changed = columns.model_copy(update={"correct": correct, "calibration": bins})
        write_record(run.path, record.model_copy(update={"documents": changed}))


def agree(run, record, flips, **changes):
    student = next(
        r for r in read_scores(run.path) if (r.arm, r.seed, r.recipe) == (record.arm, record.seed, "plain")
    )
    names = ["d0", "d1", "d2"]
    columns = {"id": names, "tokens": [100, 200, 300], "flips": flips, "kl_bits": [0.1 * f for f in flips]}
    fields = {"data": record.data, "student": student.provenance.artifact, "provenance": record.provenance}
    who = {"arm": record.arm, "seed": record.seed, "recipe": record.recipe, "engine": record.engine}
    reruns = {"batch": Rerun(tokens=100, flips=0, kl_bits=1e-6)}
    write_record(run.path, Agreement(**{**who, **columns, **fields, "reruns": reruns, **changes}))


def write_task_score(run, record, value, **changes):
    who = {"arm": record.arm, "seed": record.seed, "recipe": record.recipe, "engine": record.engine}
    samples = SampleScores(id=["a", "b", "c", "d"], value=value)
    fields = {"task": "pick", "source": "s" * 64, "metric": "multiple_choice", "samples": samples}
    write_record(run.path, TaskScore(**{**who, **fields, "provenance": record.provenance, **changes}))


def quality(run):
    data = run.study.data.model_copy(update={"tasks": {"pick": PICK}})
    study = run.study.model_copy(update={"data": data})
    budget = load_budget(study)
    return evaluate_gate(collect_evidence(run.path, study, budget), budget).quality


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path).make()


def test_what_was_not_measured_is_empty(run):
    qualities = quality(run)
    assert set(qualities) == {"plain", "int8", "half"}
    one = qualities["int8"]
    assert (one.accuracy, one.calibration_error, one.flips, one.kl) == ({}, {}, None, None)
    assert one.tasks == {"pick": {"S1": None, "S0": None}}
    how = {"flips and KL": "agreement", "tasks": "score"}
    assert one.how == {what: f"absorb {command} --study {run.path}" for what, command in how.items()}
    assert set(qualities["plain"].how) == {"tasks"}, "it is what others are held against"
    assert one.worst_slice in ("validation", "far")


def test_what_was_measured_is_shown_with_its_interval(run):
    with_accuracy(run)
    variants = [r for r in read_scores(run.path) if (r.arm, r.recipe) == ("S1", "int8")]
    for record in variants:
        agree(run, record, [1 + record.seed, 2, 4])
    one = quality(run)["int8"]
    assert one.accuracy["validation"].point == pytest.approx(0.4, abs=0.001)
    assert one.accuracy["validation"].unit == "share"
    off = [0.1 + 0.01 * seed for seed in range(4)]
    assert one.calibration_error["far"].point == pytest.approx(np.mean(off))
    assert one.calibration_error["far"].low < np.mean(off) < one.calibration_error["far"].high
    assert one.flips.value == pytest.approx((1 + 2 + 3 + 4 + 4 * 6) / (4 * 600))
    assert one.flips.low < one.flips.value < one.flips.high
    assert (one.flips.floor, one.kl.floor, one.kl.unit) == (0, 1e-8, "bits/token")


@pytest.mark.parametrize("field", ["student", "data"])
def test_an_agreement_of_other_artifacts_or_data_is_not_shown(run, field):
    for record in read_scores(run.path):
        if (record.arm, record.recipe) == ("S1", "int8"):
            agree(run, record, [1, 2, 4], **({field: "x" * 64} if record.seed == 2 else {}))
    assert quality(run)["int8"].flips is None


def test_task_scores_are_shown_for_every_arm_that_has_them_on_the_same_samples(run):
    for record in read_scores(run.path):
        if (record.recipe, record.arm) == ("plain", "S1"):
            write_task_score(run, record, [1, 0, 1, record.seed % 2])
        if (record.recipe, record.arm) == ("plain", "B"):
            write_task_score(run, record, [1, 0, 0, 0], **({"source": "old"} if record.seed == 2 else {}))
        if (record.recipe, record.arm) == ("int8", "S0") and record.seed != 1:
            write_task_score(run, record, [1, 0, 0, 0])
    qualities = quality(run)
    assert set(qualities["plain"].tasks) == {"pick"}
    scored = {arm for arm, score in qualities["plain"].tasks["pick"].items() if score is not None}
    assert scored == {"S1"}, "B was scored on two versions of the task"
    assert set(qualities["plain"].tasks["pick"]) == {"B", "S0", "S1", "CE"}, "no teacher is run by itself"
    one = qualities["plain"].tasks["pick"]["S1"]
    assert (one.point, one.unit) == (pytest.approx((2 * 2 + 2 * 3) / 16), "share")
    assert one.low < one.point < one.high
    assert qualities["int8"].tasks["pick"] == {"S1": None, "S0": None}, "one seed was not scored"


def test_scores_on_another_version_of_a_task_file_that_is_here_are_not_shown(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pick.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 0}\n')
    for record in read_scores(run.path):
        if (record.recipe, record.arm) == ("plain", "S1"):
            write_task_score(run, record, [1, 0, 1, 0])
        if (record.recipe, record.arm) == ("plain", "B"):
            write_task_score(run, record, [1, 0, 0, 0], source=task_digest(PICK))
    scores = quality(run)["plain"].tasks["pick"]
    assert [arm for arm, score in scores.items() if score is not None] == ["B"]
