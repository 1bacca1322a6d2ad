"""A challenge changes one thing at a time, says which change the claim does not survive, and resumes."""

import json
import os
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from eval.challenge.__main__ import Challenge, show
from eval.challenge.doses import doses_of, draw, sentences
from eval.challenge.outcome import (
    COLLAPSES,
    OPEN,
    SURVIVES,
    Claim,
    best_ce_train,
    claims_of,
    conclude,
    judge_claims,
    rare_failures,
    rival_claims,
)
from eval.challenge.rows import DAMAGED, PLACEBO, SAME, plan_rows
from eval.challenge.runs import run_study, share_artifacts
from eval.core.commands import new_console
from eval.core.errors import UserError
from eval.core.sections import Corruption, Optimizer, Train
from eval.core.study import load_study
from eval.stats.crossed import crossed_mean
from tests.eval.run_builder import GAINS, Run
from tests.helpers import ROOT, run, table_width


def evidence_of(folder, **changes):
    from eval.core.budget import load_budget
    from eval.gate.evidence import collect_evidence

    made = Run(folder, **changes).make()
    study = load_study(made.path)
    budget = load_budget(study)
    return collect_evidence(made.path, study, budget), budget


def table(mean: float, noise: float, rng) -> np.ndarray:
    return mean + rng.normal(0, noise, (4, 1)) + rng.normal(0, noise, (4, 30))


def test_rows_change_one_thing_and_the_cheapest_come_first():
    rows, skipped = plan_rows(load_study("default"), ["long=--train.epochs 5 --ce_arm false"])
    assert [row.trains for row in rows] == sorted(row.trains for row in rows)
    source = ROOT / "configs" / "studies" / "default.yaml"
    plain = load_study(source).model_dump(mode="json", exclude={"name", "runs", "recipes"})
    changed = {}
    for row in rows:
        study = row.study(source, ROOT / "elsewhere").model_dump(mode="json")
        assert study["recipes"] == []
        changed[row.name] = {key for key, value in plain.items() if study[key] != value}
    assert changed[SAME] == set()
    assert changed["long"] == {"train", "ce_arm"}
    assert {name: keys for name, keys in changed.items() if len(keys) != 1} == {
        SAME: set(),
        "long": {"train", "ce_arm"},
    }
    assert {"half_rate", "double_rate", "half_data", "other_seeds", "member_less", PLACEBO} <= changed.keys()
    assert "other data of the same domain" in skipped


def test_a_row_of_ones_own_may_hold_lists_and_several_keys():
    text = "far=--data.documents [{kind: folder, path: my/texts}, {kind: pydoc}] --train.epochs 3"
    rows, _ = plan_rows(load_study("tiny"), [text])
    study = rows[-1].study(ROOT / "configs" / "studies" / "tiny.yaml", ROOT / "elsewhere")
    assert [source.kind for source in study.data.documents] == ["folder", "pydoc"]
    assert study.train.epochs == 3


def test_of_a_trained_model_no_other_size_can_be_made_and_that_is_said():
    rows, skipped = plan_rows(load_study("smollm2"), [])
    assert not {"half_depth", "double_depth"} & {row.name for row in rows}
    assert {"another size", "another base"} <= skipped.keys()
    assert "--row 'other_base=--base.path PATH'" in skipped["another base"]


def test_each_part_of_a_chain_is_put_to_the_test_alone():
    rows, _ = plan_rows(load_study(ROOT / "configs/methods/chain.yaml"), [])
    parts = [row for row in rows if row.name.startswith("only_part")]
    assert [row.words for row in parts] == [("--method.settings.tested", str(i)) for i in range(2)]


@pytest.mark.parametrize("text", ["long", "Long=--a 1", "as_it_is=--a 1", "long=train.epochs 2"])
def test_a_row_of_another_form_is_refused(text):
    with pytest.raises(UserError, match="expected a new name"):
        plan_rows(load_study("tiny"), [text])


