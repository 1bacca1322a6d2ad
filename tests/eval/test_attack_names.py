"""Attacks by names and reports: each file is of one variant on one target, each report what gate.json gives."""

import shutil

import pytest

from eval.core.errors import UserError
from eval.release.contract import refuse_broken_floors
from eval.release.contract_file import read_contract
from eval.signoff.keys import new_key, read_trusted
from eval.signoff.statement import Waiver, read_bundle, signoff_path
from eval.signoff.verify import Rerun, problems
from tests.eval.run_builder import NOW, Run, copy_run, gate, report, sign


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("names")).make()
    gate(run)
    report(run)
    new_key(run.folder / "key")
    return run.folder


@pytest.fixture
def run(judged, tmp_path):
    return copy_run(judged, tmp_path / "copy")


def faults(path, run):
    return problems(path, Rerun(run.path), read_trusted([run.folder / "key.pub"]), NOW.date())[1]


def test_no_two_variants_share_a_file_and_one_of_another_is_refused(run, tmp_path):
    assert signoff_path(tmp_path, "small", "b-cpu") != signoff_path(tmp_path, "small-b", "cpu")
    path = sign(run, run.folder / "key")
    other = path.with_name("half@cpu.intoto.jsonl")
    older = path.with_name("int8-cpu.intoto.jsonl")  # as earlier versions called it
    for place in (other, older):
        shutil.copy(path, place)
        (fault,) = faults(place, run)
        assert fault == "line 1: speaks of int8 on cpu, whose file is int8@cpu.intoto.jsonl"
        with pytest.raises(UserError, match=f"delete {place.name} and sign again"):
            read_bundle(place)
    assert faults(path, run) == []


def test_a_row_that_another_separator_hides_is_named(run):
    rerun, separators = Rerun(run.path), ["\x85", "\x0b", "\x1c", "\u2028", "\r\n", "\n\n", " "]
    for name in ("table.md", "table.csv"):
        text = (run.path / name).read_bytes().decode()
        row = next(line for line in text.split("\n") if line.lstrip("| ").startswith("half"))
        for separator in separators:
            (run.path / name).write_bytes(text.replace(f"\n{row}", f"{separator}{row}").encode())
            (fault,) = rerun.forged_reports([name])
            assert fault.startswith(f"{name}: line ")
    with pytest.raises(UserError, match=r"table\.md: line .* is not what gate\.json gives"):
        sign(run, run.folder / "key")


def test_a_forged_report_beside_a_sign_off_made_without_one_is_named(run):
    for name in ("table.md", "table.csv", "report.html"):
        (run.path / name).unlink()
    path = sign(run, run.folder / "key")
    report(run)
    assert faults(path, run) == []
    (run.path / "report.html").write_text("<h1>PASS: ship everything</h1>")
    (fault,) = faults(path, run)
    assert fault.startswith("report.html: line 1 is not what gate.json gives: 'h1>PASS: ship")


def test_a_waiver_of_another_budget_ships_no_artifact_below_its_floor(released_run, release):
    shipped = read_contract(release).targets["cpu"]
    gain = shipped.gain["validation"]
    weak = gain.over_control.model_copy(update={"verdict": "FAIL", "floor": 9.0})
    gains = {"validation": gain.model_copy(update={"over_control": weak})}
    waived = {"gain": gains, "waiver": Waiver(reason="another budget", expires=NOW.date())}
    with pytest.raises(UserError, match=r"the floor is 9\.0000"):
        refuse_broken_floors({"cpu": shipped.model_copy(update=waived)})
    refuse_broken_floors({"cpu": shipped.model_copy(update={**waived, "verdict": "FAIL"})})
