"""What is done again, and what is not: versions of code and libraries, content of a base, --accept-old."""

import os
import shutil
from importlib import metadata

import pytest

from compress.recipe import load_recipe
from distill.data.split import data_key
from distill.models import load
from distill.models.load import base_origin, hub_commit
from distill.teachers.run import find_teacher_hash, fit_method
from eval.core import artifacts
from eval.core.artifacts import (
    MANIFEST,
    VERSIONS,
    Key,
    Stage,
    build_artifact,
    describe_accepted,
    is_done,
    make_key,
    parse_stages,
    read_manifest,
    write_text,
)
from eval.core.errors import UserError
from eval.core.sections import Base
from eval.core.study import load_study
from tests.compress.student_run import build_student_run, recipe_file
from tests.helpers import run, tiny_model, tiny_study, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def installed(monkeypatch):
    """Pretends that other versions of libraries are installed."""
    real = metadata.version

    def pretend(**versions):
        monkeypatch.setattr(artifacts.metadata, "version", lambda name: versions.get(name) or real(name))
        artifacts._version.cache_clear()

    yield pretend
    monkeypatch.undo()
    artifacts._version.cache_clear()


def age(folder, **code):
    """Makes a manifest say that other versions made the artifact."""
    manifest = read_manifest(folder)
    old = {**manifest.code, **code}
    changes = {"code": old, "key": Key(manifest.inputs, old).digest}
    write_text(folder / MANIFEST, manifest.model_copy(update=changes).model_dump_json())


def test_a_key_has_the_versions_of_its_stage_and_of_the_libraries_it_depends_on(installed):
    before = {stage: make_key(stage, ["x"]).digest for stage in VERSIONS}
    installed(peft="99.0.0")
    after = {stage: make_key(stage, ["x"]).digest for stage in VERSIONS}
    assert {stage for stage in VERSIONS if before[stage] != after[stage]} == {"method", "targets", "student"}
    installed(torch="2.99.1+cpu")
    cpu = make_key("base", ["x"])
    installed(torch="2.99.1+cu130")
    assert cpu.code["torch"] == "2.99.1"
    assert make_key("base", ["x"]) == cpu, "one version built in two ways"


def test_data_depends_on_the_library_that_reads_a_source_and_on_no_other(installed, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    local = {"kind": "dataset", "path": "parquet", "data_files": str(rows)}
    hub = {"kind": "dataset", "path": "someone/texts"}
    folder = {"kind": "folder", "path": str(tmp_path), "include": ["*.jsonl"]}
    read_here = {**local, "path": "json"}
    sources = {"local": local, "hub": hub, "folder": folder, "read here": read_here}
    path = tiny_study(tmp_path)
    studies = {
        name: load_study(path, data__documents=[source], data__shifted={}) for name, source in sources.items()
    }
    before = {name: data_key(study) for name, study in studies.items()}
    installed(datasets="99.0.0")
    after = {name: data_key(study) for name, study in studies.items()}
    assert {name for name in studies if before[name] != after[name]} == {"local", "hub"}
    assert {name: key.inputs for name, key in before.items()} == {
        name: key.inputs for name, key in after.items()
    }, "--accept-old data keeps what was read"


def test_a_variant_depends_on_the_libraries_of_its_own_passes(installed, tmp_path):
    recipes = {name: load_recipe(name).code for name in ("wanda50", "int8")}
    installed(nncf="99.0.0")
    assert load_recipe("wanda50").code == recipes["wanda50"]
    assert load_recipe("int8").code != recipes["int8"]
    train = {"pass": "recover", "train": {"steps": 1}}
    path = recipe_file(tmp_path, "again", {"pass": "wanda"}, train)
    assert {"variant", "student", "torch", "Wanda", "Recover"} <= set(load_recipe(path).code)


def test_a_base_is_known_by_its_content(tmp_path):
    folder, memory = tmp_path / "base", tmp_path / "memory.json"
    tiny_model().save_pretrained(folder)
    origin = base_origin(Base(path=str(folder)), memory)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert base_origin(Base(path=str(folder)), memory) == origin, "touched"
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("Ours.")
    (copy / ".git").mkdir()
    (copy / ".git" / "HEAD").write_text("x")
    assert base_origin(Base(path=str(copy)), memory) == origin, "copied, with notes beside it"
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert base_origin(Base(path=str(copy)), memory) != origin
    (copy / "more").mkdir()
    (copy / "more" / "config.json").write_text("{}")
    assert len(load.local_hashes(copy, memory)) == len(load.local_hashes(folder, memory)) + 1


def test_an_unchanged_file_of_a_base_is_read_once(tmp_path, monkeypatch):
    folder, memory = tmp_path / "base", tmp_path / "memory.json"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"1234")
    first = load.local_hashes(folder, memory)
    monkeypatch.setattr("eval.core.artifacts.file_sha256", lambda path: pytest.fail("read again"))
    assert load.local_hashes(folder, memory) == first