def test_a_claim_survives_collapses_or_is_open_by_the_crossed_test():
    rng = np.random.default_rng(0)
    gain = table(0.1, 0.002, rng)
    cases = {"kept": 0.08, "lost": 0.01, "half": 0.05}
    claims = []
    for name, mean in cases.items():
        kept = table(mean, 0.002, rng) if name != "half" else gain * 0.5 + table(0.0, 0.02, rng)
        claims.append(Claim(name, name, "half", gain, kept, kept - 0.5 * gain, needs="9 seeds"))
    outcomes = {one.name: one for one in judge_claims(claims, 0.05)}
    assert {name: one.verdict for name, one in outcomes.items()} == {
        "kept": SURVIVES,
        "lost": COLLAPSES,
        "half": OPEN,
    }
    low, high = crossed_mean(claims[0].margin).bounds(0.05)
    assert (outcomes["kept"].margin.low, outcomes["kept"].margin.high) == (low, high)
    assert outcomes["half"].needs == "9 seeds"
    assert conclude(list(outcomes.values())) == "collapses: lost"
    assert conclude([outcomes["kept"], outcomes["half"]]).startswith("cannot be told: half (it would take 9")
    assert conclude([outcomes["kept"]]).startswith("survives; weakest: kept")


def test_one_of_many_rows_collapses_only_after_holm():
    rng = np.random.default_rng(1)
    gain, noise, kept = (table(mean, 0.003, rng) for mean in (0.1, 0.0, 0.09))
    p_fail = (crossed_mean(noise - noise.mean() - harm).p_above(0.0) for harm in np.linspace(0, 0.02, 200))
    harm = np.linspace(0, 0.02, 200)[next(i for i, p in enumerate(p_fail) if p < 0.03)]
    weak = noise - noise.mean() - harm
    lone = Claim("weak", "weak", "above", gain, weak, weak, share=False)
    others = [Claim(f"r{i}", "", "half", gain, kept, kept - 0.5 * gain) for i in range(11)]
    assert judge_claims([lone], 0.05)[0].verdict == COLLAPSES
    assert judge_claims([lone, *others], 0.05)[0].verdict == OPEN


def test_an_empty_method_survives_unless_a_gain_is_credited_to_it():
    rng = np.random.default_rng(2)
    nothing, credited = np.zeros((4, 30)), table(0.05, 0.002, rng)
    for kept, verdict in ((nothing, SURVIVES), (table(0.0, 0.01, rng), SURVIVES), (credited, COLLAPSES)):
        claim = Claim(PLACEBO, "", "", nothing, kept, -kept, share=False, empty=True)
        assert judge_claims([claim], 0.05)[0].verdict == verdict


def test_the_rival_is_taken_at_its_best_rate(tmp_path, capsys):
    gains = {"B": 0.0, "T0": 0.0, "T1": 0.12, "S0": 0.03, "S1": 0.12, "CE": 0.02}
    same, budget = evidence_of(tmp_path / "same", gains=gains)
    better, _ = evidence_of(tmp_path / "better", gains=gains | {"CE": 0.2, "S0": 0.1})
    rows = {SAME: same, "half_rate": better}
    of_one = {claim.name: claim for claim in rival_claims({SAME: same, "half_rate": same}, budget)}
    claims = {claim.name: claim for claim in rival_claims(rows, budget)}
    assert claims["best_CE"].what == "CE at its best learning rate (x 0.5)"
    assert of_one["best_CE"].lead.mean() == pytest.approx(0.10, abs=0.01)
    assert claims["best_CE"].lead.mean() == pytest.approx(-0.08, abs=0.01)
    assert claims["best_S0"].margin.mean() == pytest.approx(0.12 - 0.1 - 0.5 * 0.12, abs=0.01)
    outcomes = judge_claims(list(claims.values()), 0.05)
    verdicts = {one.name: one.verdict for one in outcomes}
    assert verdicts == {"best_CE": COLLAPSES, "best_S0": COLLAPSES}
    show(outcomes, "causal_lm", new_console())
    out = capsys.readouterr().out
    assert re.search(r"challenged on \d{4}-\d\d-\d\d by absorb", out)
    assert table_width(out) <= 120
    worse, _ = evidence_of(tmp_path / "worse", gains=gains | {"CE": -0.02})
    claims = {claim.name: claim for claim in rival_claims({SAME: worse, "half_rate": worse}, budget)}
    assert claims["best_CE"].what == "CE at its best learning rate (its own), worse than the base"
    assert not list(rival_claims({SAME: same}, budget)), "no rate was tried"


