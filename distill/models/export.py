"""Exports: a plain transformers checkpoint, its tokenizer read back in a new process before it counts."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.models.generation import list_ends
from eval.core.artifacts import digest
from eval.core.documents import Document
from eval.core.errors import UserError
from eval.engines import silenced

DOCUMENTS, CHARACTERS = 100, 2000  # what a saved tokenizer is tried on: documents, and characters of each
READ_FROM = ("is_local", "name_or_path")  # of tokenizer_config.json
READ_BACK = """
import json, sys
sys.modules["torch"] = None  # a tokenizer needs none, and torch is two thirds of the time to read one
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False, local_files_only=True)
print(json.dumps(tokenizer(json.load(sys.stdin))["input_ids"]))
"""


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    documents: list[Document],
    verified: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a plain transformers checkpoint, which loads without this project and stops where texts end.

    Args:
        documents: on which the saved tokenizer must give the ids of `tokenizer`; without any it is not tried.
        verified: a folder whose tokenizer was read back before: the same files need no second reading.
        dtype: of the weights in the folder; the model is served in it.

    Raises:
        UserError: it cannot be written (full disk, no permission), or its tokenizer reads back as another.
    """
    model = model.to("cpu", dtype)
    model.config.use_cache = True
    list_ends(model, tokenizer)
    try:
        with silenced("transformers"):
            model.save_pretrained(str(folder), safe_serialization=True)
        export_tokenizer(tokenizer, folder, documents, verified)
        (folder / "README.md").write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        fix = "free disk space, then run the same command to continue from the last checkpoint"
        raise UserError(f"export to {folder.parent}", " ".join(str(error).split())[:200], fix) from error


def export_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    documents: list[Document],
    verified: Path | None = None,
) -> None:
    """Saves a tokenizer and compares its ids on `documents` with those of the saved one; see `export`."""
    files = [Path(name) for name in tokenizer.save_pretrained(str(folder))]
    if not documents:
        return
    if verified is not None and all(_content(file) == _content(verified / file.name) for file in files):
        return
    texts = _beginnings(documents)
    command = [sys.executable, "-c", READ_BACK, str(folder)]
    process = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    thing = f"tokenizer saved to {folder.parent}"
    if process.returncode != 0:
        cause = (process.stderr.strip().splitlines() or ["no output"])[-1]
        fix = "give a base whose tokenizer is a tokenizer.json that transformers reads"
        raise UserError(thing, f"cannot be read back ({cause})", fix)
    saved = json.loads(process.stdout.splitlines()[-1])
    ids = token_ids(tokenizer, documents)
    different = [i for i, (one, other) in enumerate(zip(ids, saved, strict=True)) if one != other]
    if different:
        i = different[0]
        raise UserError(
            thing,
            f"splits {len(different)} of {len(texts)} training documents into other tokens when it is read "
            f"back ({documents[i].id}: {len(ids[i])} tokens before, {len(saved[i])} after)",
            "give a base whose tokenizer.json holds all of it (a fast tokenizer saved by transformers)",
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[list[int]]:
    """The ids of the beginnings of some documents: what a tokenizer that was saved must give again."""
    with silenced("transformers"):  # a document may be longer than the model reads
        ids: list[list[int]] = tokenizer(_beginnings(documents))["input_ids"]
    return ids


def check_ids(
    tokenizer: PreTrainedTokenizerBase, documents: list[Document], sha256: str, folder: Path
) -> None:
    """Refuses a tokenizer, read from `folder` in a process that did not make it, that gives other ids.

    Args:
        sha256: the digest of `token_ids` when it was saved.
    """
    if digest(token_ids(tokenizer, documents)) != sha256:
        fix = "delete the folder and run again: the installed transformers and tokenizers then write it"
        raise UserError(
            f"tokenizer {folder}", "splits training documents otherwise than when it was saved", fix
        )


def _beginnings(documents: list[Document]) -> list[str]:
    return [document.text[:CHARACTERS] for document in documents[:DOCUMENTS]]


def _content(file: Path) -> str | None:
    """What a tokenizer's file says, without what transformers notes about where it was read from."""
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    if file.name != "tokenizer_config.json":
        return text
    config = json.loads(text)
    return json.dumps({name: value for name, value in config.items() if name not in READ_FROM})
