"""Golden answers: how a released model must continue some prompts, so that a loader can recognise it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eval.core.config import Stored
from eval.core.documents import Document, boundary_id
from eval.core.documents.encoding import text_ids
from eval.core.errors import UserError
from eval.engines import Engine

if TYPE_CHECKING:
    from torch import Tensor

# Between the first and the second token, as a share of the logits' range: other vector units round a sum
# otherwise, which must never look like another model.
MARGIN = 0.01
PROMPTS, CHARACTERS, TOKENS, CANDIDATES = 4, 120, 8, 32


class GoldenAnswer(Stored):
    text: str
    ids: list[int]  # the boundary token and the tokens of the text
    expected: list[int]  # the likeliest tokens after them


def clear_choice(logits: Tensor) -> int | None:
    """The likeliest token of [V] logits; None where the second comes close."""
    best, second = logits.topk(2).values.tolist()
    is_clear = best - second >= MARGIN * float(logits.max() - logits.min())
    return int(logits.argmax()) if is_clear else None


def continue_prompt(engine: Engine, ids: list[int]) -> list[int]:
    """Up to `TOKENS` greedy tokens after a prompt, none after the first that is no clear choice."""
    import torch

    logits, state = engine.prefill(torch.tensor([ids]))
    tokens: list[int] = []
    while (token := clear_choice(logits[0])) is not None and token not in engine.end_ids:
        tokens.append(token)
        if len(tokens) == TOKENS:
            break
        logits, state = engine.decode(torch.tensor([token]), state)
    return tokens


def build_golden_answers(engine: Engine, documents: list[Document], context: int) -> list[GoldenAnswer]:
    """The beginnings of those documents whose continuation is clear for longest.

    Raises:
        UserError: the model is not sure of a single token, so a loader could recognise it by nothing.
    """
    tokenizer, answers = engine.tokenizer, []
    for document in documents[:CANDIDATES]:
        text = document.text[:CHARACTERS]
        ids = [boundary_id(tokenizer), *text_ids(tokenizer, text)]
        if len(ids) + TOKENS <= context and (expected := continue_prompt(engine, ids)):
            answers.append(GoldenAnswer(text=text, ids=ids, expected=expected))
    if not answers:
        fix = "train it further: its likeliest token is a matter of rounding"
        raise UserError(f"golden answers of {engine.folder}", "no prompt has a clear continuation", fix)
    return sorted(answers, key=lambda answer: -len(answer.expected))[:PROMPTS]
