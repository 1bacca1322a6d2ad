"""The ONNX Runtime engine: a decoder with a key-value cache, as the pass `onnxruntime` writes it.

onnxruntime-genai is needed to build the graph, not to run it. Keys and values lie in buffers with room for
more tokens: attention reads and writes them in place, so that a step copies nothing of what came before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.engines import REMAKE, Engine, first_line

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as refused
except ModuleNotFoundError as missing:
    raise UserError(
        "engine 'onnxruntime'",
        f"{missing.name} is not installed",
        "install the extra: pip install '.[onnxruntime]'",
    ) from missing

DEVICES = ("cpu",)
MODEL = "model.onnx"
FIRST_LOGITS = "first_logits"  # input [1]: the position in the row from which logits are computed
INPUTS = {"input_ids", "attention_mask", "position_ids", FIRST_LOGITS}
PAST, PRESENT = "past_key_values.", "present."  # what the names of a cache begin with
ROOM = 128  # tokens by which the buffers of a cache grow, at least
TYPES = {torch.float32: np.float32, torch.int64: np.int64}
REFUSALS = (
    refused.Fail,
    refused.InvalidArgument,
    refused.InvalidGraph,
    refused.InvalidProtobuf,
    refused.NoSuchFile,
    refused.NotImplemented,
    refused.RuntimeException,
)


@dataclass
class State:
    """The caches of one batch, and the number of tokens in them."""

    caches: dict[str, Tensor]  # name without PAST or PRESENT -> [B, heads, room, D]
    length: int


class OnnxRuntimeEngine(Engine):
    batch_tokens = 256

    def __init__(self, folder: Path, threads: int) -> None:
        path = folder / MODEL
        if not path.is_file():
            raise UserError(f"model {folder}", f"no {MODEL}", "make it with the pass onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what is wrong is raised
        try:
            self.session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        except REFUSALS as error:
            raise UserError(f"model {path}", f"cannot be read ({first_line(error)})", REMAKE) from error
        shapes = {port.name: port.shape for port in self.session.get_inputs()}
        self.caches = {name.removeprefix(PAST): s for name, s in shapes.items() if name.startswith(PAST)}
        self.inputs = {name for name in shapes if not name.startswith(PAST)}
        if other := sorted(self.inputs - INPUTS) or sorted({FIRST_LOGITS} - self.inputs):
            raise UserError(
                f"model {path}",
                f"{'it has an' if other[0] in self.inputs else 'no'} input {other[0]!r}",
                "make it with the pass onnxruntime",
            )
        super().__init__(folder, self.session.get_outputs()[0].shape[2])

    def _new_caches(self, rows: int, room: int) -> dict[str, Tensor]:
        return {name: torch.zeros(rows, s[1], room, s[3]) for name, s in self.caches.items()}

    def _run(
        self, ids: Tensor, mask: Tensor, caches: dict[str, Tensor], *, past: int = 0, first: int = 0
    ) -> Tensor:
        """Logits [B, T - first, V] of ids [B, T] after `past` tokens that the caches hold already.

        Args:
            mask: [B, past + T].
            caches: written in place; with no room for a token nothing is kept.
        """
        rows, length = ids.shape
        out = torch.empty(rows, length - first, self.vocabulary)
        feeds = {
            "input_ids": ids.contiguous(),
            "attention_mask": mask,
            "position_ids": torch.arange(past, past + length).repeat(rows, 1),
            FIRST_LOGITS: torch.tensor([first]),
        }
        binding = self.session.io_binding()
        for name in self.inputs:
            _bind(binding.bind_input, name, feeds[name])
        for name, cache in caches.items():
            _bind(binding.bind_input, f"{PAST}{name}", cache)
            if cache.numel():
                _bind(binding.bind_output, f"{PRESENT}{name}", cache)
        _bind(binding.bind_output, "logits", out)
        self.session.run_with_iobinding(binding)
        return out

    def logits(self, batch: Batch) -> Tensor:
        ids = self.check_ids(batch.input_ids)
        return self._run(ids, batch.attention_mask, self._new_caches(len(ids), 0))

    def prefill(self, ids: Tensor) -> tuple[Tensor, State]:
        rows, length = self.check_ids(ids).shape
        caches = self._new_caches(rows, length + ROOM)
        return self._run(ids, torch.ones_like(ids), caches, first=length - 1)[:, -1], State(caches, length)

    def decode(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        caches, past = state.caches, state.length
        if past == next(iter(caches.values())).shape[2]:
            larger = self._new_caches(len(tokens), past + max(past, ROOM))
            for name, cache in caches.items():
                larger[name][:, :, :past] = cache
            caches = larger
        mask = torch.ones(len(tokens), past + 1, dtype=torch.int64)
        return self._run(tokens[:, None], mask, caches, past=past)[:, -1], State(caches, past + 1)


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    """Gives onnxruntime the memory of a tensor, which must outlive the run."""
    bind(name, "cpu", 0, TYPES[tensor.dtype], list(tensor.shape), tensor.data_ptr())


def load(folder: Path, threads: int, device: str) -> Engine:
    assert device in DEVICES
    torch.set_num_threads(threads)
    return OnnxRuntimeEngine(folder, threads)
