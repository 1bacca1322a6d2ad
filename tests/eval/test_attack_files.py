"""Files that a hand has changed: each ends in one line that names the place, and in no library's error."""

import json
from datetime import date
from pathlib import Path

import pytest

from eval.core.artifacts import file_sha256
from eval.core.documents import json_objects
from eval.core.errors import UserError
from eval.release.load_release import ReleaseError, check_arm, load_release, overdue
from eval.watch.history import read_history, write_history
from eval.watch.measure import read_new
from tests.eval.test_history import history

DEEP = "[" * 100_000
PART = {
    "folder": "variants/a", "engine": "torch", "boundary": 0, "golden_answers": [], "device": "cpu",
    "verdict": "PASS", "waiver": None, "expires": None,
}  # fmt: skip
FALLBACK = {"folder": "fallback", "engine": "torch", "boundary": 0, "golden_answers": []}
INDEX = {
    "name": "toy",
    "released": "2026-01-01",
    "context": 8,
    "targets": {"cpu": PART},
    "fallback": FALLBACK,
}


def write_release(folder: Path, index: object = INDEX, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "release.json").write_text(index if isinstance(index, str) else json.dumps(index))
    listed = {"release.json": {"sha256": file_sha256(folder / "release.json")}, **files}
    (folder / "manifest.json").write_text(json.dumps({"files": listed}))
    return folder


@pytest.mark.parametrize(
    "index",
    [
        [], "null", DEEP, {}, {**INDEX, "released": "x"}, {**INDEX, "targets": []}, {**INDEX, "fallback": 5},
        {**INDEX, "targets": {"cpu": 5}}, {**INDEX, "targets": {"cpu": {**PART, "expires": "never"}}},
        {**INDEX, "targets": {"cpu": {name: PART[name] for name in PART if name != "expires"}}},
        {**INDEX, "recheck_days": "x"},
    ],
)  # fmt: skip
def test_an_index_of_another_form_is_a_release_error(tmp_path, index):
    with pytest.raises(ReleaseError):
        load_release(write_release(tmp_path / "release", index), "cpu")


def test_a_manifest_or_a_key_of_another_form_is_a_release_error(tmp_path):
    release = write_release(tmp_path / "release", **{"README.md": 5})
    (release / "README.md").write_text("x")
    (tmp_path / "no.pub").write_text("x")
    with pytest.raises(ReleaseError):
        load_release(release, "cpu")
    with pytest.raises(ReleaseError, match="key cannot be read"):
        load_release(write_release(release), "cpu", public_key=write_signature(release, tmp_path / "no.pub"))
    for text in ("[]", "5", DEEP):
        (release / "manifest.json").write_text(text)
        with pytest.raises(ReleaseError, match=r"manifest\.json cannot be read"):
            load_release(release, "cpu")


def write_signature(release: Path, key: Path) -> Path:
    (release / "signature.json").write_text("{}")
    return key


@pytest.mark.parametrize("state", ["[]", "null", "5", DEEP, '"running"'])
def test_a_rollout_of_another_form_asks_for_the_fallback(tmp_path, state):
    (tmp_path / "rollout.json").write_text(state)
    with pytest.raises(ReleaseError, match=r"rollout\.json cannot be read"):
        check_arm("release", tmp_path, write_release(tmp_path / "release"), "cpu", None)


def test_a_key_of_a_rollout_that_is_none_asks_for_the_fallback(tmp_path):
    release = write_release(tmp_path / "release")
    state = {"release": file_sha256(release / "manifest.json"), "target": "cpu", "status": "running"}
    (tmp_path / "rollout.json").write_text(json.dumps(state))
    (tmp_path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ReleaseError, match="public key cannot be read"):
        check_arm("release", tmp_path, release, "cpu", b"no key")


@pytest.mark.parametrize("time", ["9999-12-31", None])
def test_an_unsigned_line_of_a_history_silences_no_reminder(tmp_path, caplog, time):
    release = write_release(tmp_path / "release")
    line = {"time": time, "release": file_sha256(release / "manifest.json")}
    (tmp_path / "history.jsonl").write_text((json.dumps(line) if time else DEEP) + "\n")
    promised = {"recheck_days": 30, "released": "2026-01-01"}
    assert overdue(promised, release, tmp_path / "history.jsonl", date(2026, 11, 1)) == "2026-01-01"
    assert "history.jsonl cannot be read" in caplog.text


@pytest.mark.parametrize("letter", ["\u2028", "\x85", "\x0b", "\x1c", "\r"])
def test_a_letter_of_the_traffic_ends_no_line_of_a_history(tmp_path, letter):
    looks = history(2, n=3, domain=f"news{letter}eu")
    write_history(tmp_path / "history.jsonl", looks)
    assert read_history(tmp_path / "history.jsonl") == looks


def test_a_blank_at_an_end_makes_no_other_document(tmp_path):
    for rows in (["a b", "a b "], ["a b", "\ta b\n"]):
        path = tmp_path / "new.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        with pytest.raises(UserError, match="is 2 documents, as far as they are read"):
            read_new(path, 100)


def test_a_deep_line_is_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_text(DEEP)
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(json_objects(tmp_path / "a.jsonl", "--data", "x"))
