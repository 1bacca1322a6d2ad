"""Scoring against a bare forward loop: tokens per CPU second of both, over the same tokens, on one thread.

`python -m scripts.bench_eval scoring` prints these rows. Ours is all that scoring does with a loaded model:
reading, batching (rows made for one model are kept for the next), the forward pass, the likelihood, correct
tokens and calibration. The bare loop calls the model on tensors that lie ready, in batches of several sizes;
the fastest size counts. Both take turns in rounds, and CPU time is counted, so that neighbours on the machine
are on neither's clock. `ratio` is the median over rounds, `low` and `high` the extremes.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.data.sources import read_source
from distill.models.load import train_tokenizer
from eval.core.documents import VALIDATION, Batch, batches, read_documents, windows
from eval.core.errors import entry
from eval.core.sections import Source
from eval.engines import load_engine
from eval.engines.torch import TorchEngine
from eval.score.scoring import score_documents

CONTEXT, DOCUMENTS, BYTES, VOCABULARY = 256, 16, 3072, 1024  # as the default study scores
SHAPES = {"1M": (128, 320, 4), "2M": (192, 512, 4)}  # weights: hidden, intermediate, layers
SIZES = (256, 512, 1024, 4096)  # padded tokens per batch of the bare loop
ROUNDS = 15


def write_data(folder: Path) -> list[str]:
    """Validation documents of the standard library, as a data artifact has them; returns their texts."""
    source = Source(kind="folder", path="stdlib", include=["*.py"], documents=DOCUMENTS)
    documents = [(d.id, d.text[:BYTES]) for d in read_source(source)]
    rows = [{"id": name, "domain": "code", "text": text} for name, text in documents]
    folder.mkdir()
    (folder / f"{VALIDATION}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [text for _, text in documents]


def write_model(folder: Path, shape: tuple[int, int, int], texts: list[str]) -> None:
    torch.manual_seed(0)
    hidden, intermediate, layers = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    train_tokenizer(texts, VOCABULARY).save_pretrained(folder)


def export(folder: Path, to: Path) -> None:
    """The model in OpenVINO's format, int8 weights: what makes the bare loop fastest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer about transformers' branches
        from optimum.intel import OVModelForCausalLM

        OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, load_in_8bit=True
        ).save_pretrained(to)
    for path in folder.glob("tokenizer*"):
        (to / path.name).write_bytes(path.read_bytes())


@torch.inference_mode()
def run_bare(engine: Any, prepared: list[Batch]) -> None:
    """Forward passes and nothing else; a torch model is not even given a mask."""
    for batch in prepared:
        if isinstance(engine, TorchEngine):
            engine.model(input_ids=batch.input_ids, use_cache=False)
            continue
        rows, length = batch.input_ids.shape
        feeds = {
            "input_ids": batch.input_ids.numpy(),
            "attention_mask": batch.attention_mask.numpy(),
            "position_ids": np.tile(np.arange(length), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        engine.request.reset_state()
        engine.request.infer(
            {name: feeds[name] for name in engine.inputs}, share_inputs=True, share_outputs=True
        )


def in_rounds(runs: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
    """CPU seconds of every run in every round, the first round left out."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: values[1:] for name, values in seconds.items()}


def row(name: str, model: str, data: Path, folder: Path) -> dict[str, Any]:
    engine = load_engine(name, folder)
    documents = read_documents(data, VALIDATION)
    rows = [row for document in documents for row in windows(engine.tokenizer, document, CONTEXT)]
    tokens, size = sum(len(row.tokens) for row in rows), engine.scoring_tokens
    runs: dict[Any, Callable[[], Any]] = {
        size: partial(run_bare, engine, list(batches(rows, 0, size))) for size in SIZES
    }
    runs["ours"] = partial(
        score_documents, engine.borrowed, data, engine.tokenizer, CONTEXT, batch_tokens=size
    )
    seconds = in_rounds(runs)
    ours = seconds.pop("ours")
    best = min(seconds, key=lambda size: statistics.median(seconds[size]))
    ratios = sorted(loop / mine for loop, mine in zip(seconds[best], ours, strict=True))
    return {
        "what": f"scoring, {name}, {model} weights",
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "rounds": ROUNDS,
        "unit": "of the bare loop",
        "asked": 0.9,
        "tokens_per_cpu_s": tokens / statistics.median(ours),
        "bare_tokens_per_cpu_s": tokens / statistics.median(seconds[best]),
        "batch_tokens": size,
        "best_bare_batch_tokens": best,
    }


def scoring_rows() -> list[dict[str, Any]]:
    """One row per engine that is installed and size of model; see `row` for its fields."""
    threads = torch.get_num_threads()
    with TemporaryDirectory() as name:
        top, rows = Path(name), []
        texts = write_data(top / "data")
        for model, shape in SHAPES.items():
            write_model(top / model, shape, texts)
            rows.append(row("torch", model, top / "data", top / model))
            if find_spec("openvino") and find_spec("optimum.intel"):
                export(top / model, top / f"{model}-openvino")
                rows.append(row("openvino", model, top / "data", top / f"{model}-openvino"))
    torch.set_num_threads(threads)
    return rows


@entry
def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(scoring_rows(), indent=1))


if __name__ == "__main__":
    main()
