"""The real command on a run folder with tiny students."""

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.build import TrainedStudent, build_folder, build_variants
from compress.pipeline import HELD, LIBRARIES, affordable_workers, pending_variants
from compress.publish import publish_variant
from compress.verify import verify_reload
from distill.data.rows import training_documents
from eval.core.artifacts import hash_files, read_manifest, verify_artifact
from eval.core.errors import UserError
from eval.core.study import load_study
from eval.engines import has_own_vocabulary, load_engine
from eval.engines.torch import load_checkpoint
from eval.metrics.likelihood import document_bits
from eval.score.agreement_records import variant_folders
from tests.compress.student_run import add_student, build_student_run, recipe_file, wide_tokenizer
from tests.helpers import ROOT, run, tiny_model, tiny_study

TRAIN = {"steps": 6, "rows": 4, "optimizer": {"name": "muon", "lr": 0.01}}
DROP = {"pass": "drop_layers", "share": 0.25}
ARMS = ("S1", "S0")

LOAD = """
import sys, json
from pathlib import Path
for name in ("compress", "distill", "eval"):
    sys.modules[name] = None  # as where this project is not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, engine in json.loads(sys.argv[1]):
    kind = AutoModelForCausalLM
    if engine == "openvino":
        from optimum.intel import OVModelForCausalLM as kind
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer("the river", return_tensors="pt"), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > 4
print("all load")
"""


def compress(study, *words):
    return run("-m", "compress.run", "--study", study.folder, *words)


