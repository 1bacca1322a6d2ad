"""Attacks by names and reports: each file is of one variant on one target, each report what gate.json gives."""

import argparse
import re
import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from eval.core.budget import Budget
from eval.core.commands import NewFile
from eval.core.config import ROOT
from eval.core.errors import UserError, one_line
from eval.release.contract import refuse_broken_floors
from eval.release.contract_file import read_contract
from eval.signoff.keys import new_key, read_trusted
from eval.signoff.statement import Waiver, read_bundle, signoff_path
from eval.signoff.verify import Rerun, problems
from tests.eval.run_builder import NOW, Run, copy_run, gate, report, sign
from tests.helpers import run as command


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


SECOND = "Eve\n  PASS of int8 on cpu, signed by the CEO with the key of ceo"


@pytest.mark.parametrize("text", [SECOND, "a\x1b[2Kb", "a\x85b", "a\u2028b", "a\u202eb", "a\rb", "a\tb"])
def test_a_text_that_would_be_shown_as_more_than_one_line_is_refused(text):
    with pytest.raises(ValueError, match="expected one line without control characters"):
        one_line(text)
    with pytest.raises(ValidationError, match="expected one line"):
        Waiver(reason=text, expires=NOW.date())
    with pytest.raises(ValidationError, match="name"):
        Budget.model_validate({**Run(Path()).budget, "name": text})


def test_names_in_any_writing_are_taken():
    for name in ("Ada Lovelace", "Žofia", "李", "عائشة", "👩🏽‍💻 team", "Marks & Söhne, Ⅲ"):
        assert one_line(name) == name


@pytest.mark.parametrize(
    "words",
    [
        ("eval.signoff", "--study", "RUN", "--variant", "int8", "--key", "KEY", "--by", SECOND),
        ("eval.signoff", "--new-key", "NEW", "--by", SECOND),
        ("eval.gate.test_set", "--study", "RUN", "--by", SECOND),
        ("eval.release", "--variant", "int8", "--key", "KEY", "--public", "KEY", "--owner", SECOND),
    ],
)
def test_such_a_name_is_refused_where_it_enters(run, words):
    places = {"RUN": run.path, "KEY": run.folder / "key", "NEW": run.folder / "new"}
    done = command("-m", *(places.get(word, word) for word in words))
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert r"found '\n' in it, expected one line without control characters" in done.stderr
    assert not (run.folder / "new").exists()


class Answers(argparse.Namespace):
    """What a parser of one output and one input makes of words."""

    def __init__(self, monkeypatch, *words):
        parser = argparse.ArgumentParser()
        parser.add_argument("--history", type=Path)
        parser.add_argument("--page", type=Path, action=NewFile)
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        super().__init__(**vars(parser.parse_args()))


def test_an_output_replaces_nothing_that_the_command_reads(tmp_path, monkeypatch):
    history = tmp_path / "history.jsonl"
    history.write_text("looks")
    (tmp_path / "link").symlink_to(history)
    for page in (history, tmp_path / "link", tmp_path / ".." / tmp_path.name / "history.jsonl"):
        for words in (("--history", history, "--page", page), (f"--page={page}", f"--history={history}")):
            with pytest.raises(UserError, match="is named twice"):
                Answers(monkeypatch, *words)
    page = tmp_path / "page.html"
    page.write_text("of yesterday")
    assert Answers(monkeypatch, "--page", page, "--history", history).page == page
    assert (page.exists(), history.read_text()) == (False, "looks")


@pytest.mark.parametrize("mark", ["manifest.json", "rollout.json"])
def test_an_output_replaces_no_file_of_an_artifact_a_release_or_a_rollout(tmp_path, monkeypatch, mark):
    kept = tmp_path / "release" / "evidence" / "gate.json"
    kept.parent.mkdir(parents=True)
    for path in (kept, tmp_path / "release" / mark):
        path.write_text("kept")
    with pytest.raises(UserError, match="is a file of an artifact, a release or a rollout"):
        Answers(monkeypatch, "--page", kept)
    assert kept.read_text() == "kept"


def test_no_export_replaces_a_verdict_or_a_record(run):
    for name in ("gate.json", "records/score/plain/S1-s0.json"):
        before = (run.path / name).read_bytes()
        done = command("-m", "eval.score.import", "--study", run.path, "--export", run.path / name)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
        assert "is a file of a run" in done.stderr
        assert (run.path / name).read_bytes() == before


def test_every_output_of_every_command_is_taken_by_the_one_action():
    """An option that is written to, and is no `NewFile`, would be found here: by what it is called."""
    for path in sorted((ROOT / "eval").rglob("*.py")):
        for call in re.findall(r"add_argument\((.*?)\)\n", path.read_text(), re.DOTALL):
            name = re.search(r'"--([a-z-]+)"', call)
            if name and name[1] in ("json", "export", "page", "metrics", "svg", "markdown", "html", "csv"):
                assert "NewFile" in call, f"{path}: --{name[1]}"
