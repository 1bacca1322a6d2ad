"""What ships on a waiver alone, for a verdict or for another budget than the fixed one: told wherever it ships."""

import json
import shutil
from datetime import UTC, date, datetime, timedelta

import pytest
import yaml

from eval.core.errors import UserError
from eval.core.gate_file import KeptShare, OnTestSet, read_gate
from eval.release.__main__ import summary_lines, verify_signoffs
from eval.release.bom import bill_of_materials
from eval.release.card import card
from eval.release.contract import gain, loader_facts, released_bits, shipped
from eval.release.contract_file import Contract, contract_text, read_contract
from eval.release.load_release import load_release
from eval.signoff.keys import new_key, read_trusted
from eval.signoff.statement import Waiver, read_bundle
from eval.signoff.verify import Rerun, problems, row_of
from tests.eval.run_builder import NOW, Run, copy_run, gate, report, sign
from tests.eval.test_release import DAY, rewrite
from tests.helpers import run as command


def faults(path, run):
    """All that speaks against a sign-off, with both keys trusted."""
    keys = read_trusted([run.folder / "key.pub", run.folder / "second.pub"])
    return problems(path, Rerun(run.path), keys, NOW.date())[1]


@pytest.fixture
def loose(tmp_path):
    """A run that was judged by another budget than the fixed one, which asks less of everything."""
    run = Run(tmp_path)
    run.budget["waivers"] = {"signatures": 2, "days": 30}
    run.make()
    for name in ("key", "second"):
        new_key(tmp_path / name)
    limits = {"f": 0.01, "g": 0.01, "slices": {}, "waivers": {"signatures": 1, "days": 3650}}
    limits["targets"] = {"cpu": {"device": "cpu"}}
    path = run.folder / "loose.yaml"
    path.write_text(yaml.safe_dump({**run.budget, "name": "loose", **limits}))
    gate(run, str(path))
    report(run)
    return run


def test_what_another_budget_judged_is_signed_on_a_waiver_alone_by_the_rules_of_the_fixed_one(loose):
    first, second = loose.folder / "key", loose.folder / "second"
    half, day = row_of(read_gate(loose.path), "half", "cpu"), "2026-07-01"
    assert half.verdict == "PASS", "the fixed budget says FAIL"
    other = "judged by another budget, 'loose', than the one fixed on 2025-12-31"
    with pytest.raises(UserError, match=f"sign-off: {other}.*give --waive REASON"):
        sign(loose, first, "half")
    with pytest.raises(UserError, match="the budget allows 30 days: give a day up to 2026-07-01"):
        sign(loose, first, "half", waive="a demonstration", expires="2036-01-01")
    path = sign(loose, first, "half", waive="a demonstration", expires=day)
    assert faults(path, loose) == ["the waiver has 1 of 2 signatures that the budget asks"]
    sign(loose, second, "half", by="Bob", waive="a demonstration", expires=day)
    assert faults(path, loose) == []
    said = read_bundle(path)[0].predicate
    assert (said.verdict, said.policy.fixed, said.waiver.reason) == ("PASS", False, "a demonstration")


def test_a_sign_off_by_another_budget_without_a_waiver_does_not_hold(loose, monkeypatch):
    """As an earlier version signed it."""
    monkeypatch.setattr("eval.signoff.__main__.to_waive", lambda *_: "")
    path = sign(loose, loose.folder / "key", "half")
    (found,) = faults(path, loose)
    assert found.startswith(
        "half on cpu: judged by another budget, 'loose', than the one fixed on 2025-12-31"
    )
    assert found.endswith("nobody waived that")


def test_what_another_budget_judged_says_so_wherever_the_release_is(released_run, release, tmp_path):
    run = released_run
    case = verify_signoffs(run.path, ["small"], read_trusted([run.folder / "key.pub"]), DAY)
    fixed = case.gate.fixed.model_copy(update={"other": True})
    gate, waiver = case.gate.model_copy(update={"fixed": fixed}), Waiver(reason="x", expires=date(2126, 7, 1))
    signed, contract = case.predicates["cpu"].model_copy(update={"waiver": waiver}), read_contract(release)
    row, signature = row_of(gate, "small", "cpu"), contract.targets["cpu"].signature
    target = shipped(case.evidence, gate, case.budget, row, signed, signature)
    other = contract.model_copy(update={"targets": {"cpu": target}})
    told = f"judged by another budget, 'test', than the one fixed on {fixed.time}"
    assert yaml.safe_load(contract_text(other))["targets"]["cpu"]["budget_note"] == told
    assert told in "\n".join(summary_lines(other, release))
    assert f"On cpu the verdict is PASS, {told}: " in card(other, None, [], [])
    bom = json.dumps(bill_of_materials(other, json.loads((release / "lineage.json").read_text())))
    assert f'"absorb:budget", "value": "{told}"' in bom
    copy = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    rewrite(copy, "release.json", lambda index: index["targets"]["cpu"].update(loader_facts(target)))
    assert load_release(copy, "cpu")[1].budget_note == told


