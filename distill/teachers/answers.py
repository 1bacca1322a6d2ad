"""Teachers that do not run here: of each token of a row they name the likeliest ids, and the token itself."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distill.losses.divergences import MIN_TAIL
from distill.losses.teacher_output import TopK
from distill.method import Method
from eval.core.documents import Batch, Row
from eval.core.errors import UserError
from eval.core.sections import Generation

ROUNDING = 1e-2  # by which probabilities of an id list may sum to more than one


@dataclass(frozen=True)
class Answer:
    """What a teacher says of the n tokens of a row after the first.

    ids: [n, k] int64, the likeliest first; log_probs: [n, k] float32 at T = 1, -inf where an entry is unused;
    own: [n] float32, log-probabilities of the row's tokens themselves.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    own: np.ndarray


def likeliest(entries: Iterable[tuple[int, float]], k: int) -> tuple[list[int], list[float]]:
    """The k likeliest of (id, log-probability), in a settled order; what is missing is unused entries."""
    best = sorted(entries, key=lambda entry: (-entry[1], entry[0]))[:k]
    missing = k - len(best)
    first = best[0][0] if best else 0
    return [i for i, _ in best] + [first] * missing, [value for _, value in best] + [-np.inf] * missing


def check_answer(answer: Answer, vocabulary: int, thing: str, row: str) -> None:
    """Refuses what is no distribution over the ids of a vocabulary.

    Raises:
        UserError: names the row and the first token that is wrong.
    """
    used = answer.log_probs > -np.inf
    total = np.exp(answer.log_probs.astype(np.float64)).sum(1)
    ordered = np.sort(np.where(used, answer.ids, -1 - np.arange(answer.ids.shape[1])), axis=1)
    faults = {
        "a log-probability that is no number below 0": ~(
            (np.isfinite(answer.log_probs) | ~used).all(1)
            & (answer.log_probs <= ROUNDING).all(1)
            & np.isfinite(answer.own)
            & (answer.own <= ROUNDING)
        ),
        "probabilities that sum to more than 1": total > 1 + ROUNDING,
        f"an id outside of the {vocabulary} of the tokenizer": (
            (answer.ids < 0) | (answer.ids >= vocabulary)
        ).any(1),
        "an id twice": (ordered[:, 1:] == ordered[:, :-1]).any(1),
        "no id at all": ~used.any(1),
    }
    for problem, wrong in faults.items():
        if wrong.any():
            token = 1 + int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{thing}, row {row}", f"token {token} has {problem}", "give log softmax at T = 1"
            )


class AnsweringTeacher(ABC):
    """A teacher that answers for rows with their likeliest ids; all further ids are one bucket.

    Its method stands in the prompt alone, or is in the answers already.
    """

    unanswered: ClassVar[str] = "rows without an answer"  # what it leaves out, for messages

    def __init__(self, method: Method, vocabulary: int) -> None:
        self.method, self.vocabulary = method, vocabulary
        self.causes: dict[str, str] = {}  # row without an answer -> why, where more is known

    @abstractmethod
    def answers(self, batch: Batch) -> list[Answer | None]:
        """One for each row of a batch, checked; None for a row of which nothing is known."""

    def written(self, batch: Batch) -> None:
        """Called when what was said of a batch is on disk."""
        return None

    def __call__(self, batch: Batch) -> TopK:
        """The target of the valid tokens of a batch; of a row without an answer, unused entries alone."""
        answers = self.answers(batch)
        k = max((answer.ids.shape[1] for answer in answers if answer is not None), default=1)
        parts = [
            (np.zeros((mask.sum(), k), np.int64), np.full((mask.sum(), k), -np.inf, np.float32))
            if answer is None
            else (answer.ids[mask[: len(answer.ids)]], answer.log_probs[mask[: len(answer.ids)]])
            for answer, mask in zip(answers, batch.mask.numpy(), strict=True)
        ]
        ids, log_probs = (np.concatenate(column) for column in zip(*parts, strict=True))
        return TopK(torch.from_numpy(ids), torch.from_numpy(log_probs))

    def log_probs(self, batch: Batch) -> Tensor:
        """[B, T, V] log-probabilities: exact for the likeliest ids and for the row's own tokens.

        What they leave is spread evenly over the other ids: bits, correct tokens and confidence do not
        depend on it.

        Raises:
            UserError: a row has no answer: what is scored is the same for all.
        """
        rows, length = batch.input_ids.shape
        table = torch.full((rows, length, self.vocabulary), -float(np.log(self.vocabulary)))
        for i, answer in enumerate(self.answers(batch)):
            if answer is None:
                problem = f"a scored document is among the {self.unanswered}"
                raise UserError(f"row {batch.ids[i]}", problem, "leave the document out of the data")
            n = len(answer.own)
            known = torch.zeros(n, self.vocabulary)
            labels = batch.input_ids[i, 1 : 1 + n, None]
            own = torch.from_numpy(answer.own)[:, None]
            known.scatter_(1, labels, own.exp())
            used = torch.from_numpy(answer.log_probs > -np.inf)
            ids = torch.where(used, torch.from_numpy(answer.ids), labels)
            values = torch.where(used, torch.from_numpy(answer.log_probs), own)
            same = ids == labels
            values = torch.where(same, own, values)
            known.scatter_(1, ids, values.exp())
            named = torch.zeros_like(known, dtype=torch.bool).scatter_(1, labels, True).scatter_(1, ids, True)
            rest = (1 - known.sum(1, keepdim=True)).clamp(min=MIN_TAIL)
            others = (~named).sum(1, keepdim=True).clamp(min=1)
            logs = (rest / others).log().expand(-1, self.vocabulary).clone()
            logs.scatter_(1, labels, own).scatter_(1, ids, values)
            table[i, :n] = logs
        return table

    def write(self, prompts: list[Row], generation: Generation, seed: int) -> list[list[int]]:
        raise UserError("targets.source", "sequence, but this teacher writes no texts", "set it to cached")
