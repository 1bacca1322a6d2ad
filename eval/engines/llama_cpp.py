"""The llama.cpp engine: a GGUF file, as the pass `llama_cpp` writes it, run on the CPU by llama-cpp-python.

Texts become ids by the tokenizer beside the file, as for every engine. The cache is in float32; products of
quantized weights are of activations that llama.cpp rounds to 8 bits in groups of 32.
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.engines import REMAKE, Engine

try:
    import llama_cpp as library
except ModuleNotFoundError as missing:
    raise UserError(
        "engine 'llama_cpp'",
        f"{missing.name} is not installed",
        "install the extra: pip install '.[llama_cpp]'",
    ) from missing

DEVICES = ("cpu",)
MODEL = "model.gguf"
ROOM = 256  # tokens by which a cache grows: llama.cpp rounds its size up to this
FLOAT32, NO_FLASH_ATTENTION = 0, 0  # values of ggml_type and of llama_flash_attn_type
SILENT = library.llama_log_callback(lambda level, text, data: None)  # what is wrong is raised


def check_build() -> None:
    """Silences llama.cpp, and refuses a build that may end the process.

    llama.cpp 0.5.0, compiled by GCC 12 with AMX, ends it by an illegal instruction in its first product. It
    sets AMX' tile registers once for each thread, too, where other libraries set them otherwise.

    Raises:
        UserError: llama.cpp was compiled with AMX.
    """
    library.llama_log_set(SILENT, None)
    if b"AMX_INT8 = 1" in library.llama_print_system_info():
        off = "-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8"
        fix = f"compile it without: CMAKE_ARGS='{off}' pip install --no-cache-dir --force-reinstall --no-deps"
        raise UserError(
            "engine 'llama_cpp'",
            "llama-cpp-python was compiled with AMX: its products may end the process",
            f"{fix} llama-cpp-python",
        )


class LlamaCppEngine(Engine):
    """The cache lives in a llama.cpp context, one sequence for each row; the state is its length."""

    def __init__(self, folder: Path, threads: int) -> None:
        path = folder / MODEL
        if not path.is_file():
            raise UserError(f"model {folder}", f"no {MODEL}", "make it with the pass llama_cpp")
        check_build()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.threads, self.model = threads, library.llama_model_load_from_file(bytes(path), settings)
        if not self.model:
            raise UserError(f"model {path}", "llama.cpp cannot read it", REMAKE)
        self.contexts: list[Any] = []  # at most one
        weakref.finalize(self, _free, self.contexts, self.model)
        self.shape = (0, 0, 0)  # rows, tokens of each, and logits of a call that the context has room for
        vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))
        super().__init__(folder, vocabulary)

    def _open(self, rows: int, room: int, outputs: int) -> None:
        """Makes a context with room for `rows` sequences, unless there is one; what it held is lost."""
        room = -(-room // ROOM) * ROOM
        if self.shape[0] == rows and self.shape[1] >= room and self.shape[2] >= outputs:
            return
        self._close()
        settings = library.llama_context_default_params()
        settings.n_ctx, settings.n_batch = rows * room, rows * room
        settings.n_ubatch, settings.n_seq_max = min(rows * room, 512), rows
        settings.n_outputs_max = outputs
        settings.n_threads = settings.n_threads_batch = self.threads
        settings.type_k = settings.type_v = FLOAT32
        settings.flash_attn_type = NO_FLASH_ATTENTION
        settings.no_perf = True
        context = library.llama_init_from_model(self.model, settings)
        if not context:
            fix = "take shorter texts, or a machine with more memory"
            raise UserError(f"model {self.folder}", f"no context of {rows} x {room} tokens", fix)
        self.contexts.append(context)
        self.shape = rows, room, outputs

    def _close(self) -> None:
        while self.contexts:
            library.llama_free(self.contexts.pop())
        self.shape = (0, 0, 0)

    def _forget(self) -> None:
        library.llama_memory_clear(library.llama_get_memory(self.contexts[0]), False)

    def _run(self, ids: Tensor, past: int, every: bool) -> Tensor:
        """[B, T, V] logits of `every` token of ids [B, T] after `past` ones, or [B, 1, V] of the last."""
        rows, length = ids.shape
        tokens = np.ascontiguousarray(ids.numpy(), dtype=np.int32).ravel()
        positions = np.tile(np.arange(past, past + length, dtype=np.int32), rows)
        sequences = np.arange(rows, dtype=np.int32)
        addresses = sequences.ctypes.data + sequences.itemsize * np.repeat(np.arange(rows), length)
        asked = np.zeros((rows, length), dtype=np.int8)
        asked[:, 0 if every else -1 :] = 1
        batch = library.llama_batch()
        batch.n_tokens = len(tokens)
        batch.token, batch.pos = _pointer(tokens, batch, "token"), _pointer(positions, batch, "pos")
        counts = np.ones(len(tokens), dtype=np.int32)
        batch.n_seq_id = _pointer(counts, batch, "n_seq_id")
        batch.seq_id = _pointer(addresses.astype(np.uint64), batch, "seq_id")
        batch.logits = _pointer(asked, batch, "logits")
        if code := library.llama_decode(self.contexts[0], batch):
            raise UserError(f"model {self.folder}", f"llama.cpp could not run it (code {code})", REMAKE)
        kept = int(asked.sum())
        logits = np.ctypeslib.as_array(library.llama_get_logits(self.contexts[0]), (kept, self.vocabulary))
        return torch.from_numpy(logits.copy()).view(rows, -1, self.vocabulary)

    def logits(self, batch: Batch) -> Tensor:
        """Row by row, without its padding, where logits are 0."""
        out = torch.zeros(*self.check_ids(batch.input_ids).shape, self.vocabulary)
        for i, length in enumerate(batch.attention_mask.sum(1).tolist()):
            self._open(1, length, -(-length // ROOM) * ROOM)
            self._forget()
            out[i, :length] = self._run(batch.input_ids[i : i + 1, :length], 0, every=True)[0]
        return out

    def prefill(self, ids: Tensor) -> tuple[Tensor, int]:
        rows, length = self.check_ids(ids).shape
        self._open(rows, length + 1, rows)
        self._forget()
        return self._run(ids, 0, every=False)[:, -1], length

    def decode(self, tokens: Tensor, state: int) -> tuple[Tensor, int]:
        if state == self.shape[1]:
            self._grow()
        return self._run(tokens[:, None], state, every=False)[:, -1], state + 1

    def _grow(self) -> None:
        """Moves what the context holds into one with more room."""
        rows, room, outputs = self.shape
        held = []
        for row in range(rows):
            size = library.llama_state_seq_get_size(self.contexts[0], row)
            held.append((ctypes.c_uint8 * size)())
            library.llama_state_seq_get_data(self.contexts[0], held[-1], size, row)
        self._open(rows, 2 * room, outputs)
        for row, data in enumerate(held):
            library.llama_state_seq_set_data(self.contexts[0], data, len(data), row)


def _pointer(array: Any, batch: Any, field: str) -> Any:
    """The memory of an array as the pointer that a field of the batch is; it keeps the array."""
    kind = dict(batch._fields_)[field]
    return ctypes.cast(array.ctypes.data_as(ctypes.c_void_p), kind)


def _free(contexts: list[Any], model: Any) -> None:
    for context in contexts:
        library.llama_free(context)
    library.llama_model_free(model)


def load(folder: Path, threads: int, device: str) -> Engine:
    assert device in DEVICES
    torch.set_num_threads(threads)
    return LlamaCppEngine(folder, threads)
