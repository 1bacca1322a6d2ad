"""A method by its name, a batch of every kind of row, and checked answers."""

import torch

from distill.method import make_method
from distill.teachers.local import check_output
from eval.core.documents import collate
from eval.core.sections import MethodChoice


def make(name, **settings):
    return make_method(MethodChoice(name=name, settings=settings))


def mixed(rows):
    """A batch of both domains and of unequal lengths."""
    chosen = [
        rows[0],
        next(r for r in rows if r.domain != rows[0].domain),
        min(rows, key=lambda r: len(r.tokens)),
    ]
    return collate(chosen, 0)


def answer(method, teacher, batch):
    """[B, T, V] log-probabilities, checked."""
    output = check_output(method.output(teacher, batch), batch, 320, "method")
    everywhere = torch.ones_like(batch.input_ids, dtype=torch.bool)
    return output.select(everywhere).log_softmax(0, everywhere.numel()).view(*everywhere.shape, 320)


def is_even(text: str) -> str | None:
    """An answer that many texts share; the empty text has none."""
    return str(len(text) % 2 == 0) if text else None


def count_of_e(prompt, text):
    """A verifier's score of a text."""
    return text.count("e") + prompt.count("\0")
