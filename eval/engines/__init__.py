"""Engines: each file here is one. An engine loads a variant by its standard format alone.

`eval/engines/NAME.py` is the engine that a manifest calls NAME. It holds `DEVICES`, the devices that it
runs on, and `load(folder, threads, device) -> Engine`. An engine is only imported when it is
needed, so that the peak memory and the start of a measured process are those of its own engine.
"""

from __future__ import annotations

import json
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from eval.core.artifacts import Manifest
from eval.core.config import plugin_module
from eval.core.documents import Batch, tokens_per_batch
from eval.core.documents.encoding import end_ids, note_ends
from eval.core.errors import UserError, require_one_of
from eval.core.records import AnyRecord

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
TEMPLATE_NAME = "[A-Za-z0-9_-]+"  # of a chat template: transformers makes a file name of it, unchecked
# onnxruntime, by whomever it is imported, would write an id to the home folder and call out.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
REMAKE = "delete the folder and run the command that makes it again"


class Engine(ABC):
    """A loaded causal language model with V rows of output; it serves one batch of decodes at a time."""

    batch_tokens: ClassVar[int] = 1024  # padded, per forward pass: more of them are no faster on a CPU
    computed_in: str | None = None  # the number format of products where it is not the stored one

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder, self.vocabulary = folder, vocabulary

    @property
    def scoring_tokens(self) -> int:
        """Padded tokens per batch that suit the engine and the memory of its logits."""
        return min(self.batch_tokens, tokens_per_batch(self.vocabulary))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder, self.vocabulary)

    def check_ids(self, ids: Tensor) -> Tensor:
        """The ids [B, T] again, if the model has a row for each.

        Raises:
            UserError: it has none for one: special tokens of a tokenizer may lie beyond the model.
        """
        if int(largest := ids.max()) >= self.vocabulary:
            problem = f"token {self.tokenizer.convert_ids_to_tokens(int(largest))!r} is id {int(largest)}"
            fix = f"leave out what holds it: the model has {self.vocabulary} rows"
            raise UserError(f"text for {self.folder}", problem, fix)
        return ids

    @cached_property
    def end_ids(self) -> set[int]:
        """Ids that end a text; see `eval.core.documents.encoding.end_ids`."""
        return end_ids(self.tokenizer)

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] float32: position p scores the token at p + 1, or the class of the row."""

    def borrowed(self, batch: Batch) -> Tensor:
        """The same without a copy: the memory may be that of the engine, valid until it runs again."""
        return self.logits(batch)

    @abstractmethod
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Reads prompts [B, T]; returns the logits [B, V] of the next tokens and a state with the cache.

        Of a classifier those of the classes of the rows, and no state: nothing is decoded.
        """

    @abstractmethod
    def decode(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads one token [B] more of each; returns the logits [B, V] of the next ones and the new state.

        The given state must not be used again, nor any state from before the last `prefill`.
        """


class Writer(Engine):
    """An engine with a faster way to whole texts than token by token; its texts are what is timed."""

    @abstractmethod
    def write(self, ids: Tensor, new_tokens: int) -> int:
        """Writes up to `new_tokens` after prompts [B, T]; returns how many the longest text has."""


def at_every_position(values: Tensor, length: int) -> Tensor:
    """[B, T, X] of what is said of whole rows, [B, X] or [B, 1, X]; of positions, it is left as it is."""
    values = values[:, None] if values.ndim == 2 else values
    return values.expand(-1, length, -1) if values.shape[1] == 1 else values


class Subject(BaseModel):
    """The model in an artifact, from the facts of its manifest."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    arm: str
    seed: int
    recipe: str
    engine: str

    @property
    def label(self) -> str:
        return f"{self.recipe}/{self.arm}-s{self.seed}"


def subject_of(manifest: Manifest) -> Subject:
    try:
        return Subject.model_validate(manifest.facts)
    except ValidationError as error:
        fact = error.errors()[0]["loc"][0]
        raise UserError(f"artifact {manifest.name}", f"no fact {fact!r} in its manifest", REMAKE) from error


def has_own_vocabulary(manifest: Manifest) -> bool:
    """True of a variant whose passes have changed its vocabulary: its tokens are not those of its student."""
    changed = (report["facts"].get("vocabulary") for report in manifest.facts.get("reports", []))
    return any(sizes and sizes[0] != sizes[1] for sizes in changed)


def subject_of_record(record: AnyRecord) -> Subject:
    return Subject.model_validate(record, from_attributes=True)


def engine_module(name: str) -> ModuleType:
    """The module of an engine: of this package, or at a `package.module` path.

    Raises:
        UserError: there is no such engine, or what it needs is not installed.
    """
    return plugin_module(__name__, name, "engine")


def load_engine(name: str, folder: Path, threads: int = 1, device: str = "cpu") -> Engine:
    """Loads `folder` on `device` (cpu, cuda, cuda:1) with so many CPU threads, which hold for this process.

    Raises:
        UserError: the engine is unknown, does not run on the device, or cannot load the folder.
    """
    module = engine_module(name)
    require_one_of(f"device of engine {name!r}", device.split(":", maxsplit=1)[0], list(module.DEVICES))
    engine = module.load(Path(folder), threads, device)
    assert isinstance(engine, Engine)
    return engine


def load_tokenizer(folder: Path, vocabulary: int | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, checked against the `vocabulary` rows of its model where given.

    Raises:
        UserError: it is missing or damaged, has no fast form or a chat template whose name is none, or gives
            ids that the model has no row for.
    """
    from transformers import AutoTokenizer  # takes seconds to import: only where it is needed

    thing = f"tokenizer of {folder}"
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            thing, f"no {TOKENIZER_FILES[0]}", "save a fast tokenizer into the folder of the model"
        )
    config = folder / "tokenizer_config.json"
    files = [path.name for path in (folder / "additional_chat_templates").glob("*.jinja")]
    check_template_names(thing, config.read_bytes() if config.is_file() else b"", files)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        note_ends(tokenizer, folder / "generation_config.json", folder / "config.json")
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(thing, f"cannot be read ({first_line(error)})", REMAKE) from error
    check_fast(thing, tokenizer)
    if vocabulary is not None:
        tokens_beyond(tokenizer, vocabulary, thing)
    return tokenizer


def tokens_beyond(tokenizer: PreTrainedTokenizerBase, rows: int, thing: str) -> dict[str, int]:
    """The special tokens of a tokenizer beyond the rows of a model, such as Gemma 3's for images.

    Whether any text has one of them is for those to ask who read texts.

    Raises:
        UserError: tokens that texts are split into are among them: it is the tokenizer of another model.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    added = tokenizer.added_tokens_decoder
    if not all(i in added and added[i].special for i in beyond.values()):
        problem = f"ids up to {max(beyond.values())}, the model has {rows} rows"
        raise UserError(thing, problem, "replace it by the tokenizer that the model was trained with")
    return beyond


def check_template_names(thing: str, config: bytes, files: list[str]) -> None:
    """Refuses chat templates whose names could be paths, before a tokenizer is made of them.

    Saving it would write a file of each name, anywhere (CVE-2026-9856, open in transformers 5.5).

    Args:
        config: the content of `tokenizer_config.json`, empty where there is none.
        files: names of the files in `additional_chat_templates`.
    """
    try:
        templates = json.loads(config or b"{}")["chat_template"]
    except (ValueError, KeyError, TypeError, RecursionError):  # none, or unreadable: what loads it says so
        templates = None
    names: list[Any] = [file.removesuffix(".jinja") for file in files]
    if isinstance(templates, list):
        names += [entry.get("name") if isinstance(entry, dict) else entry for entry in templates]
    elif isinstance(templates, dict):
        names += templates
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(TEMPLATE_NAME, name)):
            fix = f"rename it in tokenizer_config.json: names of templates are {TEMPLATE_NAME}"
            raise UserError(thing, f"a chat template named {name!r:.100}, which could be a path", fix)


def check_fast(thing: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that runs in Python alone: scores are compared by its `tokenizer.json`."""
    if not tokenizer.is_fast:
        problem = f"{type(tokenizer).__name__} has no fast form"
        raise UserError(
            thing, problem, "give a base with a tokenizer.json, as the library tokenizers makes it"
        )


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Inside, the loggers `names` and all below them report errors only, and transformers shows no bars.

    What is wrong is raised; the log lines and bars of libraries would hide the lines of a command.
    """
    from transformers.utils import logging as transformers_logging

    with_bars = transformers_logging.is_progress_bar_enabled()
    levels = silence(*names)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if with_bars:
            transformers_logging.enable_progress_bar()


def silence(*names: str) -> dict[logging.Logger, int]:
    """From now on the loggers `names` and all below them report errors only; returns their levels before."""
    below = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in names]
    levels = {logger: logger.level for logger in map(logging.getLogger, {*names, *below})}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    return levels


def first_line(error: BaseException) -> str:
    """The first line of the message of an error of a library."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