def test_a_hub_base_is_known_by_its_commit_online_and_from_the_cache(monkeypatch, tmp_path):
    class Hub:
        def model_info(self, path, revision, timeout):
            assert (path, revision) == ("someone/model", "main")
            return type("Info", (), {"sha": COMMIT})

    monkeypatch.setattr(load, "HfApi", Hub)
    base = Base(path="someone/model")
    known = {"hub": "someone/model", "commit": COMMIT}
    assert base_origin(base, tmp_path / "x") == known

    def refuse(self, path, revision, timeout):
        raise ConnectionError("offline")

    monkeypatch.setattr(Hub, "model_info", refuse)
    snapshot = tmp_path / "snapshots" / COMMIT / "config.json"
    monkeypatch.setattr(load, "try_to_load_from_cache", lambda *_, **__: str(snapshot))
    assert base_origin(base, tmp_path / "x") == known
    monkeypatch.setattr(load, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"base.path: someone/model \(offline\)"):
        base_origin(base, tmp_path / "x")
    assert hub_commit("someone/model", COMMIT) == COMMIT, "a commit stands for itself"


def test_what_others_made_is_accepted_where_asked_and_its_manifest_says_so(tmp_path):
    folder, old = (
        tmp_path / "students" / "S1" / "s0",
        Key("inputs", {"student": "1", "torch": "2.1.0"}, "student"),
    )
    with build_artifact(folder, kind="model", name="s", key=old, parents={}, facts={}) as aside:
        (aside / "x").write_text("x")
    new = Key("inputs", {"student": "2", "torch": "2.2.0"}, "student")
    assert not is_done(folder, new)
    assert not is_done(folder, new, ("base",)), "another stage"
    assert not is_done(folder, Key("others", new.code, "student"), ("student",)), "other settings"
    assert describe_accepted(tmp_path) == []
    assert is_done(folder, new, ("student",))
    assert is_done(folder, new), "accepted once"
    assert read_manifest(folder).code == old.code
    assert describe_accepted(tmp_path) == ["accepted: students made by code version 1, torch 2.1.0 (1)"]
    newer = Key("inputs", {**old.code, "datasets": "4.4.0"}, "student")
    assert is_done(folder, newer, ("student",))
    assert describe_accepted(tmp_path) == ["accepted: students made by no datasets (1)"]
    assert not is_done(folder, Key("inputs", {"student": "3", "torch": "2.2.0"}, "student"))
    assert is_done(folder, old), "what made it is back"
    assert describe_accepted(tmp_path) == []


def test_stages_are_named_and_answered_with_the_nearest():
    assert parse_stages("base, student", VERSIONS) == ("base", "student")
    assert parse_stages("all", ("variant",)) == ("variant",)
    with pytest.raises(UserError, match="--accept-old: 'studnet'; did you mean 'student'"):
        parse_stages("studnet", VERSIONS)


@pytest.mark.slow
def test_accept_old_keeps_the_students_of_another_version(tmp_path, monkeypatch):
    """Through the real command, with the base of a copied folder: only the student that is not accepted is new."""
    folder, tokenizer = tmp_path / "my-base", tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    method = {"name": "placebo"}
    path = tiny_study(
        tmp_path, base={"path": str(folder)}, method=method, seeds=[0], ce_arm=False, trackers=[]
    )
    command = ("distill/train.py", "--config", path)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    study = load_study(path)
    student = study.folder / "students" / "S1" / "s0"
    assert read_manifest(study.folder / "base" / "s0").facts["origin"].keys() == {"files"}
    times = {p: p.stat().st_mtime_ns for p in study.folder.glob("**/model.safetensors")}
    age(student, student="0", torch="2.0.0")
    shutil.copytree(folder, tmp_path / "elsewhere")
    words = ("--base.path", str(tmp_path / "elsewhere"))
    done = run(*command, *words, "--accept-old", "student")
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in times} == times, "nothing was trained again"
    assert "code version 0" in describe_accepted(study.folder)[0]
    assert "accept_old:" not in (study.folder / "study.yaml").read_text()
    fingerprint = find_teacher_hash(study, "S1", 0)
    version, libraries = VERSIONS["method"]
    monkeypatch.setitem(VERSIONS, "method", Stage(version + 1, libraries))
    accepting = study.model_copy(update={"accept_old": ("method",)})
    fit_method(accepting, "T1", [0], (0,), lambda share, tokens=0: None)
    assert find_teacher_hash(study, "S1", 0) == fingerprint, "it is the teacher that it was"
    assert f"accepted: teachers made by code version {version} (1)" in describe_accepted(study.folder)
    monkeypatch.undo()
    fit_method(study, "T1", [0], (0,), lambda share, tokens=0: None)
    assert describe_accepted(study.folder) == ["accepted: students made by code version 0, torch 2.0.0 (1)"]
    age(student, student="0")
    assert run(*command, *words).returncode == 0
    changed = {p for p in times if p.stat().st_mtime_ns != times[p]}
    assert changed == {student / "model.safetensors"}
    assert "did you mean 'student'" in run(*command, "--accept-old", "studnet").stderr
    assert "--accept-old: ''; accepted: " in run(*command, "--accept-old", "").stderr


@pytest.mark.slow
def test_accept_old_keeps_variants(tmp_path):
    study = build_student_run(tmp_path, ["wanda50"], layers=2)
    command = ("-m", "compress.run", "--study", study.folder)
    assert "2 made now" in run(*command).stdout
    for arm in ("S1", "S0"):
        age(study.folder / "variants" / "wanda50" / arm / "s0", variant="0")
    assert "0 made now" in run(*command, "--accept-old", "all").stdout
    assert describe_accepted(study.folder) == ["accepted: variants made by code version 0 (2)"]
    age(study.folder / "variants" / "wanda50" / "S1" / "s0", variant="0")
    assert "1 made now" in run(*command).stdout
