"""Evidence from a GPU, held against the CPU's: answers, tasks, agreement, cost. Not run by us yet."""

import json

import pytest
import torch

from eval.core.documents import Row, collate
from eval.core.records import read_agreements, read_costs, read_task_scores
from eval.core.sections import Task
from eval.core.study import load_study
from eval.engines import load_engine
from eval.score.task_scores import score_tasks
from eval.score.tasks import run_task
from tests.eval.run_builder import CONTEXT, facts, fake_run, put, torch_model
from tests.eval.test_tasks import ANSWERS, CHOICES, write
from tests.helpers import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def engines(checkpoint):
    return [load_engine("torch", checkpoint, device=device) for device in ("cpu", "cuda")]


def test_forward_prefill_and_decode_say_what_a_cpu_says(engines):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 280, (n,), generator=generator).tolist() for n in (20, 13, 5)]
    batch = collate([Row(f"d{i}", "code", 0, t) for i, t in enumerate(tokens)], pad=0)
    real = batch.attention_mask.bool()
    full = [engine.logits(batch).cpu()[real] for engine in engines]
    torch.testing.assert_close(*full, atol=1e-4, rtol=1e-3)
    steps = []
    for engine in engines:
        logits, state = engine.prefill(batch.input_ids[:1, :9])
        answers = [logits.cpu()]
        for position in range(9, 20):
            logits, state = engine.decode(batch.input_ids[:1, position], state)
            answers.append(logits.cpu())
        steps.append(torch.cat(answers))
    torch.testing.assert_close(*steps, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["multiple_choice", "exact_match", "f1"])
def test_tasks_are_scored_as_on_a_cpu(engines, tmp_path, kind):
    samples = CHOICES if kind == "multiple_choice" else ANSWERS
    task = Task(kind=kind, path=write(tmp_path / "t.jsonl", samples), new_tokens=4)
    cpu, gpu = (run_task(task, engine, CONTEXT, engine.scoring_tokens) for engine in engines)
    assert (gpu.id, gpu.value, gpu.raw) == (cpu.id, cpu.value, cpu.raw)


def test_a_task_record_names_the_gpu(tmp_path):
    path, folder = fake_run(tmp_path)
    task = {"kind": "multiple_choice", "path": write(tmp_path / "t.jsonl", CHOICES)}
    study = load_study(path, ["--data.tasks", json.dumps({"choices": task})])
    score_tasks(folder, study, folder / "students/S1/s0", ["choices"], device="cuda:0")
    (record,) = read_task_scores(folder)
    assert record.provenance.machine.device == torch.cuda.get_device_name(0)


def test_agreement_is_measured_on_the_gpu(tmp_path):
    study, folder = fake_run(tmp_path)
    put(folder, "students/S1/s0", torch_model(seed=7), **facts("S1"))
    put(folder, "variants/int8/S1/s0", torch_model(seed=7), **facts("S1", "int8"))
    done = run("-m", "eval.score.agreement", "--study", study, "--device", "cuda")
    assert done.returncode == 0, done.stderr
    (record,) = read_agreements(folder)
    assert sum(record.kl_bits) / sum(record.tokens) < 1e-5, "the same weights"
    assert record.provenance.machine.device == torch.cuda.get_device_name(0)


def test_cost_is_measured_on_the_target_gpu(tmp_path):
    study, folder = fake_run(tmp_path)
    done = run("-m", "eval.cost", "--study", study, "--target", "gpu", timeout=600)
    assert done.returncode == 0, done.stderr
    records = read_costs(folder)
    assert records
    for record in records:
        assert record.target == "gpu"
        assert record.provenance.machine.device == torch.cuda.get_device_name(0)
        assert all(process.peak_memory_bytes > 0 for process in record.processes)
