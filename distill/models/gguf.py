"""A GGUF file as a plain transformers folder: weights by transformers, the tokenizer from the file's tokens.

transformers converts the tokenizer of a GGUF file too, but what it saves splits text in another way when it
is read back: 383 tokens of SmolLM2 become 574. So the tokenizer is built here.
"""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from distill.packages import package_folder
from eval.core.config import PACKAGES
from eval.core.errors import UserError, require_installed, require_one_of
from eval.engines import silenced

CONTROL = 3  # token types of a GGUF file: 1 is normal, 3 is control
DIGITS_APART = {"smollm": True, "gpt-2": False}  # `tokenizer.ggml.pre` -> are digits split one by one?


def find_gguf(path: str, where: str = "base.path") -> Path:
    """The GGUF file that a path in a study names: a file, or the one in a package.

    Args:
        where: its key in the study, for errors.

    Raises:
        UserError: the package cannot be had or brings no single GGUF file, or the file is not there.
    """
    if not path.startswith(PACKAGES):
        if not Path(path).is_file():
            raise UserError(where, f"no file {path}", "give the path of a GGUF file")
        return Path(path)
    files = sorted(package_folder(path, where).rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(where, f"{path} has {len(files)} GGUF files", "give the path of one")
    return files[0]


def find_model(path: str, where: str = "base.path") -> Path | None:
    """Where a model lies on this machine: a GGUF file, or a folder; None: it is a name on the hub.

    Raises:
        UserError: it is a package that cannot be had, or that brings no single model.
    """
    if path.startswith(PACKAGES):
        inside = package_folder(path, where)
        folders = sorted({file.parent for file in inside.rglob("*.safetensors")})
        models = [*inside.rglob("*.gguf"), *(one for one in folders if (one / "config.json").is_file())]
        if len(models) != 1:
            problem = f"{path} has {len(models)} models: GGUF files, or folders with safetensors"
            raise UserError(where, problem, "give the path of one")
        return models[0]
    if path.endswith(".gguf"):
        return find_gguf(path, where)
    return Path(path) if Path(path).is_dir() else None


def read_fields(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file.

    Raises:
        UserError: the package `gguf` is missing, or this is no GGUF file.
    """
    require_installed("gguf", f"reading {file}", "run `pip install '.[gguf]'`")
    from gguf import GGUFReader

    try:
        return {name: field.contents() for name, field in GGUFReader(file).fields.items()}
    except (ValueError, IndexError) as error:
        raise UserError(f"GGUF file {file}", str(error), "give a whole GGUF file, version 2 or 3") from error


def build_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of a GGUF file, from its tokens, merges and token types.

    Raises:
        UserError: it is of another kind, whose splitting of text is not known here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = require_one_of("tokenizer.ggml.model", str(fields.get("tokenizer.ggml.model")), ["gpt2"])
    pre = str(fields.get("tokenizer.ggml.pre", "gpt-2"))
    require_one_of(f"tokenizer.ggml.pre of a {kind} tokenizer", pre, list(DIGITS_APART))
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS_APART[pre] else []
    steps.append(
        pre_tokenizers.ByteLevel(add_prefix_space=bool(fields.get("tokenizer.ggml.add_space_prefix")))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    named = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = fields.get("tokenizer.chat_template")
    return fast


def read_config(file: Path) -> PreTrainedConfig:
    """The transformers config of a GGUF file.

    Raises:
        UserError: transformers reads no models of its architecture.
    """
    with _refused_by_transformers(file):
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)


def load_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, its weights taken off their quantization grid as float32, and its tokenizer."""
    tokenizer = build_tokenizer(read_fields(file))
    bar = redirect_stderr(StringIO())  # its own, which transformers' switch for bars does not reach
    with _refused_by_transformers(file), silenced("transformers"), bar:
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        )
    return model.eval(), tokenizer


@contextmanager
def _refused_by_transformers(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError, KeyError) as error:
        cause = " ".join(str(error).split())[:200]
        fix = "give a whole file of an architecture that transformers reads from GGUF, such as llama"
        raise UserError(f"GGUF file {file}", cause, fix) from error
