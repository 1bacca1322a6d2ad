"""`train.py --until teachers`: targets ahead of training, by any number of processes; and teachers that run beside a student."""

import json
import shutil
from itertools import pairwise

import pytest
import torch
import yaml

from distill.data.rows import training_rows
from distill.pipeline import base_jobs, make_student, prepare_inputs, teacher_jobs
from distill.teachers import run as teachers
from distill.teachers.local import LocalTeacher, load_teacher_model
from distill.teachers.run import find_teacher_hash, run_teacher, teacher_group
from distill.teachers.target_source import (
    check_target_source,
    make_teacher,
    open_target_source,
    target_source_inputs,
)
from distill.trainer.loop import accelerator
from distill.trainer.optimizers import build_optimizers
from distill.trainer.rollout import OnPolicy
from eval.core.artifacts import read_manifest
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.sections import Targets
from eval.core.study import load_study
from eval.cost.worker import serve_request
from eval.engines import load_engine, load_tokenizer
from tests.distill.test_generate import GENERATION, lively
from tests.distill.test_generate import rows as some_rows
from tests.helpers import ROOT, run, tiny_study

FOLDERS = ["T1/s0", "T0/s0", "T0/s1"]
SAMPLED = ["--targets.form", "sampled"]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A study whose targets are kept by this process, on one thread, and its YAML file."""
    path, threads = tiny_study(tmp_path_factory.mktemp("cached"), ce_arm=False), torch.get_num_threads()
    study = load_study(path, SAMPLED)
    torch.set_num_threads(1)
    study = prepare_inputs(study, accelerator())
    run_in_turn("cache", [*base_jobs(study), *teacher_jobs(study)], quiet=True)
    torch.set_num_threads(threads)
    assert not (study.folder / "students").exists()
    assert not any((study.folder / "scratch").iterdir())
    return study, path


def quiet(share, tokens=0):
    return None


def shard_bytes(study):
    return {
        name: (study.folder / "targets" / name / "shard-00000.safetensors").read_bytes() for name in FOLDERS
    }


def test_a_student_and_a_second_one_cost_no_teacher_pass(cached, monkeypatch):
    study, _ = cached
    before = shard_bytes(study), [(study.folder / "targets" / n).stat().st_mtime_ns for n in FOLDERS]
    monkeypatch.setattr(LocalTeacher, "__call__", None)
    monkeypatch.setattr(LocalTeacher, "log_probs", None)
    curves = []
    for rate in (0.01, 0.02):
        optimizer = study.train.optimizer.model_copy(update={"lr": rate})
        other = study.model_copy(update={"train": study.train.model_copy(update={"optimizer": optimizer})})
        make_student(other, "S1", 0, quiet)
        curves.append(read_manifest(study.folder / "students/S1/s0").facts["loss_curve"])
    assert curves[0] != curves[1]
    assert before == (
        shard_bytes(study),
        [(study.folder / "targets" / n).stat().st_mtime_ns for n in FOLDERS],
    )


SCRIPT = """
import json, runpy, sys
root, place, *words = sys.argv[1:]
sys.path[0] = root
from distill.trainer.loop import accelerator
from tests.distill.test_generate import GENERATION, lively, rows
from distill.trainer.rollout import OnPolicy

acc = accelerator()
on_policy = OnPolicy(1.0, GENERATION, 14, 0, 0, samples=2)(acc, lively(), 3, rows())
with open(f"{place}/{acc.process_index}.json", "w") as out:
    json.dump([acc.num_processes, [[row.id, row.tokens, row.given] for row in on_policy]], out)
