"""Artifacts appear whole or not at all, and are known by their bytes."""

import json
import os
import subprocess
import sys

import pytest

from eval.core.artifacts import (
    LARGE,
    Key,
    build_artifact,
    commit_text,
    digest,
    file_sha256,
    is_done,
    read_manifest,
    verify_artifact,
    write_text,
)
from eval.core.errors import UserError
from tests.helpers import ROOT

KEY = Key("k")


def make(folder, key=KEY, text="one"):
    with build_artifact(
        folder, kind="model", name="m", key=key, parents={"data": "d"}, facts={"seed": 1}
    ) as aside:
        (aside / "sub").mkdir()
        (aside / "sub" / "a.txt").write_text(text)
        (aside / "b.bin").write_bytes(bytes(range(10)))


def test_a_manifest_lists_every_file_and_its_bytes(tmp_path):
    make(tmp_path / "x")
    manifest = verify_artifact(tmp_path / "x")
    assert set(manifest.files) == {"sub/a.txt", "b.bin"}
    assert manifest.bytes == 13
    assert manifest.parents == {"data": "d"}
    assert "torch" in manifest.versions
    assert is_done(tmp_path / "x", Key("k"))
    assert not is_done(tmp_path / "x", Key("other"))
    assert not is_done(tmp_path / "y", Key("k"))


def test_a_start_reads_large_files_again_only_where_their_state_changed(tmp_path, monkeypatch):
    """Any write is seen, also where the time of the change was set back; a full check reads every byte."""
    folder, read = tmp_path / "run" / "models" / "m", []
    with build_artifact(folder, kind="model", name="models/m", key=KEY, parents={}, facts={}) as aside:
        (aside / "large").write_bytes(bytes(LARGE))
        (aside / "small").write_bytes(b"small")

    def counted(path):
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("eval.core.artifacts.file_sha256", counted)

    def reads(check):
        read.clear()
        check()
        return read

    assert reads(lambda: is_done(folder, KEY)) == ["small"], "it was read when it was made"
    assert sorted(reads(lambda: verify_artifact(folder))) == ["large", "small"]
    folder.rename(tmp_path / "away")
    assert sorted(reads(lambda: is_done(tmp_path / "away", KEY))) == ["large", "small"], "of no run"
    (tmp_path / "away").rename(folder)
    assert reads(lambda: is_done(folder, KEY)) == ["small"]
    (folder / "large").touch()
    assert sorted(reads(lambda: is_done(folder, KEY))) == ["large", "small"]
    assert reads(lambda: is_done(folder, KEY)) == ["small"]
    before = (folder / "large").stat()
    with (folder / "large").open("r+b") as stream:
        stream.write(b"\1")
    os.utime(folder / "large", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="large has sha256"):
        is_done(folder, KEY)


def test_one_content_one_hash(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "y", key=Key("other"))
    make(tmp_path / "z", text="two")
    hashes = [read_manifest(tmp_path / n).hash for n in "xyz"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert (
        digest({"a": 1, "b": [2, "ä"]}) == digest({"b": [2, "ä"], "a": 1}) != digest({"a": 1, "b": [2, "a"]})
    )


def test_a_failure_leaves_nothing_and_keeps_what_was(tmp_path):
    make(tmp_path / "x")
    before = read_manifest(tmp_path / "x")

    def fail():
        with build_artifact(
            tmp_path / "x", kind="model", name="m", key=Key("new"), parents={}, facts={}
        ) as aside:
            (aside / "half").write_text("written")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert verify_artifact(tmp_path / "x") == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_remaking_replaces_the_whole(tmp_path):
    make(tmp_path / "x")
    make(tmp_path / "x", key=Key("new"), text="two")
    assert is_done(tmp_path / "x", Key("new"))
    assert (tmp_path / "x" / "sub" / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_aside_is_swept(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom eval.core.artifacts import Key, build_artifact\n"
        "with build_artifact(Path(sys.argv[1]), kind='m', name='m', key=Key('k'), parents={}, facts={}) as aside:\n"
        "    (aside / 'half').write_text('x')\n    print('writing', flush=True)\n    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert not (tmp_path / "x").exists()
    assert len(list(tmp_path.iterdir())) == 1
    make(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "b.bin").unlink(), "b.bin is missing"),
        (
            lambda f: (f / "b.bin").write_bytes(bytes(9)),
            r"b.bin has sha256 \w+ \(9 bytes\), recorded \w+ \(10 bytes\)",
        ),
        (lambda f: (f / "sub" / "a.txt").write_text("onE"), "a.txt has sha256"),
        (lambda f: (f / "stray").write_text(""), "unrecorded file stray; delete it"),
        (
            lambda f: (f / "manifest.json").write_text("{}"),
            "manifest .*Field required; delete .* and run again",
        ),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
    ],
)
def test_every_damage_is_reported(tmp_path, harm, message):
    make(tmp_path / "x")
    harm(tmp_path / "x")
    with pytest.raises(UserError, match=message):
        verify_artifact(tmp_path / "x")


def test_files_are_written_whole(tmp_path):
    write_text(tmp_path / "deep" / "a.json", json.dumps({"a": 1}))
    write_text(tmp_path / "deep" / "a.json", json.dumps({"a": 2}))
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == {"a": 2}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_a_commit_says_where_files_were_changed_since(tmp_path, monkeypatch):
    """Of what is signed too: a commit alone would vouch for code that it does not hold."""
    monkeypatch.setattr("eval.core.artifacts.ROOT", tmp_path)
    commit_text.cache_clear()
    assert commit_text(40) == ""
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"]):
        (tmp_path / "a").write_text("1")
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True)
    commit_text.cache_clear()
    whole, short = commit_text(40), commit_text(12)
    assert whole.startswith(short)
    assert (len(whole), len(short)) == (40, 12)
    (tmp_path / "a").write_text("2")
    commit_text.cache_clear()
    assert commit_text(40) == f"{whole}-dirty"
    commit_text.cache_clear()
