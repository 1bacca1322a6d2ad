"""Engines: the folder is the registry. An engine loads a variant by its standard format alone.

`eval/engines/NAME.py` is the engine that a manifest calls NAME. It holds `DEVICES`, the devices that it
runs on, and `load(folder, threads, device) -> Engine`. Nothing is imported before it is asked for: the
peak memory and the start of a measured process are then those of its own engine.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from eval.core.artifacts import Manifest
from eval.core.documents import Batch
from eval.core.errors import UserError, require_one_of
from eval.core.registry import plugin_module

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
AGAIN = "delete the folder and make it again"


class Engine(ABC):
    """A loaded causal language model with V rows of output; it serves one batch of decodes at a time."""

    batch_tokens: ClassVar[int] = 1024  # padded, per forward pass: more of them are no faster on a CPU

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder, self.vocabulary = folder, vocabulary

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        return load_tokenizer(self.folder, self.vocabulary)

    @abstractmethod
    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] float32: position p scores the token at p + 1."""

    def borrowed(self, batch: Batch) -> Tensor:
        """The same, in memory that may be the engine's own: it holds until the engine is used again."""
        return self.logits(batch)

    @abstractmethod
    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Reads prompts [B, T]; returns the logits [B, V] of the next tokens and a state with the cache."""

    @abstractmethod
    def decode(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads one token [B] more of each; returns the logits [B, V] of the next ones and the new state.

        The state that was given is used up, and so is every state older than the last `prefill`.
        """


class Subject(BaseModel):
    """What an artifact is, by the facts of its manifest."""

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
        raise UserError(f"artifact {manifest.name}", f"no fact {fact!r} in its manifest", AGAIN) from error


def engine_module(name: str) -> ModuleType:
    """The module of an engine: of this package, or at a `package.module` path.

    Raises:
        UserError: there is no such engine, or what it needs is not installed.
    """
    return plugin_module(__name__, name, "engine")


def load_engine(name: str, folder: Path, threads: int = 1, device: str = "cpu") -> Engine:
    """Loads `folder` on `device` (cpu or cuda) with so many CPU threads, which hold for this process.

    Raises:
        UserError: the engine is unknown, does not run on the device, or cannot load the folder.
    """
    module = engine_module(name)
    require_one_of(f"device of engine {name!r}", device, list(module.DEVICES))
    engine = module.load(Path(folder), threads, device)
    assert isinstance(engine, Engine)
    return engine


def load_tokenizer(folder: Path, vocabulary: int | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, held against the `vocabulary` rows of its model where given.

    Raises:
        UserError: it is missing or damaged, or writes ids that the model has no row for.
    """
    from transformers import AutoTokenizer  # seconds to import: not before a tokenizer is asked for

    thing = f"tokenizer of {folder}"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(thing, f"no {TOKENIZERS[0]}", "save the tokenizer beside the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UserError(thing, f"cannot be read ({first_line(error)})", AGAIN) from error
    largest = max(tokenizer.get_vocab().values())
    if vocabulary is not None and largest >= vocabulary:
        found = f"ids up to {largest}, the model has {vocabulary} rows"
        raise UserError(thing, found, "save the tokenizer that the model was trained with")
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of what a library said."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