def manifests(study):
    return {
        p.parent: read_manifest(p.parent) for p in sorted(study.folder.glob("variants/*/*/*/manifest.json"))
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A study with one recipe of every kind, compressed once."""
    folder = tmp_path_factory.mktemp("run")
    recipes = [
        recipe_file(folder, "chain", DROP, {"pass": "recover", "train": TRAIN}),
        recipe_file(
            folder,
            "chain-int8",
            DROP,
            {"pass": "recover", "train": TRAIN},
            {"pass": "openvino", "weights": "int8"},
        ),
        recipe_file(folder, "w50", {"pass": "wanda"}),
        recipe_file(folder, "few", {"pass": "vocabulary"}, DROP, {"pass": "recover", "train": TRAIN}),
        recipe_file(folder, "four", {"pass": "bitsandbytes", "format": "nf4"}, target="gpu"),
    ]
    study = build_student_run(folder, recipes, seeds=[0], tokenizer=wide_tokenizer())
    students = hash_files(study.folder / "students")
    result = compress(study, "--json", folder / "compress.json")
    assert result.returncode == 0, result.stderr
    return study, students, result


def test_every_recipe_is_applied_to_both_arms(done):
    study, _, result = done
    assert f"variants: 10 in {study.folder / 'variants'}, 10 made now" in result.stdout
    assert len(manifests(study)) == 10
    written = json.loads((study.folder.parent.parent / "compress.json").read_text())
    assert (written["built"], written["failures"], len(written["variants"])) == (10, {}, 10)
    for folder, manifest in manifests(study).items():
        assert written["variants"][manifest.name] == {"hash": manifest.hash, **manifest.facts}
        recipe, arm, seed = folder.parts[-3:]
        assert manifest.name == f"variants/{recipe}/{arm}/{seed}"
        assert manifest.kind == "variant"
        facts = manifest.facts
        assert (facts["recipe"], facts["arm"], facts["seed"]) == (recipe, arm, 0)
        assert facts["target"] == ("gpu" if recipe == "four" else "cpu")
        assert facts["engine"] == ("openvino" if recipe == "chain-int8" else "torch")
        assert ("loss_curve" in facts) == (recipe == "few" or recipe.startswith("chain"))
        assert manifest.parents["student"] == read_manifest(study.folder / "students" / arm / seed).hash
        assert manifest.parents["data"] == read_manifest(study.folder / "data").hash
        assert facts["reload"]["log_prob_difference"] < 1e-3
        verify_artifact(folder)


def test_a_smaller_vocabulary_scores_bytes_and_is_not_compared_token_by_token(done):
    """Its documents are as many tokens as before; the student gave the kept ones less than all probability."""
    study, _, _ = done
    few, plain = study.folder / "variants/few/S1/s0", study.folder / "students/S1/s0"
    assert has_own_vocabulary(read_manifest(few))
    assert not has_own_vocabulary(read_manifest(study.folder / "variants/chain/S1/s0"))
    assert few not in variant_folders(study.folder, study)
    (small, fewer), (model, tokenizer) = load_checkpoint(few), load_checkpoint(plain)
    assert small.config.vocab_size == len(fewer) < model.config.vocab_size == len(tokenizer)
    documents = list(training_documents(study))
    bits = [
        document_bits(load_engine("torch", folder).logits, documents, read, 32)
        for folder, read in ((few, fewer), (plain, tokenizer))
    ]
    assert bits[0][1] == bits[1][1], "as many tokens in every document"
    assert len(documents) == len(bits[0][0]) > 20


def test_reports_follow_each_other(done):
    study, _, _ = done
    for manifest in manifests(study).values():
        reports = manifest.facts["reports"]
        assert all(a["after"] == b["before"] for a, b in pairwise(reports))
    chain = read_manifest(study.folder / "variants/chain/S1/s0").facts["reports"]
    assert [r["name"] for r in chain] == ["drop_layers", "recover"]
    assert read_manifest(study.folder / "variants/chain-int8/S1/s0").facts["reports"][:2] == chain


def test_the_output_is_plain_lines_and_nothing_of_the_libraries(done):
    lines = done[2].stderr.splitlines()
    assert done[2].stdout.count("\n") == 1, done[2].stdout
    assert sum("verify variants:" in line for line in lines) == 2, "a process for each student"
    assert all(line.startswith(("build variants:", "verify variants:")) for line in lines), done[2].stderr


def test_parents_are_not_touched_and_no_scratch_is_left(done):
    study, students, _ = done
    assert hash_files(study.folder / "students") == students
    assert not (study.folder / "scratch" / "variants").exists()
    assert not list(study.folder.glob("variants/**/.*"))


@pytest.mark.slow
def test_variants_load_where_the_project_is_absent(done, tmp_path):
    """By their standard format alone, in a process that cannot import compress, distill or eval."""
    study, _, _ = done
    places = [
        (str(folder.resolve()), m.facts["engine"])
        for folder, m in manifests(study).items()
        if m.facts["arm"] == "S1"
    ]
    result = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, json.dumps(places)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.endswith("all load\n"), result.stderr


@pytest.mark.slow
def test_a_second_call_does_nothing_and_a_lost_variant_alone_is_remade(done):
    study, _, _ = done
    before = {
        folder: (m.hash, (folder / "manifest.json").stat().st_mtime_ns)
        for folder, m in manifests(study).items()
    }
    again = compress(study)
    assert again.returncode == 0, again.stderr
    assert "0 made now" in again.stdout
    lost = study.folder / "variants" / "chain" / "S0" / "s0"
    shutil.rmtree(lost)
    third = compress(study)
    assert "1 made now" in third.stdout, third.stderr
    after = {
        folder: (m.hash, (folder / "manifest.json").stat().st_mtime_ns)
        for folder, m in manifests(study).items()
    }
    assert {f for f in before if before[f] != after[f]} == {lost}
    assert before[lost][0] == after[lost][0], "the same bytes, whatever else the process made"


def test_a_changed_recipe_or_parent_is_made_again(done, tmp_path):
    study, _, _ = done
    assert pending_variants(study) == []
    other = recipe_file(tmp_path, "w50", {"pass": "wanda", "sparsity": 0.25})
    changed = study.model_copy(update={"recipes": [*study.recipes[:2], other]})
    assert [v.name for v in pending_variants(changed)] == ["variants/w50/S1/s0", "variants/w50/S0/s0"]
    assert (
        len(
            pending_variants(study.model_copy(update={"data": study.data.model_copy(update={"context": 16})}))
        )
        == 10
    )


@pytest.fixture
def small(tmp_path):
    return build_student_run(tmp_path, ["wanda50"], layers=2)


def line_of(result) -> str:
    assert result.returncode == 3, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_a_truncated_parent(small):
    weights = small.folder / "students" / "S0" / "s0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors has sha256" in line_of(compress(small))
    assert not (small.folder / "variants").exists()


def test_a_missing_parent_and_an_unknown_recipe(small):
    with pytest.raises(UserError, match=r"configs/recipes: 'wanda5'; no such file; known by name: .*wanda50"):
        pending_variants(small.model_copy(update={"recipes": ["wanda5"]}))
    shutil.rmtree(small.folder / "students" / "S1")
    with pytest.raises(UserError, match=r"students/S1/s0: no manifest.json; make it first"):
        pending_variants(small)


def test_an_error_in_a_worker_is_one_line(small, tmp_path):
    recipe = recipe_file(tmp_path, "deep", {"pass": "drop_layers", "share": 0.5})
    message = line_of(compress(small, "--recipes", f"[{recipe}]"))
    assert "drop_layers.share: 0.5 is 1 of 2 layers" in message
    assert not (small.folder / "variants").exists()


def test_weights_that_are_not_finite(small):
    folder = small.folder / "students" / "S1" / "s0"
    model, tokenizer = load_checkpoint(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    add_student(small, "S1", 0, model, tokenizer)
    failures = build_variants(small, pending_variants(small)[:1], lambda share: None)
    assert "not finite" in failures["wanda50"]


def test_a_folder_that_answers_differently_is_not_published(small):
    """One weight of the saved model is changed behind the back of the check."""
    variant = pending_variants(small)[0]
    build_variants(small, [variant], lambda share: None)
    built = build_folder(small, variant)
    assert verify_reload(built, "torch")["kl"] < 1e-9
    path = Path(built / "model" / "model.safetensors")
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.05
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="reloaded, log-probabilities differ"):
        publish_variant(small, variant, lambda share: None)
    assert not (small.folder / "variants").exists()


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """Killed when the first student is built, and again when its variants are verified."""
    chain = ({"pass": "drop_layers"}, {"pass": "recover", "train": {**TRAIN, "checkpoint_every": 2}})
    recipes = [recipe_file(tmp_path, "chain", *chain), recipe_file(tmp_path, "w50", {"pass": "wanda"})]
    study = build_student_run(tmp_path, recipes)
    for sign in ("build variants: S1/s0", "verify variants: S1/s0"):
        command = [sys.executable, "-m", "compress.run", "--study", str(study.folder)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        with process:
            while sign not in process.stderr.readline():
                assert process.poll() is None
            process.kill()
    assert compress(study).returncode == 0
    interrupted = {folder: m.hash for folder, m in manifests(study).items()}
    shutil.rmtree(study.folder / "variants")
    assert compress(study).returncode == 0
    assert {folder: m.hash for folder, m in manifests(study).items()} == interrupted


def test_free_memory_decides_how_many_build_side_by_side(tmp_path, monkeypatch, capsys):
    """A student of 16 bits is held in float32."""
    study = load_study(tiny_study(tmp_path, workers=4))
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    student = TrainedStudent("S1", 0, tmp_path / "model", "", "", (32, 32))
    stored = (tmp_path / "model" / "model.safetensors").stat().st_size
    for room, workers in ((9.0, 4), (2.5, 2), (0.3, 1)):
        free = int(room * (LIBRARIES + HELD * 2 * stored))
        monkeypatch.setattr("compress.pipeline.free_bytes", lambda free=free: free)
        assert affordable_workers(study, [student]) == workers
        said = capsys.readouterr().out
        assert said == (
            ""
            if workers == 4
            else f"build variants: {workers} at a time, not 4: more would not fit into memory\n"
        )
