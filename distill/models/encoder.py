"""An encoder of texts: each becomes a vector of length 1, so that products are cosines."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from distill.models.gguf import find_model
from distill.models.load import MODEL_FILES
from eval.core.errors import UserError
from eval.core.sections import NamedModel
from eval.engines import load_tokenizer, silenced
from eval.engines.torch import check_folder

POOLING = Path("1_Pooling", "config.json")  # how sentence-transformers says what becomes of the states
BATCH = 64  # texts of a forward pass


@dataclass(frozen=True)
class Encoder:
    """A model, and which of its last hidden states stand for a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Literal["mean", "first"]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 vectors of length 1, on the CPU; texts longer than the model reads are cut."""
        most = self.model.config.max_position_embeddings
        vectors = []
        for start in range(0, len(texts), BATCH):
            inputs = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=most,
                return_tensors="pt",
            ).to(self.model.device)
            states = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None].to(states.dtype)
            pooled = states[:, 0] if self.pooling == "first" else (states * mask).sum(1) / mask.sum(1)
            vectors.append(torch.nn.functional.normalize(pooled, dim=-1).cpu())
        return torch.cat(vectors)


def load_encoder(named: NamedModel, commit: str | None, where: str) -> Encoder:
    """An encoder in the format of sentence-transformers, or any model of transformers that gives states.

    Without `1_Pooling/config.json` a text is the mean of its states.

    Args:
        commit: the one that its revision on the hub stands for.
        where: key of its path in the study, for errors.

    Raises:
        UserError: it cannot be read, or pools in another way.
    """
    assert named.path is not None
    folder = find_model(named.path, where)
    if folder is not None and folder.is_file():
        raise UserError(where, f"{folder} is a file", "give an encoder: a folder of transformers")
    if folder is None:
        patterns = [*MODEL_FILES, POOLING.as_posix()]
        revision = commit or named.revision
        folder = Path(snapshot_download(named.path, revision=revision, allow_patterns=patterns))
    check_folder(folder)
    try:
        with silenced("transformers"):
            model = AutoModel.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        fix = "give an encoder that transformers loads from safetensors"
        raise UserError(where, f"{folder} ({' '.join(str(error).split())[:200]})", fix) from error
    return Encoder(model.eval(), load_tokenizer(folder), _pooling(folder, where))


def _pooling(folder: Path, where: str) -> Literal["mean", "first"]:
    if not (folder / POOLING).is_file():
        return "mean"
    settings = json.loads((folder / POOLING).read_text(encoding="utf-8"))
    modes = [name for name, used in settings.items() if name.startswith("pooling_mode_") and used is True]
    kinds: dict[str, Literal["mean", "first"]] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "first",
    }
    if len(modes) != 1 or modes[0] not in kinds:
        problem = f"{folder / POOLING} has {', '.join(modes) or 'no pooling mode'}"
        raise UserError(where, problem, "give an encoder that takes the mean, or the first state")
    return kinds[modes[0]]