def test_the_best_rate_of_ce_is_told_as_the_study_would_have_it(tmp_path):
    def rated(name, lr, ce):
        evidence, _ = evidence_of(tmp_path / name, gains=GAINS | {"CE": ce})
        train = Train(optimizer=Optimizer(lr=lr))
        return replace(evidence, study=evidence.study.model_copy(update={"train": train}))

    rows = {SAME: rated("same", 0.02, 0.02), "half_rate": rated("half", 0.01, 0.05)}
    assert best_ce_train(rows) == {"optimizer": {"lr": 0.01}}
    assert best_ce_train(rows | {"double_rate": rated("double", 0.04, 0.06)}) == {"optimizer": {"lr": 0.04}}
    assert best_ce_train(rows | {"half_rate": rated("worse", 0.01, 0.0)}) == {}
    assert best_ce_train({SAME: rows[SAME]}) == {}
    raw = {"optimizer": {"lr": 0.02}}
    study = load_study("tiny", ["--train", json.dumps(raw), "--ce_train", json.dumps(best_ce_train(rows))])
    assert study.ce_train.optimizer.lr == 0.01
    assert study.own_training_text("CE") == "optimizer.lr 0.01 in place of 0.02"


def test_every_slice_of_the_study_as_it_is_has_its_own_row(tmp_path):
    evidence, budget = evidence_of(tmp_path, far={"T1": 0.12, "S1": 0.0, "S0": 0.0})
    claims = list(claims_of(SAME, "as it is", evidence, budget))
    outcomes = {one.name: one.verdict for one in judge_claims(claims, 0.05)}
    assert outcomes == {"as_it_is": SURVIVES, "as_it_is:far": COLLAPSES}
    assert [claim.name for claim in claims_of("half_rate", "", evidence, budget)] == ["half_rate"]


def test_the_worst_documents_are_those_where_the_student_lost_most(tmp_path):
    evidence, _ = evidence_of(tmp_path)
    columns = evidence.columns["validation"]
    bits = evidence.bits["S1", "plain"].copy()
    bits[:, columns[7]] += 3.0 * evidence.bytes[columns[7]]
    worse = replace(evidence, bits=evidence.bits | {("S1", "plain"): bits})
    line = next(line for line in rare_failures(worse) if "documents" in line)
    assert "worst 1 of 40 documents" in line
    assert float(re.search(r"S1 ([-+][\d.]+)", line)[1]) == pytest.approx(-2.9, abs=0.2)


STRENGTHS = (0.01, 0.03, 0.1)


def damaged_evidence(folder, kept: dict[float, float]):
    """A run whose student keeps so much of a gain of 0.12 over its control at each dose of typos."""
    slices = {f"typos-{strength:g}": strength for strength in STRENGTHS}
    evidence, budget = evidence_of(folder, sizes={"validation": 40, "far": 30, **dict.fromkeys(slices, 40)})
    data = evidence.study.data.model_copy(
        update={"corruptions": [Corruption(kind="typos", strength=strength) for strength in slices.values()]}
    )
    bits = dict(evidence.bits)
    student, control, gain = (
        bits["S1", "plain"].copy(),
        bits["S0", "plain"],
        bits["T0", "plain"] - bits["T1", "plain"],
    )
    for name, strength in slices.items():
        columns = evidence.columns[name]
        student[:, columns] = (control - kept[strength] * gain)[:, columns]
    bits["S1", "plain"] = student
    return replace(evidence, study=evidence.study.model_copy(update={"data": data}), bits=bits), budget


