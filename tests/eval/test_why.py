"""Where a release comes from and what became of it, and the recheck that its contract promises."""

import json
import logging
import shutil
from datetime import date, timedelta
from xml.etree import ElementTree

import pytest
import yaml

from eval.core.artifacts import MANIFEST, file_sha256
from eval.release.contract_file import read_contract
from eval.release.load_release import load_release, overdue
from eval.signoff.keys import new_key
from eval.why.__main__ import Entry, last_look
from tests.eval.test_rollout import PLAN
from tests.helpers import run as command


@pytest.fixture(scope="module")
def promised(released_run, tmp_path_factory):
    """A release of which a recheck every 30 days is promised."""
    out = tmp_path_factory.mktemp("promised") / "release"
    given = ["--study", released_run.path, "--variant", "small", "--owner", "Team A", "--out", out]
    keys = ["--key", released_run.folder / "key", "--public", released_run.folder / "key.pub"]
    done = command("-m", "eval.release", *given, *keys, "--recheck-days", "30")
    assert done.returncode == 0, done.stderr
    return out


def look_line(release, day):
    """The last line of a history, as far as the loader reads it."""
    return json.dumps({"release": file_sha256(release / MANIFEST), "time": f"{day}T08:00:00Z"}) + "\n"


def test_everything_behind_a_release_is_told_with_its_hash(promised, released_run, tmp_path):
    key, plan = tmp_path / "key", tmp_path / "plan.yaml"
    new_key(key)
    plan.write_text(yaml.safe_dump(PLAN))
    given = ["--rollout", tmp_path / "rollout", "--release", promised, "--plan", plan]
    started = command("-m", "eval.watch.rollout", "start", *given, "--by", "Ada", "--key", key)
    assert started.returncode == 0, started.stderr
    new, history = tmp_path / "new.jsonl", tmp_path / "history.jsonl"
    new.write_text("".join(json.dumps({"text": f"x = {i}\ny = x + {i * i}\n" * 8}) + "\n" for i in range(12)))
    looked = command("-m", "eval.watch.recheck", "--release", promised, "--data", new, "--append", history)
    assert looked.returncode in (0, 1, 2), looked.stderr
    svg, answer = tmp_path / "why.svg", tmp_path / "why.json"
    files = ["--history", history, "--rollout", tmp_path / "rollout", "--svg", svg, "--json", answer]
    public = ["--public", released_run.folder / "key.pub"]
    done = command("-m", "eval.why", "--release", promised, *files, *public)
    assert (done.returncode, "signed with the unknown key" in done.stderr) == (3, True), "of the rollout"
    done = command("-m", "eval.why", "--release", promised, *files, *public, f"{key}.pub")
    assert done.returncode == 0, done.stderr
    entries = json.loads(answer.read_text())["entries"]
    kinds = [one["what"] for one in entries]
    wanted = ["method", "teacher", "its control", "not shipped", "signed", "release", "rollout", "recheck"]
    assert [kind for kind in dict.fromkeys(kinds) if kind in wanted] == wanted
    hashes = {one["text"]: one["hash"] for one in entries}
    contract = yaml.safe_load((promised / "contract.yaml").read_text())
    assert hashes["data"] == contract["data"]
    assert contract["targets"]["cpu"]["artifact"] in hashes.values()
    assert next(e for e in entries if e["what"] == "release")["hash"] == file_sha256(promised / MANIFEST)
    assert not [
        row for row in entries if row["what"] == "not shipped" and row["text"].startswith("small on cpu")
    ]
    picture = "".join(ElementTree.parse(svg).getroot().itertext())
    for word in ("teacher", "small", "Team A", "1 x rollout", "1 x recheck"):
        assert word in picture
    assert "Team A" in done.stdout
    assert "promises a recheck" not in done.stdout


def test_histories_and_rollouts_of_another_release_are_refused(promised, release, tmp_path):
    new, history = tmp_path / "new.jsonl", tmp_path / "history.jsonl"
    new.write_text("".join(json.dumps({"text": f"y = {i}\nz = y + {i}\n" * 8}) + "\n" for i in range(12)))
    command("-m", "eval.watch.recheck", "--release", release, "--data", new, "--append", history)
    done = command("-m", "eval.why", "--release", promised, "--history", history)
    assert done.returncode == 3
    assert done.stderr.strip() == f"error: history {history}: of another release; give those of this one"


def test_a_release_that_was_changed_has_no_story(promised, tmp_path):
    copy = tmp_path / "release"
    shutil.copytree(promised, copy)
    (copy / "lineage.json").write_text((copy / "lineage.json").read_text().replace("ensemble", "magic"))
    done = command("-m", "eval.why", "--release", copy)
    assert (done.returncode, "lineage.json is changed" in done.stderr) == (3, True)


def test_a_recheck_that_is_overdue_is_said_when_the_release_is_loaded(promised, release, tmp_path, caplog):
    today, history = date.today(), tmp_path / "history.jsonl"
    index = json.loads((promised / "release.json").read_text())
    assert overdue(index, promised, None, today + timedelta(30)) is None
    other = json.loads((release / "release.json").read_text())
    assert overdue(other, release, None, today + timedelta(999)) is None, "nobody promised one"
    history.write_text(look_line(promised, today + timedelta(20)) + look_line(release, today + timedelta(40)))
    assert overdue(index, promised, history, today + timedelta(50)) is None
    assert overdue(index, promised, history, today + timedelta(51)) == str(today + timedelta(20))
    with caplog.at_level(logging.WARNING, "load_release"):
        _, info = load_release(promised, "cpu", today=today + timedelta(31))
    assert not info.fallback, "it is a warning"
    assert f"was not rechecked since {today}" in caplog.text


def test_a_promise_that_is_not_held_stands_in_the_story(promised):
    contract = read_contract(promised)
    old = contract.model_copy(update={"released": date.today() - timedelta(31)})
    assert last_look(contract, []) is None
    assert last_look(old, []).startswith(f"not rechecked since {old.released}")
    assert last_look(old, [Entry("recheck", f"{date.today()}T00:00:00Z PASS on cpu")]) is None
