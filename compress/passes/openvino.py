"""OpenVINO IR for CPU targets: float32, int8 per row, or int4 in groups, through optimum-intel and nncf.

The float32 export is made once per model and shared by every recipe that starts from it.
"""

from __future__ import annotations

import gc
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import rich
import torch
from pydantic import Field
from torch import Tensor

from compress.calibration import allowed_difference, check_batch, log_probs, rounding_error
from compress.model_size import check_groups, size_of
from compress.recipe import Context, Pass, PassReport, Size, Skipped, Stage
from compress.tensors.quant_error import INT4_STEP, INT4_SUBNORMAL, INT8_STEP, INT8_SUBNORMAL, check_rounding
from eval.core.config import Frozen
from eval.core.errors import UserError
from eval.engines import silenced

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INT8, INT4 = (INT8_STEP, INT8_SUBNORMAL), (INT4_STEP, INT4_SUBNORMAL)
BOUNDS = {"i8": INT8, "u8": INT8, "i4": INT4, "u4": INT4}  # element type -> largest error, of tiny weights


class OpenVINO(Pass):
    stage = Stage.EXPORT
    engine = "openvino"
    last = True
    needs = ("optimum.intel", "openvino", "nncf")

    class Options(Frozen):
        weights: Literal["fp32", "int8", "int4"]
        group_size: int = Field(32, gt=0)  # of int4: inputs of a row that share one scale

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.options.weights == "int4":
            fix = "give a group size that divides all of them"
            check_groups(model, self.options.group_size, "openvino.group_size", fix)
        return model

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[Any, PassReport]:
        before = size_of(model, context.dtype)
        ir_folder = context.scratch / "openvino-fp32"
        with conversion():
            if not ir_folder.is_dir():
                export(model, context, ir_folder)
            model.to("meta")  # its memory is free: what follows is made from the export
            plain = load(ir_folder, None).model
            result = load(ir_folder, self._compression())
        originals = plain_matrices(plain)
        worst, zeroed, low_bit, formats = 0.0, 0, 0, dict[str, str]()
        for name, kind, axis, new in compressed_matrices(result.model):
            old = torch.tensor(originals[name].data).reshape(new.shape)
            error = check_rounding(name, old.movedim(axis, -1), new.movedim(axis, -1), None, *BOUNDS[kind])
            worst = max(worst, error)
            zeroed += int(torch.count_nonzero(old)) - int(torch.count_nonzero(new))
            low_bit += new.numel()
            formats[module_name(name)] = kind
        number_names(result.model)
        report = PassReport(
            name=self.name,
            before=before,
            after=Size(
                parameters=before.parameters,
                nonzeros=before.nonzeros - zeroed,
                bytes=constant_bytes(result.model),
                low_bit=low_bit,
            ),
            named=0 if self.options.weights == "fp32" else sum(prod(m.shape) for m in originals.values()),
            reached=low_bit,
            skipped=self._skipped({name for name in originals if module_name(name) not in formats}),
            facts={"formats": formats, "worst_rounding": worst},
        )
        return result, report

    def _compression(self) -> Any:
        """The settings for nncf, or None. `tokenizer` is unused, but its default, a path, would be saved."""
        from optimum.intel import OVWeightQuantizationConfig

        if self.options.weights == "fp32":
            return None
        if self.options.weights == "int8":
            return OVWeightQuantizationConfig(bits=8, sym=True, tokenizer=".")
        return OVWeightQuantizationConfig(
            bits=4, sym=True, group_size=self.options.group_size, ratio=1.0, tokenizer="."
        )

    def _skipped(self, names: set[str]) -> list[Skipped]:
        reason = (
            "the recipe asks for float32" if self.options.weights == "fp32" else "left in float32 by nncf"
        )
        return [Skipped(module=module_name(name), reason=reason) for name in sorted(names)]