@pytest.mark.slow
def test_by_the_command_line_it_is_signed_on_a_waiver_of_two_keys_released_loaded_and_told(
    released_run, tmp_path
):
    run, out = copy_run(released_run.folder, tmp_path), tmp_path / "out"
    shutil.rmtree(run.path / "signoff")
    shutil.rmtree(tmp_path / "release", ignore_errors=True)
    new_key(tmp_path / "second")
    loose = {**run.budget, "name": "loose", "f": 0.01, "waivers": {"signatures": 2, "days": 30}}
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump(loose))
    day = (datetime.now(UTC) + timedelta(days=20)).date().isoformat()

    def done(module, *words, code=0):
        ended = command("-m", module, "--study", run.path, *words)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    done("eval.gate", "--budget", tmp_path / "loose.yaml")
    done("eval.report")
    told = "judged by another budget, 'loose', than the one fixed on 2025-12-31T00:00:00+00:00"
    signed = ["--variant", "small", "--by", "Ada", "--key", tmp_path / "key"]
    assert f"{told}; do not ship it, or give --waive" in done("eval.signoff", *signed, code=3)
    waiver = ["--waive", "a demonstration", "--expires", day]
    done("eval.signoff", *signed, *waiver)
    keys = ["--public", tmp_path / "key.pub", tmp_path / "second.pub"]
    shipped = ["--variant", "small", "--owner", "Team A", "--out", out, "--key", tmp_path / "key", *keys]
    assert "the waiver has 1 of 2 signatures that the budget asks" in done("eval.release", *shipped, code=3)
    done("eval.signoff", "--variant", "small", "--by", "Bob", "--key", tmp_path / "second", *waiver)
    assert f"    {told}\n    WAIVED until {day}: a demonstration" in done("eval.release", *shipped)
    target = read_contract(out).targets["cpu"]
    assert (target.budget_note, target.waiver.expires.isoformat()) == (told, day)
    assert f"On cpu the verdict is PASS, {told}: " in (out / "README.md").read_text()
    assert f'"value": "{told}"' in (out / "bom.cdx.json").read_text()
    info = load_release(out, "cpu", public_key=tmp_path / "key.pub")[1]
    assert (info.fallback, info.budget_note, info.expires) == (False, told, day)


def test_a_waiver_is_shown_wherever_the_release_is(release):
    contract = read_contract(release)
    waiver = Waiver(reason="a demonstration", expires=date(2026, 7, 1))
    shipped = contract.targets["cpu"].model_copy(update={"verdict": "FAIL", "waiver": waiver})
    waived = contract.model_copy(update={"targets": {"cpu": shipped}})
    assert "WAIVED until 2026-07-01: a demonstration" in "\n".join(summary_lines(waived, release))
    text = card(waived, None, [], [])
    bom = json.dumps(bill_of_materials(waived, json.loads((release / "lineage.json").read_text())))
    assert '{"name": "absorb:waiver", "value": "a demonstration"}' in bom
    assert "**Shipped on a waiver until 2026-07-01.** On cpu the verdict is FAIL" in text
    assert Contract.model_validate(yaml.safe_load(contract_text(waived))) == waived


def test_the_share_on_the_test_documents_is_quoted_where_they_were_opened_for_what_ships(
    released_run, release
):
    case = verify_signoffs(released_run.path, ["small"], read_trusted([released_run.folder / "key.pub"]), DAY)
    row, bits = row_of(case.gate, "small", "cpu"), released_bits(case.evidence, "small", "validation")
    share = KeptShare(point=0.61, low=0.52, high=0.71)
    look = OnTestSet(
        openings=1,
        time="2026-01-01T00:00:00+00:00",
        by="Ada",
        recipe="small",
        target="cpu",
        current=True,
        documents=9,
        verdict="PASS",
        parts=[],
        teacher_gain=None,
        kept_share=share,
        guard_share=None,
        history=[],
    )
    for change, quoted in (({}, share), ({"recipe": "other"}, None), ({"current": False}, None)):
        opened = case.gate.model_copy(update={"test_set": look.model_copy(update=change)})
        assert gain(opened, row, "validation", bits).on_test == quoted
    contract = read_contract(release)
    target = contract.targets["cpu"]
    gains = target.gain | {"validation": target.gain["validation"].model_copy(update={"on_test": share})}
    shown = contract.model_copy(update={"targets": {"cpu": target.model_copy(update={"gain": gains})}})
    assert ", on the test documents 0.610 [0.520, 0.710] |" in card(shown, None, [], [])
