"""The real command lines: base, then students; resumed, launched on two processes, and stopped by bad input."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.pipeline import make_base, make_student
from eval.core.artifacts import read_manifest, verify_artifact
from eval.core.errors import UserError
from eval.core.records import each_score, read_scores
from eval.core.study import CHANGED, load_study
from tests.helpers import ROOT, SHAPE, launch, run, run_here, tiny_model, tiny_study, tiny_tokenizer

MODELS = ["base/s0", "base/s1", *(f"students/{arm}/s{seed}" for arm in ("S1", "S0", "CE") for seed in (0, 1))]


def hashes(study):
    return {name: read_manifest(study.folder / name).hash for name in MODELS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny study after the real command line, and what that printed."""
    path = tiny_study(tmp_path_factory.mktemp("trained"))
    done = launch(path)
    assert done.returncode == 0, done.stderr
    return load_study(path), path, done


def test_every_arm_is_exported_with_its_manifest_and_teachers_are_scored(trained):
    study, _, done = trained
    for name in MODELS:
        manifest = read_manifest(study.folder / name)
        assert manifest.name == name
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(manifest.files)
        assert manifest.facts["loss_curve"][-1][0] == 8, "32 rows, 4 a step"
    for kind, split in (("score", "validation"), ("test", "test")):
        scores = list(each_score(study.folder, kind))
        assert {(s.arm, s.seed) for s in scores} == {(t, s) for t in ("T0", "T1") for s in (0, 1)}
        assert all(s.documents.slice[0] == split for s in scores)
        assert all(set(s.documents.cluster) == {"code", "prose"} for s in scores if kind == "score"), (
            "domains"
        )
    assert "data: 40 of 40 rows used\nfar: 8 of 8 rows used\n" in done.stdout
    assert "left" in done.stderr, "progress tells the time left"
    assert " tokens/s, " in done.stderr
    assert not list(study.folder.rglob("*.tmp"))


def test_arms_of_a_seed_start_alike_and_end_apart(trained):
    study, _, _ = trained
    parents = {name: read_manifest(study.folder / name).parents for name in MODELS[2:]}
    for seed in (0, 1):
        bases = {parents[f"students/{arm}/s{seed}"]["base"] for arm in ("S1", "S0", "CE")}
        assert bases == {read_manifest(study.folder / f"base/s{seed}").hash}
    assert parents["students/S1/s0"]["teacher"] == parents["students/S1/s1"]["teacher"], "one ensemble"
    assert parents["students/S0/s0"]["teacher"] != parents["students/S0/s1"]["teacher"]
    assert "teacher" not in parents["students/CE/s0"]
    assert len(set(hashes(study).values())) == len(MODELS)


def test_a_second_call_does_nothing(trained):
    study, path, _ = trained
    before = {
        p: p.stat().st_mtime_ns for p in study.folder.rglob("*") if p.is_file() and p.name == "manifest.json"
    }
    assert launch(path).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_settings_whose_data_cannot_be_made_leave_the_run_as_it_was(trained):
    study, path, _ = trained
    texts = {name: (study.folder / name).read_text() for name in ("study.yaml", "plan.json")}
    done = run("distill/train.py", "--config", path, "--data.validation", "100000")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert {name: (study.folder / name).read_text() for name in texts} == texts
    assert not (study.folder / CHANGED).exists()


def test_only_what_a_change_touches_is_done_again(trained, tmp_path):
    study, path, _ = trained
    shutil.copytree(study.folder, tmp_path / "runs" / "tiny")
    before = hashes(study)
    done = launch(path, "--runs", str(tmp_path / "runs"), "--train.loss.weight", "0.5")
    assert done.returncode == 0, done.stderr
    after = {name: read_manifest(tmp_path / "runs" / "tiny" / name).hash for name in MODELS}
    same = {name for name in MODELS if before[name] == after[name]}
    # CE has no teacher, so the weight of the divergence leaves its weights as they were.
    assert {"base/s0", "base/s1"} <= same
    assert not {name for name in same if "S1" in name or "S0" in name}


