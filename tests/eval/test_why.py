"""Where a release comes from and what became of it, and the recheck that its contract promises."""

import json
import logging
import shutil
from datetime import date, timedelta
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from eval.challenge.outcome import ChallengeFile, Claim, conclude, judge_claims
from eval.core.artifacts import MANIFEST, file_sha256
from eval.core.commands import write_json
from eval.core.gate_file import read_gate
from eval.release.contract_file import read_contract
from eval.release.load_release import load_release, overdue
from eval.release.origin import Entry
from eval.signoff.keys import new_key
from eval.why.__main__ import last_look, promise
from eval.why.__main__ import overdue as late
from tests.eval.run_builder import GAINS, Run
from tests.eval.test_rollout import PLAN
from tests.helpers import ROOT
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
    new.write_text("".join(json.dumps({"text": f"z = {i}\nw = z - {i * i}\n" * 8}) + "\n" for i in range(12)))
    watch = ["--release", promised, "--data", new, "--history", history]
    assert command("-m", "eval.watch.monitor", *watch).returncode in (0, 1, 2)
    svg, answer = tmp_path / "why.svg", tmp_path / "why.json"
    files = ["--history", history, "--rollout", tmp_path / "rollout", "--svg", svg, "--json", answer]
    public = ["--public", released_run.folder / "key.pub"]
    done = command("-m", "eval.why", "--release", promised, *files, *public)
    assert (done.returncode, "signed with the unknown key" in done.stderr) == (3, True), "of the rollout"
    done = command("-m", "eval.why", "--release", promised, *files, *public, f"{key}.pub")
    assert done.returncode == 0, done.stderr
    entries = json.loads(answer.read_text())["entries"]
    kinds = [one["what"] for one in entries]
    wanted = ["paper", "method", "its file", "teacher", "its control", "not shipped", "signed", "release"]
    wanted += ["rollout", "recheck", "monitor", "next recheck"]
    assert [kind for kind in dict.fromkeys(kinds) if kind in wanted] == wanted
    assert not [one["text"] for one in entries if one["text"].rstrip().endswith(":")]
    hashes = {one["text"]: one["hash"] for one in entries}
    contract = yaml.safe_load((promised / "contract.yaml").read_text())
    assert hashes["data"] == contract["data"]
    assert hashes["distill/methods/ensemble.py"] == file_sha256(ROOT / "distill/methods/ensemble.py")
    assert contract["targets"]["cpu"]["artifact"] in hashes.values()
    assert next(e for e in entries if e["what"] == "release")["hash"] == file_sha256(promised / MANIFEST)
    assert not [
        row for row in entries if row["what"] == "not shipped" and row["text"].startswith("small on cpu")
    ]
    picture = "".join(ElementTree.parse(svg).getroot().itertext())
    for word in ("teacher", "small", "Team A", "1 x rollout", "1 x recheck", "1 x monitor"):
        assert word in picture
    assert "Team A" in done.stdout
    assert "promises a recheck" not in done.stdout


