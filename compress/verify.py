"""Verifies a built variant: reloaded by its standard format, it must answer as it did in memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from compress.calibration import (
    LEAST_ALLOWED,
    allowed_difference,
    check_batch,
    log_probs,
    rounding_error,
)
from compress.model_size import cast_weights
from eval.core.documents import Batch, Row
from eval.core.errors import UserError
from eval.engines.torch import computing_dtype
from eval.score.divergence import kl_divergence

MODEL = "model"  # folder of the built model
REFERENCE = "reference.safetensors"  # beside it: its log-probabilities on `check_batch`
TEXTS = 100  # training rows on which the saved tokenizer must give the same ids
MAX_KL = 1e-6  # nats per token, mean: what log-probabilities `LEAST_ALLOWED` apart may have


def save_reference(
    folder: Path, model: Any, tokenizer: Any, rows: Sequence[Row], pad: int, error: float
) -> None:
    """Writes the answers of the model in memory, and texts with their token ids, into `folder`.

    The model answers in the number format that its engine will compute in, and stays in it.

    Args:
        error: rounding error of the student in float32, which says how near two computations can be; that
            of the model itself does too, where it is computed in 16 bits.

    Raises:
        UserError: an answer is not finite.
    """
    batch = check_batch(rows, pad)
    half = isinstance(model, PreTrainedModel) and model.dtype in (torch.bfloat16, torch.float16)
    if half and "quantization_config" not in model.config.to_dict():
        model = cast_weights(model, computing_dtype(model.dtype, model.device))
    reference = log_probs(model, batch)
    if not bool(torch.isfinite(reference[batch.attention_mask.bool()]).all()):
        raise UserError(
            f"variant {folder.parent}", "log-probabilities that are not finite", "choose a milder recipe"
        )
    if half:
        error = max(error, rounding_error(model, batch))
    texts = tokenizer.batch_decode([row.tokens[1:] for row in rows[:TEXTS]])
    tensors = {
        "log_probs": reference,
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "allowed": torch.tensor(allowed_difference(error), dtype=torch.float64),
    }
    ids = tokenizer(texts)["input_ids"]
    save_file(tensors, folder / REFERENCE, {"texts": json.dumps(texts), "ids": json.dumps(ids)})


def verify_reload(folder: Path, engine: str) -> dict[str, float]:
    """Largest difference of a log-probability and mean KL(memory, reloaded), in nats, on training rows.

    Raises:
        UserError: either is too large, or the reloaded tokenizer gives other ids.
    """
    from eval.engines import load_engine

    reference = load_file(folder / REFERENCE)
    with safe_open(folder / REFERENCE, framework="pt") as stream:
        texts, ids = (json.loads(stream.metadata()[name]) for name in ("texts", "ids"))
    loaded = load_engine(engine, folder / MODEL)
    thing, fix = f"variant {folder.parent}", "it is not published: report this with the library versions"
    different = sum(
        one != other for one, other in zip(ids, loaded.tokenizer(texts)["input_ids"], strict=True)
    )
    if different:
        raise UserError(
            thing, f"its reloaded tokenizer splits {different} of {len(ids)} texts into other tokens", fix
        )
    batch = Batch([], [], [], reference["input_ids"], reference["attention_mask"])
    real = batch.attention_mask.bool()
    before, after = reference["log_probs"][real], torch.log_softmax(loaded.logits(batch).float(), -1)[real]
    difference = float((before - after).abs().max())
    kl = float(kl_divergence(before, after).mean())
    allowed = float(reference["allowed"])
    allowed_kl = MAX_KL * (allowed / LEAST_ALLOWED) ** 2  # KL grows with the square of a small difference
    if not (difference <= allowed and kl <= allowed_kl):
        problem = (
            f"reloaded, log-probabilities differ by up to {difference:.3g} nats (at most {allowed:.3g}), "
            f"KL {kl:.3g} nats per token (at most {allowed_kl:.3g})"
        )
        raise UserError(thing, problem, fix)
    return {"log_prob_difference": difference, "kl": kl}
