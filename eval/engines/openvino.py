"""The OpenVINO engine: a stateful decoder as optimum-intel writes it, run by the OpenVINO runtime alone.

optimum-intel is needed to export a model, not to run it: its classes and all that they import would
weigh on the start and on the memory of every measured process.
"""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.engines import REMAKE, Engine, at_every_position, first_line

try:
    import openvino
except ModuleNotFoundError as missing:
    raise UserError(
        "engine 'openvino'",
        f"{missing.name} is not installed",
        "install the extra: pip install '.[openvino]'",
    ) from missing

DEVICES = ("cpu",)
MODEL = "openvino_model.xml"
INPUTS = {"input_ids", "attention_mask", "position_ids", "beam_idx", "token_type_ids"}
FIRST_LOGITS = (
    "first_logits"  # an input that is added: the position in the row from which logits are computed
)
LAST = 2**63 - 1
# Arithmetic and cache in float32: the runtime's defaults may round both to 16 bits, by the machine's ISA,
# and a score would then depend on where it was taken. Weights stay as the variant stores them.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
    "ENABLE_CPU_PINNING": False,  # two pinned processes would share one core
}


class OpenVinoEngine(Engine):
    """The cache lives in the infer request; the state is the number of tokens that it holds."""

    batch_tokens = 256  # it is slower by a tenth or more where the logits of a batch leave a core's cache

    def __init__(self, folder: Path, threads: int) -> None:
        path = folder / MODEL
        if not path.is_file():
            raise UserError(f"model {folder}", f"no {MODEL}", "export the model with optimum-intel")
        try:
            core = openvino.Core()
            model = core.read_model(path)
            named = {name for port in model.inputs for name in port.get_names()}
            self.classifies = len(model.output("logits").get_partial_shape()) == 2  # [B, V]: of rows
            if not self.classifies and not named - INPUTS:
                compute_logits_from(model)
            compiled = core.compile_model(model, "CPU", {**EXACT, "INFERENCE_NUM_THREADS": threads})
        except RuntimeError as error:
            raise UserError(f"model {path}", f"cannot be read ({first_line(error)})", REMAKE) from error
        self.inputs = {name for port in compiled.inputs for name in port.get_names()}
        if other := sorted(named - INPUTS):
            raise UserError(
                f"model {path}",
                f"it has an input {other[0]!r}",
                "export it as a stateful text decoder, with optimum-intel",
            )
        self.request = compiled.create_infer_request()
        rows = compiled.output("logits").get_partial_shape()[-1].get_length()
        super().__init__(folder, _embedding_rows(folder) if self.classifies else rows)

    def _run(self, ids: NDArray[np.int64], mask: NDArray[np.int64], past: int, first: int = 0) -> Tensor:
        """[B, T - first, V] for ids [B, T] and a mask [B, past + T]; `past` tokens are in the cache already.

        Of a classifier [B, V]. The memory is the request's own, and is written again by the next run.
        """
        if past == 0 and not self.classifies:
            self.request.reset_state()
        batch, length = ids.shape
        feeds = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": np.tile(np.arange(past, past + length), (batch, 1)),
            "beam_idx": np.arange(batch, dtype=np.int32),
            FIRST_LOGITS: np.array([first], dtype=np.int64),
            "token_type_ids": np.zeros_like(ids),
        }
        self.request.infer({name: feeds[name] for name in self.inputs}, share_inputs=True, share_outputs=True)
        return torch.from_numpy(self.request.get_tensor("logits").data)

    def logits(self, batch: Batch) -> Tensor:
        return self.borrowed(batch).clone()

    def borrowed(self, batch: Batch) -> Tensor:
        ids = self.check_ids(batch.input_ids)
        return at_every_position(self._run(ids.numpy(), batch.attention_mask.numpy(), past=0), ids.shape[1])

    def prefill(self, ids: Tensor) -> tuple[Tensor, int]:
        array = self.check_ids(ids).numpy()
        length = array.shape[1]
        logits = self._run(array, np.ones_like(array), past=0, first=length - 1)
        return (logits if self.classifies else logits[:, -1]).clone(), length

    def decode(self, tokens: Tensor, state: int) -> tuple[Tensor, int]:
        mask = np.ones((len(tokens), state + 1), dtype=np.int64)
        return self._run(tokens[:, None].numpy(), mask, past=state)[:, -1].clone(), state + 1


def compute_logits_from(model: openvino.Model) -> None:
    """Adds the input that says from which position of the row the head computes logits.

    A head whose logits come of more than one product, as with a correction of low rank, is left as it is: it
    computes all of them.
    """
    from openvino import opset13 as operators

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        varying = [value.get_node() for value in node.input_values() if not _is_constant(value.get_node())]
        if len(varying) != 1:
            return
        node = varying[0]
    hidden = node.input_value(0)
    first = operators.parameter([1], np.int64, name=FIRST_LOGITS)
    first.output(0).set_names({FIRST_LOGITS})
    one, axis = operators.constant([1], np.int64), operators.constant([1], np.int64)
    part = operators.slice(hidden, first, operators.constant([LAST], np.int64), one, axis)
    node.input(0).replace_source_output(part.output(0))
    model.add_parameters([first])
    model.validate_nodes_and_infer_types()


def _is_constant(node: openvino.Node) -> bool:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _embedding_rows(folder: Path) -> int:
    """Ids that the model in a folder has an embedding for, as its config says."""
    rows: int = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return rows


def load(folder: Path, threads: int, device: str) -> Engine:
    assert device in DEVICES
    torch.set_num_threads(threads)
    return OpenVinoEngine(folder, threads)