def test_a_dose_is_named_up_to_which_a_claim_is_shown(tmp_path):
    evidence, budget = damaged_evidence(tmp_path, {0.01: 0.9, 0.03: 0.3, 0.1: 0.9})
    doses = doses_of(evidence, budget)
    assert [(one.kind, one.strength, one.slice) for one in doses] == [
        ("typos", 0.0, "validation"),
        *(("typos", strength, f"typos-{strength:g}") for strength in STRENGTHS),
    ]
    assert [one.share[0] for one in doses[1:]] == pytest.approx([0.9, 0.3, 0.9])
    assert list(sentences(doses, budget)) == [
        "typos: at least 0.5 of the gain is shown up to 1 % of the letters; a lead of S1 over S0 up to 10 % of "
        "the letters"
    ], "a dose above one that is not shown is not looked at"
    bad, _ = damaged_evidence(tmp_path / "bad", dict.fromkeys(STRENGTHS, -0.5))
    assert list(sentences(doses_of(bad, budget), budget)) == [
        "typos: at least 0.5 of the gain is shown without damage alone; a lead of S1 over S0 without damage alone"
    ]


def test_a_dose_has_the_figures_of_its_slice_and_its_worst_cluster(tmp_path):
    evidence, budget = damaged_evidence(tmp_path, dict.fromkeys(STRENGTHS, 0.5))
    dose = doses_of(evidence, budget)[-1]
    columns = evidence.columns["typos-0.1"]
    saved = (evidence.bits["T0", "plain"] - evidence.bits["T1", "plain"])[:, columns].sum()
    size = evidence.bytes[columns].sum()
    assert dose.gain.point == pytest.approx(saved / size / 4)
    own = (evidence.bits["B", "plain"] - evidence.bits["S1", "plain"])[:, columns].mean(0) / evidence.bytes[
        columns
    ]
    assert dose.worst == pytest.approx(own.min())
    assert not list(claims_of(DAMAGED, "", evidence, budget)), "they are told, and no part of the verdict"


def test_doses_are_drawn_for_every_kind(tmp_path):
    evidence, budget = damaged_evidence(tmp_path, dict.fromkeys(STRENGTHS, 0.5))
    typos = doses_of(evidence, budget)
    spaces = [one.model_copy(update={"kind": "whitespace", "share": None}) for one in typos]
    draw([*typos, *spaces], budget, "causal_lm", tmp_path / "doses.svg")
    shown = "".join(ElementTree.parse(tmp_path / "doses.svg").getroot().itertext())
    for words in (
        "typos: share of the letters",
        "whitespace: share of the spaces",
        "10 %",
        "S1 - B, worst cluster",
    ):
        assert words in shown


def test_a_study_s_own_corruptions_are_its_doses_and_a_teacher_in_a_file_has_none():
    rows, _ = plan_rows(load_study("tiny"), [])
    (row,) = [row for row in rows if row.name == DAMAGED]
    study = row.study(ROOT / "configs" / "studies" / "tiny.yaml", ROOT / "elsewhere")
    assert [one.slice for one in study.data.corruptions] == ["typos-0.01", "typos-0.03", "typos-0.1"]
    own = load_study("tiny", data__corruptions=[{"kind": "lowercase", "strength": 1}])
    assert DAMAGED not in [row.name for row in plan_rows(own, [])[0]]


