"""Packed rows, held against the model that is to read them."""

from itertools import accumulate

import torch
from transformers import PreTrainedModel

from eval.core.documents import Row, collate
from eval.core.errors import UserError

PACKED_ERROR = 1e-3  # of the largest logit: rounding, in bf16 too, and nothing like a neighbour's influence


@torch.no_grad()
def check_packing(model: PreTrainedModel, rows: list[Row], pad: int) -> None:
    """Refuses a model in which a packed row's parts see each other, on the first packed row.

    Most families take positions that start again for a new document; some (ALiBi, state spaces, OPT) do not.
    """
    packed = next((row for row in rows if row.packed), None)
    if packed is None:
        return
    ends = list(accumulate(size for size, _ in packed.parts))
    parts = [packed.tokens[end - size : end] for end, (size, _) in zip(ends, packed.parts, strict=True)]
    alone = [Row(packed.document, packed.domain, 0, tokens) for tokens in parts]
    answers = []
    for group in ([packed], alone):
        batch = collate(group, pad).to(model.device)
        logits = model(**batch.inputs, use_cache=False).logits.float()
        answers.append(logits[batch.attention_mask.bool()])
    off, size = float((answers[0] - answers[1]).abs().max()), float(answers[1].abs().max())
    if not off <= PACKED_ERROR * max(size, 1.0):
        found = (
            f"true, but documents see each other in a {model.config.model_type} (logits differ by {off:.2g})"
        )
        raise UserError("data.packing", found, "set data.packing: false")