ALONE = """
import sys
for name in ("distill", "compress", "eval"):
    sys.modules[name] = None  # as where this project is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, tokenizer = (k.from_pretrained(folder) for k in (AutoModelForCausalLM, AutoTokenizer))
    out = model.generate(**tokenizer("def return", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)
    assert out.shape[1] > 5, out.shape
    print(type(model).__name__, model.config.num_hidden_layers, tokenizer.decode(out[0]))
assert "peft" not in sys.modules
"""
FRESH = {"model_type": "qwen3", **SHAPE, "head_dim": 32, "num_hidden_layers": 1}
KINDS = {
    "lora": {"tuning": "lora", "rank": 4},
    "every": {"start": "every", "layers": 1},
    "influential": {"start": "influential", "layers": 1, "tuning": "lora", "modules": ["q_proj"]},
    "fresh": {"start": "fresh", "architecture": FRESH},
}


@pytest.mark.slow
def test_students_of_every_kind_load_and_generate_where_this_project_is_absent(trained, tmp_path):
    study, path, _ = trained
    shutil.copytree(study.folder, tmp_path / "runs" / "tiny")
    folders = [(study.folder / "students" / "S1" / "s0").resolve()]
    for kind, student in KINDS.items():
        changed = load_study(path, ["--runs", str(tmp_path / "runs"), f"--student={json.dumps(student)}"])
        make_student(changed, "S1", 0, lambda share, tokens=0: None)
        folder = changed.folder / "students" / "S1" / "s0"
        verify_artifact(folder)
        assert read_manifest(folder).parents == read_manifest(folders[0]).parents, (
            "base, data and teacher stay"
        )
        assert read_manifest(folder).facts.get("kept_layers") in (None, [0], [1])
        assert (folder / "generation_config.json").is_file()
        folders.append(tmp_path / kind)
        folder.rename(folders[-1])
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *map(str, folders)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = [line.split()[:2] for line in done.stdout.splitlines() if "ForCausalLM" in line]
    llama = "LlamaForCausalLM"
    assert listed == [[llama, "2"], [llama, "2"], [llama, "1"], [llama, "1"], ["Qwen3ForCausalLM", "1"]]