sys.argv = ["train.py", *words, "--until", "teachers"]
runpy.run_path(f"{root}/distill/train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_write_and_keep_what_one_does(cached, tmp_path):
    """The rows of an on-policy step, then the command, in two processes of one launch."""
    study, path = cached
    shutil.copytree(study.folder, tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tiny" / "targets")
    script = tmp_path / "both.py"
    script.write_text(SCRIPT)
    words = [str(ROOT), tmp_path, "--config", path, *SAMPLED, "--runs", tmp_path]
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *words)
    assert done.returncode == 0, done.stderr
    lines = [json.loads((tmp_path / f"{process}.json").read_text()) for process in (0, 1)]
    assert [count for count, _ in lines] == [2, 2]
    alone = OnPolicy(1.0, GENERATION, 14, 0, 0, samples=2)(accelerator(), lively(), 3, some_rows())
    assert lines[0][1] == lines[1][1] == [[row.id, row.tokens, row.given] for row in alone]
    assert "teachers: 2 processes on cpu" in done.stderr
    two = load_study(path, [*SAMPLED, "--runs", str(tmp_path)])
    assert shard_bytes(two) == shard_bytes(study)
    printed = [line for line in done.stdout.splitlines() if " of seeds " in line]
    assert printed[0].startswith("T1 of seeds 0, 1: sampled, ")
    for name, line in zip(FOLDERS, printed, strict=True):
        manifests = [read_manifest(s.folder / "targets" / name) for s in (study, two)]
        assert manifests[0].hash == manifests[1].hash
        facts = manifests[1].facts
        assert {"teacher", "method", "tokenizer", "data", "temperature", "bytes_per_token"} <= set(facts)
        assert f"{facts['bytes_per_token']} bytes per token" in line
        assert line.endswith(str(two.folder / "targets" / name))
        assert facts["bytes_per_token"] < 80


def online(study, **changes):
    return study.model_copy(update={"targets": Targets(source="online", **changes)})


def test_a_teacher_that_runs_has_no_gradient_no_optimizer_and_keeps_its_weights(cached, monkeypatch):
    study, loaded, trained = online(cached[0]), [], []

    def loading(*args, **how):
        loaded.append(load_teacher_model(*args, **how))
        return loaded[-1]

    def watching(model, *rest):
        trained.extend(build_optimizers(model, *rest))
        return trained

    monkeypatch.setattr(teachers, "load_teacher_model", loading)
    monkeypatch.setattr("distill.trainer.loop.build_optimizers", watching)
    make_student(study, "S1", 0, quiet)
    assert len(loaded) == 2, "the members of the ensemble"
    taught = {id(p) for optimizer in trained for group in optimizer.param_groups for p in group["params"]}
    assert taught
    for seed, model in zip((0, 1), loaded, strict=True):
        assert not model.training
        assert not any(p.requires_grad or p.grad is not None or id(p) in taught for p in model.parameters())
        saved = load_teacher_model(
            study.folder / "base" / f"s{seed}", study.targets, torch.device("cpu")
        ).state_dict()
        assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_a_teacher_runs_in_bfloat16_where_it_shall(cached):
    study = online(cached[0], dtype="bfloat16")
    rows = training_rows(study, load_tokenizer(study.folder / "base" / "s0"))
    answers = []
    for some in (study, online(cached[0])):
        bases, seeds = teacher_group(some, "T1", 0)
        with run_teacher(some, "T1", seeds, bases) as live:
            answers.append(live.log_probs(collate(rows[:2], 0)))
            if some is study:
                assert {p.dtype for m in (live.model, *live.method.parts) for p in m.parameters()} == {
                    torch.bfloat16
                }
    narrow, wide = answers
    assert narrow.dtype == torch.float32
    assert 0 < float((narrow - wide).abs().max()) < 0.3
    assert find_teacher_hash(study, "S1", 0) != find_teacher_hash(online(cached[0]), "S1", 0)


def test_a_quantized_teacher_needs_cuda(cached, tmp_path):
    for name in ("int8", "nf4"):
        with pytest.raises(UserError, match=rf"targets\.quantization: {name} needs CUDA, the device is cpu"):
            load_teacher_model(
                cached[0].folder / "base" / "s0", Targets(quantization=name), torch.device("cpu")
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_quantized_teacher_says_about_the_same(cached, name):
    study = online(cached[0], quantization=name)
    rows = training_rows(study, load_tokenizer(study.folder / "base" / "s0"))
    answers = []
    for some in (study, online(cached[0])):
        bases, seeds = teacher_group(some, "T1", 0)
        with run_teacher(some, "T1", seeds, bases) as live:
            answers.append(live.log_probs(collate(rows[:2], 0)))
    assert 0 < float((answers[0] - answers[1]).abs().mean()) < 0.2


def test_what_a_teacher_writes_is_learned(cached):
    """Sequence level: rows of the teacher's own, for the control student too."""
    generation = {"prompt_tokens": 6, "new_tokens": 10}
    study = cached[0].model_copy(update={"targets": Targets(source="sequence", generation=generation)})
    tokenizer = load_tokenizer(study.folder / "base" / "s0")
    learned = {}
    for side, arm in (("T1", "S1"), ("T0", "S0")):
        bases, seeds = teacher_group(study, side, 0)
        make_teacher(study, side, seeds, bases, quiet)
        with open_target_source(study, arm, 0, tokenizer) as source:
            assert source.teacher is None
            learned[side] = source.rows
    rows = training_rows(study, tokenizer)
    for side in ("T1", "T0"):
        for row, new in zip(rows, learned[side], strict=True):
            assert new.tokens[:6] == row.tokens[:6]
            assert 0 < new.predicted == len(new.tokens) - len(row.tokens[:6]) <= 10
    assert learned["T1"] != learned["T0"]
    manifest = read_manifest(study.folder / "targets" / "T1/s0")
    assert manifest.facts["tokens"] == sum(row.predicted for row in learned["T1"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"targets": {"source": "on_policy"}}, r"train\.loss\.weight: 0\.9, but with on_policy"),
        (
            {"targets": {"source": "sequence"}, "data.packing": True},
            r"data\.packing: true, but targets\.source",
        ),
        ({"targets": {"form": "sampled"}, "train.loss": {"divergence": "jsd"}}, "jsd with sampled targets"),
        ({"targets": {"form": "top_k"}, "train.loss": {"temperature": 2.0}}, "2.0 with top-k targets"),
        ({"train.loss": {"hidden": {"pairs": [[1, 1]]}}}, "cached targets contain no hidden states"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_is_built(tmp_path, words, message):
    overrides = [
        part
        for name, value in words.items()
        for part in (f"--{name}", yaml.safe_dump(value, default_flow_style=True))
    ]
    with pytest.raises(UserError, match=message):
        check_target_source(load_study(tiny_study(tmp_path), overrides))


def test_only_what_matters_decides_a_target_source(cached):
    def key(arm="S1", **targets):
        changed = cached[0].model_copy(update={"targets": Targets(**targets)})
        return target_source_inputs(changed, arm, 0)[0]

    assert key(form="sampled") != key(form="sampled", draws=20) != key(form="dense")
    assert key(form="dense") == key(form="dense", draws=20, share=0.1)
    assert key(source="online") == key(source="online", form="sampled", generation={"new_tokens": 3})
    assert key(source="on_policy") != key(source="on_policy", generation={"new_tokens": 3})
    assert key("CE", source="online") == key("CE", source="on_policy") is None


def test_a_teacher_with_its_method_is_an_engine_whose_cost_can_be_measured(cached, monkeypatch):
    """What `eval.cost` finds in the manifest: it says what the teacher says, and its texts can be timed."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # as `load` sets it: put back afterwards
    study, _ = cached
    folder, threads = study.folder / "method/T1/s0", torch.get_num_threads()
    facts = read_manifest(folder).facts
    assert facts["room"] == study.base.architecture["max_position_embeddings"]
    engine = load_engine(facts["engine"], folder, 1, "cpu")
    batch = collate(list(training_rows(study, load_tokenizer(study.folder / "base/s0"))[:2]), 0)
    with run_teacher(study, "T1", [0], teacher_group(study, "T1", 0)[0]) as teacher:
        torch.testing.assert_close(engine.logits(batch), teacher.log_probs(batch))
    ids = batch.input_ids[:1, :8]
    following, state = engine.prefill(ids[:, :6])
    for place in (6, 7):
        torch.testing.assert_close(following, engine.logits(batch)[:1, place - 1])
        following, state = engine.decode(ids[:, place], state)
    stamps = serve_request(engine, ids, 6, lambda: None)
    assert len(stamps) == 7, "the start, and each of the six tokens"
    assert all(later > earlier for earlier, later in pairwise(stamps))
    torch.set_num_threads(threads)
