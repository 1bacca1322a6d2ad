"""OpenVINO IR of a transformers model: exported, loaded, its weights read as the runtime restores them."""

from __future__ import annotations

import gc
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import rich
import torch
from torch import Tensor

from compress.calibration import check_batch, check_export
from compress.recipe import Context
from eval.core.errors import UserError
from eval.engines import silenced
from eval.engines.torch import classifies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOW_BIT = ("i8", "u8", "i4", "u4")  # element types of compressed weights


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


def load(folder: Path, compression: Any = None, inputs: list[dict[str, Any]] | None = None) -> Any:
    """The IR in `folder` as a model of optimum-intel, with its weights compressed if `compression` says so.

    Args:
        compression: an OVWeightQuantizationConfig.
        inputs: what calibrates it, by the names of the model's inputs.
    """
    from optimum.intel import OVConfig, OVModelForCausalLM, OVModelForSequenceClassification, OVQuantizer
    from transformers import AutoConfig

    is_classifier = classifies(AutoConfig.from_pretrained(folder, local_files_only=True))
    kind = OVModelForSequenceClassification if is_classifier else OVModelForCausalLM
    model = kind.from_pretrained(str(folder), compile=False, ov_config=runtime_config())
    if compression is not None:
        import nncf

        named = {name for port in model.model.inputs for name in port.get_names()}
        data = [{name: value for name, value in one.items() if name in named} for one in inputs or []]
        OVQuantizer(model).quantize(
            calibration_dataset=nncf.Dataset(data) if data else None,
            ov_config=OVConfig(quantization_config=compression),
        )
    return model


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
        model.save_pretrained(source)
        try:
            main_export(
                str(source),
                output=exported_ir,
                task="text-classification" if classifies(model.config) else "text-generation-with-past",
                library_name="transformers",
                ov_config=OVConfig(dtype="auto"),
            )
        except ValueError as error:
            message = " ".join(str(error).split())[:200]
            fix = "leave the pass out of the recipe for this architecture"
            raise UserError(f"openvino export of {type(model).__name__}", message, fix) from error
        exported = load(exported_ir)
        check_export("openvino export", model, exported, check_batch(context.rows, context.pad))
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
        if kind in LOW_BIT and not name.endswith("/zero_point"):
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
