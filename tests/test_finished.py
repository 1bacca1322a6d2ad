"""A finished run is recognised, until something that it was made from changes."""

import json
import sys

import pytest

from distill.models import load
from eval.core import artifacts
from eval.core.artifacts import file_sha256
from eval.core.study import load_study, make_run_folder
from tests.helpers import ROOT, tiny_study

METHOD = "from distill.methods.ensemble import Ensemble\n\n\nclass Mine(Ensemble):\n    share = 1\n"
CHANGES = {
    "base/weights": "other weights",
    "tasks.jsonl": json.dumps({"prompt": "2 + 3 =", "answer": "5"}) + "\n",
    "outside/method.py": METHOD.replace("share = 1", "share = 2"),
}


@pytest.fixture
def state(monkeypatch):
    """`state` of scripts/finished.py, whose import sets the first entry of sys.path."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from scripts.finished import state

    return state


@pytest.fixture
def study(tmp_path, monkeypatch, state):
    """A study whose base, task and method are files in `tmp_path`, with an empty run folder."""
    for name in ("base", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "__init__.py").write_text("")
    (tmp_path / "base" / "weights").write_text("weights")
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": "2 + 2 =", "answer": "4"}) + "\n")
    (tmp_path / "outside" / "method.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("outside", "outside.method"):  # of the test before
        monkeypatch.delitem(sys.modules, module, raising=False)
    path = tiny_study(tmp_path, base={"path": str(tmp_path / "base")}, method={"name": "outside.method"})
    task = json.dumps({"kind": "exact_match", "path": str(tmp_path / "tasks.jsonl")})
    study = load_study(path, [f"--data.tasks.sums={task}"])
    make_run_folder(study)
    return study


def test_a_run_without_changes_stays_finished(study, tmp_path, state):
    before = state(study)
    (tmp_path / "base" / "weights").touch()
    (tmp_path / "outside" / "method.py").write_text(f"{METHOD}    # a comment\n")
    assert state(study) == before, "a file that was only touched, and a comment"


def test_no_file_of_a_run_is_read_twice_until_it_changes(study, state, monkeypatch):
    """A run of pretrained models has a hundred gigabytes."""
    weights = study.folder / "students" / "S1" / "s0" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("weights")
    read = []
    monkeypatch.setattr(artifacts, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    before = state(study)
    assert weights in read
    read.clear()
    assert state(study) == before
    assert read == []
    weights.write_text("other weights")
    assert state(study) != before
    assert read == [weights]


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_input_is_something_to_do(study, tmp_path, state, name):
    before = state(study)
    (tmp_path / name).write_text(CHANGES[name])
    assert state(study) != before


def test_a_missing_task_file_is_something_to_do(study, tmp_path, state):
    before = state(study)
    (tmp_path / "tasks.jsonl").unlink()
    assert state(study) != before


def test_another_commit_of_the_base_is_something_to_do(study, state, monkeypatch):
    study = study.model_copy(update={"base": study.base.model_copy(update={"path": "owner/model"})})
    states = set()
    for commit in ("a" * 40, "b" * 40):
        monkeypatch.setattr(load, "hub_commit", lambda *where, commit=commit: commit)
        states.add(state(study))
    assert len(states) == 2