def test_what_was_tried_beside_a_release_and_did_not_hold_is_told_as_data(promised, released_run, tmp_path):
    """By real commands: a comparison, and the gate.json of other runs; and a challenge's own file."""
    runs = tmp_path / "runs"
    release = shutil.copytree(promised, runs / "toy/release/small")
    shutil.copy(released_run.path / "gate.json", runs / "toy")
    (runs / "toy/unbuilt.json").write_text('{"nf4": "bitsandbytes is not installed"}')
    nothing = Run(tmp_path / "other", gains=GAINS | {"S1": GAINS["S0"]}, name="nothing").make()
    studies = ["--study", released_run.path, "--study", nothing.path]
    done = command("-m", "eval.compare", *studies, "--json", tmp_path / "table.json")
    assert done.returncode == 0, done.stderr
    compared = released_run.path.with_name("toy-compare") / "compare.json"
    assert compared.read_bytes() == (tmp_path / "table.json").read_bytes()
    shutil.copytree(compared.parent, runs / "toy-compare")
    gate = read_gate(released_run.path)
    failed = gate.model_copy(
        update={"study": "memory", "method": "memory", "verdict": "FAIL", "reason": "kept 0.1"}
    )
    elsewhere = gate.provenance.model_copy(update={"data": "0" * 64})
    others = {
        "memory": failed,
        "elsewhere": failed.model_copy(update={"provenance": elsewhere}),
        "passed": gate,
    }
    for name, one in others.items():
        (runs / name).mkdir()
        write_json(runs / name / "gate.json", one)
    (runs / "torn").mkdir()
    (runs / "torn/gate.json").write_text('{"schema_version": 3,')
    for name, config in (("toy", read_contract(promised).config), ("stale", "0" * 64)):
        write_json(runs / f"{name}-challenge/challenge.json", challenged(name, config))

    done = command(
        "-m", "eval.why", "--release", release, "--json", tmp_path / "a.json", "--svg", tmp_path / "a.svg"
    )
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "a.json").read_text())["entries"]
    beside = {(one["what"], Path(one["file"]).relative_to(runs).as_posix()) for one in entries if one["file"]}
    assert beside == {
        ("not built", "toy/unbuilt.json"),
        ("comparison", "toy-compare/compare.json"),
        ("challenge", "toy-challenge/challenge.json"),
        ("other run", "memory/gate.json"),
        ("not read", "torn/gate.json"),
    }
    assert all(one["hash"] == file_sha256(Path(one["file"])) for one in entries if one["file"])
    told = {one["what"]: one for one in entries}
    assert told["comparison"]["figures"]["result"] == "not shown absorbed"
    assert told["challenge"]["text"].startswith("toy: collapses: a learning rate: at least half; gain +0.1")
    assert told["challenge"]["figures"]["lead"]["point"] == pytest.approx(0.01, abs=0.01)
    assert told["other run"]["text"] == "memory (memory): FAIL: kept 0.1"
    assert told["not shipped"]["figures"]["recipe"] in ("plain", "half")
    assert "toy-challenge/challenge.json" in done.stdout
    assert "tried beside it" in "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())

    given = ["--tried", tmp_path / "table.json", runs / "elsewhere/gate.json", "--json", tmp_path / "b.json"]
    done = command("-m", "eval.why", "--release", promised, *given)
    assert done.returncode == 0, done.stderr
    files = [one["file"] for one in json.loads((tmp_path / "b.json").read_text())["entries"] if one["file"]]
    assert files == [str(tmp_path / "table.json"), str(runs / "elsewhere/gate.json")]


def challenged(study, config):
    """A challenge of two rows, one of which collapses, as its command writes it."""
    rng = np.random.default_rng(0)
    gain, kept, lost = (mean + rng.normal(0, 0.002, (4, 30)) for mean in (0.1, 0.08, 0.01))
    claims = [
        Claim(what, what, "at least half", gain, lead, lead - 0.5 * gain)
        for what, lead in (("as it is", kept), ("a learning rate", lost))
    ]
    rows = judge_claims(claims, 0.05)
    return ChallengeFile(
        study=study, config=config, verdict=conclude(rows), rows=rows, doses=[], ce_train={}, notes=[]
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "no such file of ours"),
        ('{"a": 1}', "no such file of ours: it holds a"),
        ('{"study": "toy", "rows": []}', "config: Field required; have its command"),
    ],
)
def test_a_file_that_is_given_must_be_one_of_ours(promised, tmp_path, content, message):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    done = command("-m", "eval.why", "--release", promised, "--tried", path)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert f"--tried {path}" in done.stderr
    assert message in done.stderr


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


def test_a_run_folder_is_no_release_and_the_release_in_it_is_named(released_run):
    done = command("-m", "eval.why", "--release", released_run.folder)
    assert done.returncode == 3
    assert "no manifest.json: this is no release; name a folder that absorb release made" in done.stderr


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
    assert late(contract, last_look(contract, [])) is None
    assert late(old, last_look(old, [])).startswith(f"not rechecked since {old.released}")
    looked = last_look(old, [Entry("recheck", f"{date.today()}T00:00:00Z PASS on cpu")])
    assert late(old, looked) is None
    assert promise(old, looked).text == f"promised until {date.today() + timedelta(30)}, every 30 days"
    nobody = old.model_copy(update={"recheck_days": None})
    assert promise(nobody, looked).text == "none is promised"


def test_card_and_bill_of_materials_say_until_when_a_recheck_is_promised(promised):
    until = str(date.today() + timedelta(30))
    assert (
        f"A recheck is promised every 30 days, the first until {until}."
        in (promised / "README.md").read_text()
    )
    root = json.loads((promised / "bom.cdx.json").read_text())["metadata"]["component"]
    assert root["publisher"] == "Team A"
    said = {one["name"]: one["value"] for one in root["properties"]}
    assert said == {"absorb:recheck-days": "30", "absorb:recheck-by": until}
