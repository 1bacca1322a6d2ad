"""GGUF files of a transformers model, for llama.cpp: written, quantized by llama.cpp, read back.

Tensors are named and keys are written by the package gguf. The tokenizer goes into the file where llama.cpp
has one that gives the same ids; without one the file takes ids only, as the engine here does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.core.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL = "model.gguf"
# What transformers calls a family -> what llama.cpp does; each was compared with torch.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# How a byte-level tokenizer of llama.cpp splits text before it merges.
SPLITS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
FILE_TYPES = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15}  # llama_ftype
NO_TOKENIZER = "none: llama.cpp has none that gives the same ids"
PROBE = "It's 2024,\n\n\tdef f(x):  return x+1  # Größe 日本 ¡ok! I'LL   \r\n 1234567 \U0001f642 end"


def check_build() -> None:
    """Refuses a build of llama.cpp that its engine refuses."""
    from eval.engines import llama_cpp

    llama_cpp.check_build()


def refusal(config: Any) -> str | None:
    """Why a model of this config is not written, or None."""
    if config.model_type not in ARCHITECTURES:
        return f"model type {config.model_type!r}, expected one of {', '.join(ARCHITECTURES)}"
    if getattr(config, "sliding_window", None):
        return f"a sliding window of {config.sliding_window} tokens"
    if (kind := config.rope_parameters.get("rope_type", "default")) != "default":
        return f"rotary positions of type {kind!r}, expected 'default'"
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        return "biases in its matrices"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act!r}, expected 'silu'"
    return None


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], path: Path
) -> str:
    """Writes a model in float32; returns the tokenizer of llama.cpp that the file has, or `NO_TOKENIZER`.

    Args:
        texts: what that tokenizer must split into the same ids.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    split = same_tokenizer(model.config, tokenizer, texts)
    architecture = ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(path, architecture)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, model.config, tokenizer, split)
    kind = next(a for a in MODEL_ARCH if a.name.lower() == architecture)
    names = get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, f"{name} has no name in GGUF"
        writer.add_tensor(known, _values(name, weight.float().numpy(), model.config, architecture))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return split or NO_TOKENIZER


def _values(name: str, weight: NDArray[Any], config: Any, architecture: str) -> NDArray[Any]:
    """A weight in the order of llama.cpp: in its llama, rotated pairs of queries and keys are neighbours."""
    if architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)


def _add_tokenizer(writer: GGUFWriter, config: Any, tokenizer: Any, split: str | None) -> None:
    from gguf import TokenType

    if split is None:
        writer.add_tokenizer_model("no_vocab")
        return
    bpe, added = json.loads(tokenizer.backend_tokenizer.to_str())["model"], tokenizer.added_tokens_decoder
    names = {i: token for token, i in tokenizer.get_vocab().items() if i < config.vocab_size}
    kinds = {i: TokenType.CONTROL if token.special else TokenType.USER_DEFINED for i, token in added.items()}
    ids = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([kinds.get(i, TokenType.NORMAL if i in names else TokenType.UNUSED) for i in ids])
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in bpe["merges"]])
    for role in ("bos", "eos", "unk", "pad"):
        if (one := getattr(tokenizer, f"{role}_token_id")) is not None and one < config.vocab_size:
            getattr(writer, f"add_{role}_token_id")(one)
    writer.add_add_bos_token(False)


def same_tokenizer(config: Any, tokenizer: Any, texts: Sequence[str]) -> str | None:
    """How llama.cpp must split texts to give the ids of a byte-level BPE tokenizer; none does: None."""
    from gguf import GGUFWriter

    described = json.loads(tokenizer.backend_tokenizer.to_str())
    if described["model"]["type"] != "BPE" or (described["decoder"] or {}).get("type") != "ByteLevel":
        return None
    texts = [*texts, PROBE]
    wanted = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    with TemporaryDirectory() as folder:
        for split in SPLITS:
            writer = GGUFWriter(f"{folder}/{split}.gguf", ARCHITECTURES[config.model_type])
            _add_shape(writer, config)
            _add_tokenizer(writer, config, tokenizer, split)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            if list(_tokenized(Path(f"{folder}/{split}.gguf"), texts)) == wanted:
                return split
    return None


def _tokenized(path: Path, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids that llama.cpp gives for texts by the tokenizer in a file."""
    from eval.engines.llama_cpp import library

    settings = library.llama_model_default_params()
    settings.vocab_only = True
    model = library.llama_model_load_from_file(bytes(path), settings)
    assert model, f"llama.cpp reads no vocabulary from {path}"
    vocabulary = library.llama_model_get_vocab(model)
    for text in texts:
        given = text.encode()
        ids = (library.llama_token * (len(given) + 8))()
        count = library.llama_tokenize(vocabulary, given, len(given), ids, len(ids), False, False)
        yield list(ids[:count])
    library.llama_model_free(model)


def quantize(plain: Path, path: Path, weights: str) -> None:
    """Writes a float32 file with its matrices as llama.cpp quantizes them to `weights`.

    Raises:
        UserError: llama.cpp does not.
    """
    from ctypes import byref

    from eval.engines.llama_cpp import library

    settings = library.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[weights], 1
    if code := library.llama_model_quantize(bytes(plain), bytes(path), byref(settings)):
        raise UserError(f"quantization to {weights}", f"llama.cpp refuses (code {code})", "leave it out")


def tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file by name, mapped: `tensor_type`, `data`, `n_bytes`."""
    from gguf import GGUFReader

    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def values(tensor: Any) -> NDArray[np.float32]:
    """What a tensor of a file restores to: [O, I] float32."""
    from gguf.quants import dequantize

    return dequantize(tensor.data, tensor.tensor_type)
