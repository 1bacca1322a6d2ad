"""A model in the files of an engine, as passes hand it on."""

from __future__ import annotations

import shutil
import weakref
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from eval.core.documents import Batch
from eval.engines import Engine, load_engine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class EngineFiles:
    """A model that an engine of `eval/engines` runs, with the interface that models of transformers have.

    Its files lie in a folder of its own below `parent`, which goes when the model does.
    """

    device = torch.device("cpu")

    def __init__(self, engine: str, parent: Path, model: PreTrainedModel) -> None:
        """The folder has the configs of `model`; whoever makes the object writes the weights."""
        parent.mkdir(parents=True, exist_ok=True)
        self.name, self.folder = engine, Path(mkdtemp(dir=parent))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        model.config.save_pretrained(self.folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(self.folder)

    @cached_property
    def engine(self) -> Engine:
        """It takes the files as they are when it is first asked for."""
        return load_engine(self.name, self.folder)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **unused: Any) -> Any:
        """`logits` [B, T, V] of the ids [B, T]; where there is padding they are without meaning."""
        return SimpleNamespace(logits=self.engine.logits(Batch([], [], [], input_ids, attention_mask)))

    def save_pretrained(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
