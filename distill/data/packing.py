"""A check that a model keeps the documents of a packed row apart."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import PreTrainedModel

from eval.core.documents import Row, collate
from eval.core.errors import UserError

MAX_DIFFERENCE = 1e-3  # of the largest logit: above rounding in bf16, far below a neighbour's influence


@torch.no_grad()
def check_packing(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> None:
    """Refuses a model in which the documents of a packed row see each other; tried on the first packed row.

    Most families accept positions that restart for a new document; some (ALiBi, state spaces, OPT) do not.

    Raises:
        UserError: the logits of a packed row differ from those of its documents alone.
    """
    packed = next((row for row in rows if row.packed), None)
    if packed is None:
        return
    ends = list(accumulate(size for size, _ in packed.parts))
    parts = [packed.tokens[end - size : end] for end, (size, _) in zip(ends, packed.parts, strict=True)]
    alone = [Row(packed.document, packed.domain, 0, tokens) for tokens in parts]
    outputs = []
    for group in ([packed], alone):
        batch = collate(group, pad).to(model.device)
        logits = model(**batch.inputs, use_cache=False).logits.float()
        outputs.append(logits[batch.attention_mask.bool()])
    difference, largest = float((outputs[0] - outputs[1]).abs().max()), float(outputs[1].abs().max())
    if not difference <= MAX_DIFFERENCE * max(largest, 1.0):
        kind = model.config.model_type
        problem = f"true, but documents see each other in a {kind} (logits differ by {difference:.2g})"
        raise UserError("data.packing", problem, "set data.packing: false")