@pytest.mark.slow
def test_a_first_look_by_the_command_line(tmp_path):
    page = (ROOT / "docs" / "own-method.md").read_text(encoding="utf-8")
    (tmp_path / "ours").mkdir()
    code = re.search(r"`ours/neural_cache.py`:\n\n```python\n(.*?)```", page, re.DOTALL)[1]
    method = tmp_path / "ours" / "neural_cache.py"
    method.write_text(code)
    short = ["--runs", str(tmp_path / "runs"), "--data.train_rows", "32", "--base.train.epochs", "1"]
    done = run("-m", "eval.challenge.first_look", method, *short, "--json", tmp_path / "look.json")
    assert done.returncode == 0, done.stderr
    look = json.loads((tmp_path / "look.json").read_text())
    assert [one["what"][:7] for one in look["contrasts"]] == ["T1 - T0", "S1 - S0", "S1 - CE"]
    assert look["contrasts"][0]["lead"]["point"] != 0
    assert "seen four times in five by 2 seeds and" in done.stdout
    assert re.search(r"looked at on \d{4}-\d\d-\d\d by absorb", done.stdout)
    assert (tmp_path / "runs/try/first_look.svg").read_text().startswith("<?xml")


@pytest.mark.slow
def test_a_row_is_run_once_and_makes_only_what_its_change_touches(tmp_path):
    short = {"runs": str(tmp_path / "runs"), "data__train_rows": 32, "base__train__epochs": 1}
    study = load_study("tiny", **short)
    rows = plan_rows(study, [])[0][:3]
    assert [row.name for row in rows] == [SAME, DAMAGED, "half_rate"]
    folder = tmp_path / "runs" / "tiny-challenge"
    challenge = Challenge(study, folder, rows)
    assert challenge.run() == []
    names = ["as_it_is", "as_it_is:far", "half_rate", "best_S0", "best_CE"]
    assert [one.name for one in challenge.outcomes()] == names
    base, student = "base/s0/model.safetensors", "students/S1/s0/model.safetensors"
    assert os.path.samefile(folder / SAME / base, folder / "half_rate" / base), "it is linked"
    assert os.path.samefile(folder / SAME / student, folder / DAMAGED / student), "it is only scored"
    doses = challenge.doses()
    assert [one.strength for one in doses] == [0, 0.01, 0.03, 0.1]
    assert len({one.gain.point for one in doses}) == 4
    assert (folder / SAME / student).read_bytes() != (folder / "half_rate" / student).read_bytes()
    rates = {"optimizer": {"lr": 0.01, "lr_rest": 0.0025}}
    assert best_ce_train(challenge.evidence) in ({}, rates)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    again = Challenge(study, folder, rows)
    assert again.run() == []
    assert again.outcomes() == challenge.outcomes()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == before


def test_what_a_killed_command_left_is_no_obstacle(tmp_path):
    source, new = tmp_path / "runs/one", tmp_path / "runs/two"
    (source / "data").mkdir(parents=True)
    (source / "data/train.jsonl").write_text("x")
    (tmp_path / "runs/.two/data").mkdir(parents=True)
    os.link(source / "data/train.jsonl", tmp_path / "runs/.two/data/train.jsonl")
    share_artifacts(source, new)
    assert (new / "data/train.jsonl").samefile(source / "data/train.jsonl")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["one", "two"]


@pytest.mark.parametrize(("number", "error"), [(9, UserError), (2, KeyboardInterrupt)])
def test_a_command_that_was_killed_is_no_ctrl_c(tmp_path, monkeypatch, number, error):
    study = load_study("tiny", runs=str(tmp_path))
    monkeypatch.setattr("eval.challenge.runs.sys.executable", tmp_path / "killed")
    (tmp_path / "killed").write_text(f"#!/bin/sh\nkill -{number} $$\n")
    (tmp_path / "killed").chmod(0o755)
    with pytest.raises(error) as caught:
        run_study(study)
    if error is UserError:
        assert "distill.train was ended by SIGKILL; free some memory" in str(caught.value)
