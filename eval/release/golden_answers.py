"""Canary prompts: how a released model must go on, so that a loader can tell that it still is that model."""

import torch
from torch import Tensor

from eval.core.config import Frozen
from eval.core.documents import Document, boundary_id
from eval.core.errors import UserError
from eval.engines import Engine

# Between the first and the second token, as a share of the logits' range: other vector units round a sum
# otherwise, which must never look like another model.
MARGIN = 0.01
PROMPTS, CHARACTERS, TOKENS, CANDIDATES = 4, 120, 8, 32


class Canary(Frozen):
    text: str
    ids: list[int]  # the boundary token and the tokens of the text
    expected: list[int]  # the likeliest tokens after them


def clear(logits: Tensor) -> int | None:
    """The likeliest token of [V] logits; None where the second comes close."""
    best, second = logits.topk(2).values.tolist()
    enough = best - second >= MARGIN * float(logits.max() - logits.min())
    return int(logits.argmax()) if enough else None


def continued(engine: Engine, ids: list[int]) -> list[int]:
    """Up to `TOKENS` greedy tokens after a prompt, none after the first that is no clear choice."""
    logits, state = engine.prefill(torch.tensor([ids]))
    made: list[int] = []
    while (token := clear(logits[0])) is not None and token != engine.tokenizer.eos_token_id:
        made.append(token)
        if len(made) == TOKENS:
            break
        logits, state = engine.decode(torch.tensor([token]), state)
    return made


def canaries(engine: Engine, documents: list[Document], context: int) -> list[Canary]:
    """The beginnings of those documents whose continuation is clear for longest.

    Raises:
        UserError: the model is not sure of a single token, so nothing could be told from it.
    """
    tokenizer, found = engine.tokenizer, []
    for document in documents[:CANDIDATES]:
        text = document.text[:CHARACTERS]
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [boundary_id(tokenizer), *ids]
        if len(ids) + TOKENS <= context and (made := continued(engine, ids)):
            found.append(Canary(text=text, ids=ids, expected=made))
    if not found:
        fix = "train it further: its likeliest token is a matter of rounding"
        raise UserError(f"canaries of {engine.folder}", "no prompt has a clear continuation", fix)
    return sorted(found, key=lambda canary: -len(canary.expected))[:PROMPTS]
