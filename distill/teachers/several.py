"""Several teachers that run here: the weighted mean of their probabilities, or one for each domain."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.data.rows import TokenMap, distilled_split
from distill.data.tokens import make_tokens
from distill.losses.teacher_output import Dense, Mixed, States, match_vocabulary
from distill.method import Method
from distill.models.generation import sample_texts, stop_ids
from distill.teachers.local import LocalTeacher
from eval.core.documents import Batch, Row, read_documents, scored_slices, slices_of_test
from eval.core.errors import UserError, require_one_of
from eval.core.sections import Generation
from eval.core.sections.models import Teacher
from eval.core.study import Study


@dataclass(frozen=True)
class MixedTeacher:
    """Of a row those teachers speak that its domain has: the mean of their probabilities, by their weights.

    Each reads the rows of which it speaks, and no others. All have one tokenizer, and carry the same method.
    """

    teachers: Sequence[LocalTeacher]
    settings: Teacher

    @property
    def method(self) -> Method:
        return self.teachers[0].method

    @property
    def vocabulary(self) -> int:
        """Rows of the widest head."""
        return max(teacher.vocabulary for teacher in self.teachers)

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """[B, T, V] log-probabilities of a batch, checked."""
        target = self._target(batch, torch.ones_like(batch.input_ids, dtype=torch.bool))
        return target.log_softmax(0, batch.input_ids.numel()).view(*batch.input_ids.shape, -1)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Mixed:
        """The target of the valid tokens of a batch."""
        return self._target(batch, F.pad(batch.mask, (0, 1)))

    def _target(self, batch: Batch, mask: Tensor) -> Mixed:
        """What the teachers say together at the positions of `mask` [B, T]."""
        device = self.teachers[0].model.device
        batch, mask = batch.to(device), mask.to(device)
        shares = [self.settings.speakers(domain) for domain in batch.domains]
        row_of = mask.nonzero()[:, 0]  # [N]
        parts: list[tuple[Dense | States, Tensor, Tensor]] = []
        for number, teacher in enumerate(self.teachers):
            weights = torch.tensor([share.get(number, 0.0) for share in shares], device=device)
            if not weights.any():
                continue
            rows = weights.nonzero()[:, 0]
            target = self._matched(teacher.target(_take(batch, rows), mask[rows]))
            places = weights[row_of].nonzero()[:, 0]
            parts.append((target, places, weights[row_of[places]].log()))
        return Mixed(*zip(*parts, strict=True))

    def _matched(self, target: Dense | States) -> Dense | States:
        """A teacher's target over the ids of the widest head."""
        matched = match_vocabulary(target, self.vocabulary)
        assert isinstance(matched, Dense | States)
        return matched

    @torch.no_grad()
    def write(self, prompts: list[Row], generation: Generation, seed: int) -> list[list[int]]:
        """The ids after each prompt: written by the teacher of its domain, or drawn from the mean of several.

        Raises:
            UserError: a method returned too many or too few ids, or ids outside the vocabulary.
        """
        texts: dict[str, list[int]] = {}
        speakers = {row.id: tuple(self.settings.speakers(row.domain)) for row in prompts}
        for numbers, group in groupby(
            sorted(prompts, key=lambda row: speakers[row.id]), lambda row: speakers[row.id]
        ):
            rows = list(group)
            write = self.teachers[numbers[0]].write if len(numbers) == 1 else partial(self._draw, numbers)
            texts |= {row.id: ids for row, ids in zip(rows, write(rows, generation, seed), strict=True)}
        return [texts[row.id] for row in prompts]

    def _draw(
        self, numbers: Sequence[int], prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        readers = [self.teachers[number].reader(prompts) for number in numbers]
        device = self.teachers[0].model.device

        def next_log_probs(rows: list[Row]) -> Tensor:
            shares = [self.settings.speakers(row.domain) for row in rows]
            parts = [self._matched(read(rows)) for read in readers]
            weights = [torch.tensor([share[n] for share in shares], device=device).log() for n in numbers]
            places = torch.arange(len(rows), device=device)
            return Mixed(tuple(parts), (places,) * len(parts), tuple(weights)).log_softmax(0, len(rows))

        stops = set[int]().union(*(stop_ids(self.teachers[number].model) for number in numbers))
        return sample_texts(next_log_probs, prompts, generation, seed, stops)


def _take(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch."""
    numbers = rows.tolist()
    ids, documents, domains = (
        [names[i] for i in numbers] for names in (batch.ids, batch.documents, batch.domains)
    )
    given, positions = (None if each is None else each[rows] for each in (batch.given, batch.positions))
    return Batch(ids, documents, domains, batch.input_ids[rows], batch.attention_mask[rows], given, positions)


def check_domains(study: Study, tokenizer: PreTrainedTokenizerBase) -> None:
    """Does some teacher of several speak of every document, and is there a document of every domain named?

    Raises:
        UserError: names the domain.
    """
    if study.teacher is None or not study.teacher.mix:
        return
    data = study.folder / "data"
    learned = TokenMap(make_tokens(study, tokenizer, distilled_split(study), verify=False)).domains
    slices = [*scored_slices(data), *slices_of_test(data)]
    scored = {document.domain for name in slices for document in read_documents(data, name)}
    domains = sorted({*learned, *scored})
    for number, member in enumerate(study.teacher.mix):
        for name in member.domains:
            require_one_of(f"teacher.mix.{number}.domains: domain of no document", name, domains)
    if silent := [domain for domain in domains if not study.teacher.speakers(domain)]:
        problem = f"none of these speaks of documents of the domain {silent[0]!r}"
        raise UserError("teacher.mix", problem, "name it in `domains` of one, or give one without `domains`")
