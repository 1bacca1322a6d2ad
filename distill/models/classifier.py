"""Models that say the class of a text, of any family that transformers classifies with."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.core.errors import UserError
from eval.engines import first_line, load_tokenizer, silenced
from eval.engines.torch import CLASSIFIER, check_folder, classifies, embedding_rows


def with_labels(config: PreTrainedConfig, labels: Sequence[str]) -> PreTrainedConfig:
    """The config of a classifier of these classes, changed in place; without labels it stays as it is."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        config.architectures = [CLASSIFIER]
    return config


def check_labels(config: PreTrainedConfig, labels: Sequence[str], where: str) -> None:
    """Refuses a pretrained model that is to classify as it is, and has no such classes.

    Raises:
        UserError: it is no classifier, or its classes have other names or another order.
    """
    if not labels:
        return
    if not classifies(config):
        fix = "give one that was trained for it, or train it here"
        raise UserError(where, f"{config.architectures} is no {CLASSIFIER}", fix)
    named = [config.id2label[number] for number in sorted(config.id2label)]
    if named != list(labels):
        raise UserError(where, f"its classes are {named}, data.labels are {list(labels)}", "write them alike")


def load_encoder(
    folder: Path, labels: Sequence[str], seed: int, where: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a folder with a new head for these classes, whose weights `seed` decides.

    Weights of other heads are left aside.

    Raises:
        UserError: the folder is damaged, its family classifies nothing, or it lacks a weight below the head.
    """
    if check_folder(folder):
        raise UserError(where, "its weights are quantized", "give the model that it was made of")
    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with silenced("transformers"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=with_labels(config, labels),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # a head of other classes
                output_loading_info=True,
            )
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        fix = "give a folder of a family that transformers classifies with, such as bert"
        raise UserError(where, f"{folder} ({first_line(error)})", fix) from error
    lost = [key for key in report["missing_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    lost += [key for key, *_ in report["mismatched_keys"] if key.startswith(f"{model.base_model_prefix}.")]
    if lost := [key for key in lost if ".pooler." not in key]:
        raise UserError(where, f"{folder} lacks {lost[0]} ({len(lost)} such)", "give a whole model")
    return model.eval(), load_tokenizer(folder, embedding_rows(model))
