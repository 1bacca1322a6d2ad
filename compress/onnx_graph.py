"""ONNX graphs of a transformers model: built by onnxruntime-genai, quantized by onnxruntime, read back.

A graph is a decoder with a cache. It has one input more than the builder gives it: the position from which
logits are computed, so that reading a prompt costs the logits of its last token only. Embeddings are read
from the matrix of the head where a model ties them, in whatever format it is.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval.core.errors import UserError
from eval.engines import first_line, silenced

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL, DATA = "model.onnx", "model.onnx.data"
READ = "/model/embed_tokens/read"  # what the nodes that read embeddings are called
BITS = {"int8": 8, "int4": 4}  # formats of MatMulNBits
LAST = 2**63 - 1
INTEGERS = 4  # the `accuracy_level` at which activations are rounded to 8 bits, group by group
OPERATORS = "com.microsoft"
# Whose graphs were held against torch here; the builder takes more.
ARCHITECTURES = tuple(f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Granite"))
FIRST_LOGITS = "first_logits"


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries print and log what is no error, and leave a handler on the root logger."""
    handlers = logging.root.handlers[:]
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        with silenced("root", "onnxruntime"):
            try:
                yield
            finally:
                logging.root.handlers[:] = handlers


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scratch: Path) -> ModelProto:
    """The float32 graph of a model, with its weights.

    Raises:
        UserError: the builder refuses this model.
    """
    import onnx

    with quiet(), TemporaryDirectory(dir=scratch) as folder:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options

        place = ("", f"{folder}/torch", f"{folder}/onnx", "fp32", "cpu", f"{folder}/cache")
        model.save_pretrained(place[1])
        tokenizer.save_pretrained(place[1])
        try:
            create_model(*place, **parse_extra_options(*place, ["hf_token=false"]))
        except (ValueError, NotImplementedError) as error:
            fix = "leave the pass out of the recipe for this architecture"
            raise UserError(f"ONNX graph of {type(model).__name__}", first_line(error), fix) from error
        onnx_model = onnx.load(f"{place[2]}/{MODEL}")
    _name_state_sizes(onnx_model.graph)
    _compute_logits_from(onnx_model.graph)
    _read_columns(onnx_model.graph)
    return onnx_model


def save(onnx_model: ModelProto, folder: Path) -> None:
    import onnx

    for name in (MODEL, DATA):  # onnx appends to what lies there
        (folder / name).unlink(missing_ok=True)
    onnx.save_model(onnx_model, folder / MODEL, save_as_external_data=True, location=DATA)