@contextmanager
def conversion() -> Iterator[None]:
    """Imports the libraries and silences them while a model is converted."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # no reports are sent
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore", category=DeprecationWarning)
        import nncf  # noqa: F401  # it sets its log level when it is imported
        import optimum.intel  # noqa: F401

        warnings.simplefilter("ignore", category=torch.jit.TracerWarning)
        stack.enter_context(silenced("nncf", "optimum", "transformers"))
        console = rich.get_console()  # nncf's bars
        stack.callback(setattr, console, "quiet", console.quiet)
        console.quiet = True
        gc.freeze()  # the export collects garbage four times: without the objects of the libraries
        stack.callback(gc.unfreeze)
        yield


def runtime_config() -> dict[str, Any]:
    """As the engine runs an IR: with float32 arithmetic, here on one thread."""
    from eval.engines.openvino import EXACT

    return {**EXACT, "INFERENCE_NUM_THREADS": 1}


def load(folder: Path, compression: Any) -> Any:
    """The IR in `folder` as an OVModelForCausalLM, with its weights compressed if `compression` says so."""
    from optimum.intel import OVModelForCausalLM

    return OVModelForCausalLM.from_pretrained(
        str(folder), compile=False, ov_config=runtime_config(), quantization_config=compression
    )


def export(model: PreTrainedModel, context: Context, ir_folder: Path) -> None:
    """Writes the float32 IR of `model` to `ir_folder`, completely or not at all.

    Raises:
        UserError: OpenVINO cannot export this model, or the IR answers differently from torch.
    """
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    ir_folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=ir_folder.parent) as folder:
        source, exported_ir, numbered_ir = (Path(folder) / name for name in ("torch", "aside", "whole"))
        batch = check_batch(context.rows, context.pad)
        answers, allowed = log_probs(model, batch), allowed_difference(rounding_error(model, batch))
        model.save_pretrained(source)
        try:
            main_export(
                str(source),
                output=exported_ir,
                task="text-generation-with-past",
                library_name="transformers",
                ov_config=OVConfig(dtype="auto"),
            )
        except ValueError as error:
            message = " ".join(str(error).split())[:200]
            fix = "leave the pass out of the recipe for this architecture"
            raise UserError(f"openvino export of {type(model).__name__}", message, fix) from error
        exported = load(exported_ir, None)
        difference = (log_probs(exported, batch) - answers)[batch.attention_mask.bool()].abs().max()
        if not float(difference) <= allowed:
            raise UserError(
                f"openvino export of {type(model).__name__}",
                f"log-probabilities differ from torch by up to {float(difference):.3g} nats, where float32 "
                f"on this model explains {allowed:.3g}",
                "it is another model: leave the pass out of the recipe for this architecture",
            )
        number_names(exported.model)
        exported.save_pretrained(numbered_ir)
        numbered_ir.rename(ir_folder)


def number_names(model: Any) -> None:
    """Numbers generated node names by place: by default a counter of the process, so that bytes differ."""
    model.set_friendly_name("model")
    for i, node in enumerate(model.get_ordered_ops()):
        if re.fullmatch(rf"{node.get_type_name()}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{node.get_type_name()}.{i}")


def module_name(name: str) -> str:
    """The torch module of a constant: `self.lm_head.weight` is that of `lm_head`."""
    return name.removeprefix("self.").removesuffix(".weight")


def constants(model: Any) -> Iterator[Any]:
    return (node for node in model.get_ordered_ops() if node.get_type_name() == "Constant")


def constant_bytes(model: Any) -> int:
    return sum(node.get_byte_size() for node in constants(model))


def plain_matrices(model: Any) -> dict[str, Any]:
    """The float32 matrices of an IR, by name: they stay in its file until they are read."""
    return {
        node.get_friendly_name(): node
        for node in constants(model)
        if node.get_element_type().get_type_name() == "f32" and sum(n > 1 for n in node.shape) > 1
    }


def compressed_matrices(model: Any) -> Iterator[tuple[str, str, int, Tensor]]:
    """The compressed matrices of an IR, in the shape in which they are stored, one after the other.

    Returns:
        name, element type, axis along which one scale is shared, values as the runtime restores them.
    """
    import openvino

    for node in list(constants(model)):
        name, kind = node.get_friendly_name(), node.get_element_type().get_type_name()
        if kind in BOUNDS and not name.endswith("/zero_point"):
            scaled = scaling_node(node)
            scales = list(scaled.input_value(1).get_shape())
            shared = [a for a, size in enumerate(node.shape) if size != scales[a]]
            assert len(shared) == 1, f"{name}: {list(node.shape)} scaled by {scales}"
            alone = openvino.Model([scaled.output(0)], [])
            values = openvino.compile_model(alone, "CPU", runtime_config())([])
            yield name, kind, shared[0], torch.tensor(values[0])


def scaling_node(node: Any) -> Any:
    """The node that scales a compressed constant: after Convert, and Subtract where asymmetric."""
    while node.get_type_name() != "Multiply":
        node = next(iter(node.output(0).get_target_inputs())).get_node()
    return node
