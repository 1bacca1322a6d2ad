"""A check that a model keeps the documents of a packed row apart."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.models.rounding import ROUNDINGS_ALLOWED, rounding_noise
from eval.core.documents import Row, collate, join_rows
from eval.core.errors import UserError

PARTS, TOKENS = 4, 64  # what is tried of a packed row: so many documents, so many tokens of each


@torch.no_grad()
def check_packing(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> None:
    """Refuses a model in which the documents of a packed row see each other; tried on the first packed row.

    Most families accept positions that restart for a new document; some (ALiBi, state spaces, OPT) do not.

    Raises:
        UserError: the logits of a packed row differ from those of its documents alone by more than rounding
            explains in this model.
    """
    packed = next((row for row in rows if row.packed), None)
    if packed is None:
        return
    ends = accumulate(size for size, _ in packed.parts)
    starts = ((end - size, min(size, TOKENS)) for end, (size, _) in zip(ends, packed.parts, strict=True))
    pieces = [packed.tokens[start : start + size] for start, size in starts]
    alone = [Row(packed.document, packed.domain, 0, tokens) for tokens in pieces[:PARTS]]

    def logits(group: list[Row]) -> Tensor:
        batch = collate(group, pad).to(model.device)
        every: Tensor = model(**batch.inputs, use_cache=False).logits.float()
        return every[batch.attention_mask.bool()]

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max())

    training = model.training
    model.eval()
    apart = logits(alone)
    difference = distance(logits([join_rows(alone)]), apart)
    allowed = ROUNDINGS_ALLOWED * rounding_noise(model, lambda: logits(alone), apart, distance)
    model.train(training)
    if not difference <= allowed:
        kind = model.config.model_type
        problem = f"true, but documents see each other in a {kind} (logits differ by {difference:.2g}, "
        problem += f"rounding explains {allowed:.2g})"
        raise UserError("data.packing", problem, "set data.packing: false")