def test_curves_of_every_run_are_logged_with_bits_per_byte_where_asked(trained, tmp_path):
    study, path, _ = trained
    arms = {f"{arm}-s{seed}" for arm in ("base", "S1", "S0", "CE") for seed in (0, 1)}
    assert {p.name for p in (study.folder / "logs").iterdir()} == arms
    shutil.copytree(study.folder, tmp_path / "runs" / "tiny")
    words = ["--runs", str(tmp_path / "runs"), "--train.evaluate_every", "3"]
    changed = load_study(path, [*words, "--ce_train.rows", "8", "--ce_train.evaluate_every", "2"])
    place = changed.folder / "students"
    before = {arm: (place / arm / "s0" / "manifest.json").read_text() for arm in ("S1", "CE")}
    for arm in ("S1", "CE"):
        make_student(changed, arm, 0, lambda share, tokens=0: None)
    after = {arm: (place / arm / "s0" / "manifest.json").read_text() for arm in ("S1", "CE")}
    assert after["S1"] == before["S1"], "to look at it more often makes no other student"
    assert json.loads(after["CE"])["facts"]["loss_curve"][-1][0] == 4, (
        "32 rows, 8 a step, as CE's own settings say"
    )
    make_student(load_study(path, [*words, "--train.rows", "8"]), "CE", 0, lambda share, tokens=0: None)
    same = (place / "CE" / "s0" / "manifest.json").read_text()
    assert same == after["CE"], "it is the CE of a study that trains all so, by its key"
    card = (place / "CE" / "s0" / "README.md").read_text()
    assert f"on the text alone, with settings of its own: rows 8 in place of {study.train.rows}" in card
    events = EventAccumulator(str(changed.folder / "logs" / "CE-s0"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("loss", "gradient_norm", "learning_rate", "tokens_per_second", "validation_bits_per_byte")
    }
    assert [e.step for e in events.Scalars("validation_bits_per_byte")] == [2, 4]


@pytest.mark.slow
def test_two_processes_train_the_same_models(trained, tmp_path):
    """Sums run in another order there, so the curves agree to rounding, not to the bit."""
    study, path, _ = trained
    done = launch(path, "--runs", str(tmp_path / "runs"), processes=2)
    assert done.returncode == 0, done.stderr
    assert "students: 2 processes" in done.stderr
    for name in MODELS:
        one = read_manifest(study.folder / name).facts["loss_curve"]
        two = read_manifest(tmp_path / "runs" / "tiny" / name).facts["loss_curve"]
        assert [s for s, _ in one] == [s for s, _ in two]
        assert one[0][1] == pytest.approx(two[0][1], rel=1e-3)
        assert one[-1][1] == pytest.approx(two[-1][1], rel=2e-2)


@pytest.mark.slow
def test_a_base_may_be_a_folder_and_targets_online(tmp_path):
    """The path that a hub name takes too: a plain checkpoint, fine-tuned into members."""
    folder, tokenizer = tmp_path / "my-base", tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    training = {"steps": 4, "rows": 4, "optimizer": {"name": "adamw", "lr": 0.005}}
    path = tiny_study(
        tmp_path,
        base={"path": str(folder), "train": training},
        method={"name": "experts", "settings": {"rank": 2, "train": training}},
        targets={"source": "online"},
        train={**training, "loss": {"divergence": "jsd", "temperature": 2.0}},
    )
    done = launch(path)
    assert done.returncode == 0, done.stderr
    study = load_study(path)
    assert set(hashes(study)) == set(MODELS)
    assert not (study.folder / "targets").exists()
    fitted = read_manifest(study.folder / "method" / "T1" / "s0")
    assert {f"expert{i}/adapter_model.safetensors" for i in (0, 1)} <= set(fitted.files)
    assert set(read_manifest(study.folder / "method" / "T0" / "s0").files) >= {
        "expert0/adapter_model.safetensors"
    }


@pytest.mark.slow
def test_base_alone_then_an_override(tmp_path):
    path = tiny_study(tmp_path)
    done = run("distill/train.py", "--until", "bases", "--config", path, "--base.train.steps", "3")
    assert done.returncode == 0, done.stderr
    study = load_study(path)
    assert read_manifest(study.folder / "base" / "s0").facts["loss_curve"][-1][0] == 3
    assert yaml.safe_load((study.folder / "study.yaml").read_text())["base"]["train"]["steps"] == 3
    assert not (study.folder / "students").exists()


def one_line(done):
    """The error is one clear line on stderr, with the exit code of an error."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trian.steps", "5"], "unknown key trian: 'trian'; did you mean 'train'?"),
        (["--train.stepz", "5"], "unknown key train.stepz: 'stepz'; did you mean 'steps'?"),
        (["--train.steps", "soon"], "train.steps: 'soon'"),
        (["--train.steps"], "give a value after it"),
        (["--method.name", "ensembel"], "method.name: 'ensembel'; did you mean 'ensemble'?"),
        (["--method.settings.members", "1"], "method.settings: members: 1; expected more than 1"),
        (["--seeds", "[0, 0]"], "seeds are [0, 0]; give each seed once"),
        (["--base.path", "x"], "exactly one of `path`"),
        (["--student.tuning", "qlora"], "student.tuning: qlora needs CUDA, the device is cpu"),
        (["--student.start", "every"], "`layers` says how many"),
        (["--trackers", "[tensorbord]"], "did you mean 'tensorboard'"),
        (["--train.rows", "64"], "train.rows is 64, more than data.train_rows: 32"),
        (["--data.train_rows", "100000"], "data.train_rows: 100000, but the training documents have"),
        (["--runs", "/proc/nowhere"], "run folder /proc/nowhere/tiny"),
        (["--base.architecture.model_type", "lama"], "base.architecture.model_type: 'lama'"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, words, message):
    path = tiny_study(tmp_path)
    done = run_here("distill.train", "--config", path, *words)
    assert message in one_line(done)
    runs = tmp_path / "runs"
    assert not list(runs.rglob("*.tmp"))
    assert not list(runs.rglob("students/*/s*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "[0, 0]"], "seeds are [0, 0]; give each seed once"),
        (["--train.optimizer.lr", "1e30"], "loss at step"),
    ],
)
def test_the_command_ends_in_one_line_too(tmp_path, words, message):
    path = tiny_study(tmp_path)
    assert message in one_line(run("distill/train.py", "--config", path, *words))
    assert not list((tmp_path / "runs").rglob("*.tmp"))


def test_a_base_without_weights_or_with_foreign_ones_is_refused(tmp_path):
    folder, tokenizer = tmp_path / "my-base", tiny_tokenizer()
    tiny_model(len(tokenizer) - 20).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = tiny_study(tmp_path, base={"path": str(folder)}, method={"name": "placebo"})
    assert "tokenizer of" in one_line(run_here("distill.train", "--config", path))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        make_base(load_study(path), 0, lambda share, tokens=0: None)
    missing = tiny_study(tmp_path, base={"path": "nobody/has-this"}, method={"name": "placebo"})
    assert "base.path: nobody/has-this" in one_line(run_here("distill.train", "--config", missing))
    assert "no such file" in one_line(run_here("distill.train", "--config", tmp_path / "absent.yaml"))


def test_a_damaged_student_is_reported_and_not_used(trained, tmp_path):
    study, path, _ = trained
    shutil.copytree(study.folder, tmp_path / "runs" / "tiny")
    weights = tmp_path / "runs" / "tiny" / "students" / "S1" / "s0" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    message = one_line(run("distill/train.py", "--config", path, "--runs", tmp_path / "runs"))
    assert "model.safetensors has sha256" in message


def printed(document, language):
    """The first block of `language` in a document."""
    return (ROOT / document).read_text().split(f"```{language}\n")[1].split("```")[0]


def test_a_method_in_a_file_of_your_own_as_printed(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "neural_cache.py").write_text(printed("docs/own-method.md", "python"))
    method = yaml.safe_load(printed("docs/own-method.md", "yaml"))["method"]
    path = tiny_study(tmp_path, seeds=[0], method=method, ce_arm=False)
    done = run("distill/train.py", "--config", path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    study = load_study(path)
    teachers = {s.arm: s.documents.bits for s in read_scores(study.folder)}
    assert teachers["T1"] != teachers["T0"]
    assert read_manifest(study.folder / "students" / "S1" / "s0").parents["teacher"]


def test_a_method_that_returns_something_else_ends_in_one_line(tmp_path):
    (tmp_path / "ours").mkdir()
    text = printed("docs/own-method.md", "python").replace("self.settings.weight * cached)", "5.0 * cached)")
    (tmp_path / "ours" / "neural_cache.py").write_text(text)
    path = tiny_study(tmp_path, seeds=[0], method={"name": "ours.neural_cache"}, ce_arm=False)
    done = run("distill/train.py", "--config", path, PYTHONPATH=str(tmp_path))
    assert "method 'ours.neural_cache': log_probs sum to" in one_line(done)


def test_a_base_that_is_used_as_it_is_stands_once_for_all_seeds(tmp_path):
    """One export, one teacher without a method and one score; each seed has its folder and its records."""
    folder, tokenizer = tmp_path / "my-base", tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = tiny_study(tmp_path, seeds=[0, 1], base={"path": str(folder)}, recipes=[])
    done = run("distill/train.py", "--config", path, "--until", "bases")
    assert done.returncode == 0, done.stderr
    study = load_study(path)
    first, second = (study.folder / "base" / f"s{seed}" for seed in (0, 1))
    assert read_manifest(first).hash == read_manifest(second).hash
    assert [read_manifest(place).facts["seed"] for place in (first, second)] == [0, 1]
    assert (first / "model.safetensors").stat().st_ino == (second / "model.safetensors").stat().st_ino
    assert "seed" not in (first / "README.md").read_text()
    done = run("-m", "eval.score", "--study", path)
    assert done.returncode == 0, done.stderr
    assert "score: plain/B-s0 done, 1 of 1" in done.stderr
    records = {record.seed: record for record in read_scores(study.folder)}
    assert set(records) == {0, 1}
    assert records[0].documents == records[1].documents
    again = run("-m", "eval.score", "--study", path)
    assert "scored 0 models, 2 were scored before" in again.stdout