def _name_state_sizes(graph: GraphProto) -> None:
    """Writes the size of a head into the shapes of the caches, where the builder leaves it open."""
    widths = {value.name: value.type.tensor_type.shape.dim[-1:] for value in graph.value_info}
    sizes = dict[str, int]()
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            heads = next(a.i for a in node.attribute if a.name == "num_heads")
            caches = (*node.input[3:5], *node.output[1:3])
            sizes |= dict.fromkeys(caches, widths[node.output[0]][0].dim_value // heads)
    for port in (*graph.input, *graph.output):
        if port.name in sizes:
            port.type.tensor_type.shape.dim[3].dim_value = sizes[port.name]


def _compute_logits_from(graph: GraphProto) -> None:
    """Adds the input that says from which position of the row logits are computed."""
    from onnx import TensorProto, helper

    head = next(node for node in graph.node if node.name == "/lm_head/MatMul")
    values = {"end": LAST, "axis": 1}
    graph.initializer.extend(
        helper.make_tensor(f"/{FIRST_LOGITS}/{name}", TensorProto.INT64, [1], [value])
        for name, value in values.items()
    )
    inputs = [head.input[0], FIRST_LOGITS, *(f"/{FIRST_LOGITS}/{name}" for name in values)]
    part = helper.make_node("Slice", inputs, [f"/{FIRST_LOGITS}/hidden"], f"/{FIRST_LOGITS}")
    graph.node.insert(list(graph.node).index(head), part)
    head.input[0] = part.output[0]
    graph.input.append(helper.make_tensor_value_info(FIRST_LOGITS, TensorProto.INT64, [1]))
    logits = next(port for port in graph.output if port.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "logits_length"
    del graph.value_info[:]  # they speak of whole rows


def _read_columns(graph: GraphProto) -> None:
    """Embeddings become the columns of a matrix [D, V], which the head has too where they are tied.

    The builder transposes the head's matrix, and the runtime would keep both.
    """
    from onnx import helper, numpy_helper

    read = next(node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    turned = next((node for node in graph.node if read.input[0] in node.output), None)
    if turned is not None:
        matrix = turned.input[0]
    else:
        matrix = read.input[0]
        stored = next(one for one in graph.initializer if one.name == matrix)
        turned_matrix = np.ascontiguousarray(numpy_helper.to_array(stored).T)
        stored.CopyFrom(numpy_helper.from_array(turned_matrix, matrix))
    columns, rows = f"{READ}/columns", read.output[0]
    nodes = [
        helper.make_node("Gather", [matrix, "input_ids"], [columns], READ, axis=1),
        helper.make_node("Transpose", [columns], [rows], f"{READ}/turn", perm=[1, 2, 0]),
    ]
    _replace(graph, [read], nodes)
    _prune(graph)


def quantize(onnx_model: ModelProto, weights: str, group: int) -> ModelProto:
    """The graph with its matrices in another format: `int8` or `int4` in groups, or `int8-dynamic` by output.

    Args:
        group: inputs that share a scale.
    """
    from onnx import helper

    read, turn = (_named(onnx_model.graph, name) for name in (READ, f"{READ}/turn"))
    matrix, embedded = read.input[0], turn.output[0]
    if not any(node.op_type == "MatMul" and matrix in node.input for node in onnx_model.graph.node):
        # Quantizers take the matrices of products: one that nothing uses, for embeddings of their own.
        onnx_model.graph.node.append(helper.make_node("MatMul", [embedded, matrix], [f"{READ}/product"]))
    with quiet():
        if weights == "int8-dynamic":
            onnx_model = _by_output(onnx_model)
        else:
            onnx_model = _in_groups(onnx_model, BITS[weights], group)
    nodes = (
        _read_by_output(matrix) if weights == "int8-dynamic" else _read_groups(matrix, BITS[weights], group)
    )
    nodes[-1].output[0] = embedded
    _replace(onnx_model.graph, [_named(onnx_model.graph, name) for name in (READ, f"{READ}/turn")], nodes)
    _prune(onnx_model.graph)
    del onnx_model.graph.value_info[:]  # they speak of what was replaced too
    return onnx_model


def _in_groups(onnx_model: ModelProto, bits: int, group: int) -> ModelProto:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx_model, bits=bits, block_size=group, is_symmetric=True, accuracy_level=INTEGERS
    )
    quantizer.process()
    return quantizer.model.model


def _read_groups(matrix: str, bits: int, group: int) -> list[NodeProto]:
    """Reads embeddings from groups [V, D / group, bytes], each with its scale [V, D / group]."""
    from onnx import helper

    how: dict[str, Any] = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 2}
    axis, shape = f"{READ}/last", f"{READ}/rows"
    inputs = [f"{matrix}_Q{bits}", "input_ids", f"{READ}/scales"]
    return [
        helper.make_node("Constant", [], [axis], value_ints=[2]),
        helper.make_node("Constant", [], [shape], value_ints=[0, 0, -1]),
        helper.make_node("Unsqueeze", [f"{matrix}_scales", axis], [f"{READ}/scales"]),
        helper.make_node("GatherBlockQuantized", inputs, [f"{READ}/groups"], READ, domain=OPERATORS, **how),
        helper.make_node("Reshape", [f"{READ}/groups", shape], [""], f"{READ}/turn"),
    ]


def _by_output(onnx_model: ModelProto) -> ModelProto:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as folder:
        quantize_dynamic(
            onnx_model,
            f"{folder}/{MODEL}",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(f"{folder}/{MODEL}")


def _read_by_output(matrix: str) -> list[NodeProto]:
    """Reads embeddings from columns of 8 bits, each with its scale."""
    from onnx import TensorProto, helper

    axis, columns, rows = (f"{READ}/{name}" for name in ("last", "columns", "rows"))
    return [
        helper.make_node("Constant", [], [axis], value_ints=[2]),
        helper.make_node("Gather", [f"{matrix}_quantized", "input_ids"], [columns], READ, axis=1),
        helper.make_node("Transpose", [columns], [rows], perm=[1, 2, 0]),
        helper.make_node("Cast", [rows], [f"{READ}/float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{matrix}_scale", "input_ids"], [f"{READ}/scale"]),
        helper.make_node("Unsqueeze", [f"{READ}/scale", axis], [f"{READ}/scales"]),
        helper.make_node("Mul", [f"{READ}/float", f"{READ}/scales"], [""], f"{READ}/turn"),
    ]


def matrices(onnx_model: ModelProto) -> dict[str, Any]:
    """The float32 matrices [I, O] of a graph, by name: of products, and of embeddings."""
    from onnx import numpy_helper

    stored = {one.name: one for one in onnx_model.graph.initializer}
    readers = ("MatMul", "Gather")
    names = {name for node in onnx_model.graph.node if node.op_type in readers for name in node.input[:2]}
    return {
        name: numpy_helper.to_array(stored[name])
        for name in sorted(names & stored.keys())
        if len(stored[name].dims) == 2
    }


def restored(onnx_model: ModelProto, name: str, weights: str) -> Tensor:
    """A quantized matrix as the runtime restores it: [O, I] float32."""
    from onnx import numpy_helper

    def stored(end: str) -> Tensor:
        one = next(one for one in onnx_model.graph.initializer if one.name == f"{name}{end}")
        return torch.from_numpy(numpy_helper.to_array(one).copy())

    if weights == "int8-dynamic":
        return (stored("_quantized").float() * stored("_scale")).T
    levels, scales = stored(f"_Q{BITS[weights]}"), stored("_scales")
    if weights == "int4":  # two a byte, the first one in the lower half
        levels = torch.stack((levels & 15, levels >> 4), dim=-1).flatten(-2)
    return ((levels.float() - 2 ** (BITS[weights] - 1)) * scales[..., None]).flatten(1)


def stored_bytes(onnx_model: ModelProto) -> int:
    from onnx import helper

    return sum(
        prod(one.dims) * helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
        for one in onnx_model.graph.initializer
    )


def _named(graph: GraphProto, name: str) -> NodeProto:
    return next(node for node in graph.node if node.name == name)


def _replace(graph: GraphProto, old: list[NodeProto], new: list[NodeProto]) -> None:
    """Puts nodes at the place of others."""
    nodes = list(graph.node)
    place = min(nodes.index(node) for node in old)
    nodes[place:place] = new
    kept = [node for node in nodes if node not in old]
    del graph.node[:]
    graph.node.extend(kept)


def _prune(graph: GraphProto) -> None:
    """Takes out the nodes and the constants that nothing uses."""
    nodes, before = list(graph.node), -1
    while len(nodes) != before:
        before = len(nodes)
        used = {name for node in nodes for name in node.input} | {port.name for port in graph.output}
        nodes = [node for node in nodes if used & set(node.output)]
    kept = [one for one in graph.initializer if one.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
