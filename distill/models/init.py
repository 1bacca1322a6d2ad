"""Student initialisation: the base, some of its layers, another model, or random weights."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.models.layers import decoder_layers, evenly_spaced, keep_layers, most_influential
from distill.models.load import check_same_tokenizer, fresh_model, named_model
from eval.core.documents import Row, batches, pad_id, tokens_per_batch
from eval.core.errors import UserError
from eval.core.sections import NamedModel, Student

ROWS = 64  # training rows on which the influence of layers is measured


def init_student(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Student,
    rows: Sequence[Row],
    seed: int,
    commit: str | None = None,
    labels: Sequence[str] = (),
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The student before its first step, and facts for its manifest.

    Base or named model, rows and seed decide it: all arms of a seed start from the same weights.

    Args:
        base: changed in place where the student keeps its layers.
        rows: training rows for the influence of layers; needed for `start: influential` only.
        commit: of a pretrained student on the hub.
        labels: classes that it tells apart, where the study classifies.

    Raises:
        UserError: more layers are requested than the base has, or the family cannot drop any; a pretrained
            student has another tokenizer.
    """
    if config.start == "base":
        return base, {}
    if config.path is not None:
        named = NamedModel(path=config.path, revision=config.revision)
        student, own_tokenizer = named_model(named, commit, "student.path", labels, seed if labels else None)
        check_same_tokenizer(tokenizer, own_tokenizer, "student.path")
        return student, {}
    if config.architecture is not None:
        vocabulary = base.config.get_text_config().vocab_size  # padding included, as in the teacher
        where = "student.architecture"
        fresh = fresh_model(
            config.architecture, tokenizer, seed, vocabulary=vocabulary, labels=labels, where=where
        )
        return fresh, {}
    count, wanted = len(decoder_layers(base)[2]), config.layers
    assert wanted is not None
    if wanted > count:
        raise UserError("student.layers", wanted, f"the base has {count} layers: choose at most that many")
    if config.start == "every":
        layers = evenly_spaced(count, wanted)
    else:
        size = tokens_per_batch(base.config.get_text_config().vocab_size, base.device)
        layers = most_influential(base, list(batches(rows[:ROWS], pad_id(tokenizer), size)), wanted)
    keep_layers(base, layers)
    return base, {"kept_layers": layers}
