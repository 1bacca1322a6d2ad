"""A GGUF file for CPU targets, run by llama.cpp, and by whatever else reads GGUF.

`q8_0` and `q4_0` are levels around zero, one float16 scale for 32 inputs; `q4_k_m` is llama.cpp's mixture of
4 and 6 bits with scales in 6 bits, for rows of 256 inputs. Of 4 bits llama.cpp gives the head, and with it
tied embeddings, more (Q6_K, or Q8_0 where rows are no multiple of 256).
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from shutil import copyfile
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from compress.calibration import check_batch, check_export
from compress.engine_files import EngineFiles
from compress.gguf_file import MODEL, check_build, quantize, refusal, tensors, values, write
from compress.model_size import check_groups, size_of, skipped_modules
from compress.recipe import Context, Grid, Pass, PassReport, Size, Stage
from compress.tensors.quant_error import (
    INT4_STEP,
    INT4_SUBNORMAL,
    INT8_ROUNDED,
    INT8_SUBNORMAL,
    check_rounding,
    check_scaled,
)
from eval.core.artifacts import installed_versions
from eval.core.config import Frozen
from eval.core.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

GROUP, SUPER_GROUP = 32, 256  # inputs of a row that share a scale
BOUNDS = {"Q8_0": (INT8_ROUNDED, INT8_SUBNORMAL), "Q4_0": (INT4_STEP, INT4_SUBNORMAL)}
BEYOND_8_BITS = ("F32", "F16", "BF16")
TEXTS = 100  # training rows on which a tokenizer of llama.cpp must give the same ids


class LlamaCpp(Pass):
    stage = Stage.EXPORT
    engine = "llama_cpp"
    last = True
    needs = ("llama_cpp", "gguf")

    class Options(Frozen):
        weights: Literal["f32", "q8_0", "q4_0", "q4_k_m"] = Field(description="type of the GGUF file")

    @cached_property
    def code(self) -> dict[str, str]:
        return {**super().code, **installed_versions(["llama-cpp-python"])}

    def grid_problem(self, grid: Grid) -> str | None:
        own = {"q4_0": Grid(4, GROUP)}.get(self.options.weights)
        if self.options.weights == "f32" or (own is not None and own.holds(grid)):
            return None
        return f"llama_cpp rounds to levels of {own or self.options.weights}"

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        check_build()
        if problem := refusal(model.config):
            raise UserError("pass llama_cpp", problem, "leave the pass out of the recipe for this model")
        if self.options.weights == "q4_k_m":
            check_groups(model, SUPER_GROUP, "llama_cpp.weights: q4_k_m", "take q4_0")
        elif self.options.weights != "f32":
            check_groups(model, GROUP, f"llama_cpp.weights: {self.options.weights}", "take f32")
        return model

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[EngineFiles, PassReport]:
        before, weights = size_of(model, context.dtype), self.options.weights
        result = EngineFiles(self.engine, context.scratch, model)
        plain = context.scratch / "gguf-f32" / MODEL
        tokenizer = self._plain(model, context, plain)
        if weights == "f32":
            copyfile(plain, result.folder / MODEL)
        else:
            quantize(plain, result.folder / MODEL, weights)
        facts, after = _compare(plain, result.folder / MODEL, before)
        matrices = sum(w.numel() for w in model.parameters() if w.ndim > 1)
        report = PassReport(
            name=self.name,
            before=before,
            after=after,
            named=0 if weights == "f32" else matrices,
            reached=after.low_bit,
            skipped=skipped_modules(model, set(), "the recipe asks for float32") if weights == "f32" else [],
            facts={"weights": weights, "tokenizer": tokenizer, **facts},
        )
        return result, report

    def _plain(self, model: PreTrainedModel, context: Context, path: Path) -> str:
        """Writes the float32 file once for a model, which must answer as it does; the tokenizer in it."""
        note = path.with_name("tokenizer.txt")
        if not path.parent.is_dir():
            rows = [row.tokens[1:] for row in context.rows[:TEXTS]]
            exported = EngineFiles(self.engine, context.scratch, model)
            tokenizer = write(
                model, context.tokenizer, context.tokenizer.batch_decode(rows), exported.folder / MODEL
            )
            check_export("GGUF file", model, exported, check_batch(context.rows, context.pad))
            (exported.folder / note.name).write_text(tokenizer, encoding="utf-8")
            exported.folder.rename(path.parent)
        return note.read_text(encoding="utf-8")


def _compare(plain: Path, quantized: Path, before: Size) -> tuple[dict[str, object], Size]:
    """Formats of a quantized file and how far it is from the float32 one, and its size.

    Raises:
        UserError: a matrix is not what its format allows.
    """
    originals, worst, moved, zeroed, low_bit, size = tensors(plain), 0.0, 0.0, 0, 0, 0
    formats = Counter[str]()
    for name, tensor in tensors(quantized).items():
        kind, old = tensor.tensor_type.name, torch.from_numpy(originals[name].data.copy())
        size += int(tensor.n_bytes)
        if old.ndim < 2 or kind == "F32":
            continue
        new = torch.from_numpy(values(tensor))
        formats[kind] += 1
        low_bit += old.numel() if kind not in BEYOND_8_BITS else 0
        zeroed += int(torch.count_nonzero(old)) - int(torch.count_nonzero(new))
        if kind in BOUNDS:
            bound, least = BOUNDS[kind]
            worst = max(worst, check_rounding(name, old, new, GROUP, bound, least))
        else:
            moved = max(moved, check_scaled(name, old, new)[0])
    facts = {"formats": dict(sorted(formats.items())), "worst_rounding": worst, "worst_moved": moved}
    after = Size(parameters=before.parameters, nonzeros=before.nonzeros - zeroed, bytes=size, low_bit=low_bit)
    return facts, after
