"""One arithmetic of log-probabilities from several models or prompts: contrasts, guidance, proxies."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.method import (
    Card,
    Method,
    MethodContext,
    TeacherOutput,
)
from distill.models.load import check_same_tokenizer, fresh_model, model_origin, named_model
from distill.models.prefix import Prefix, Text, front_ids, read_prefix
from eval.core.config import Frozen
from eval.core.documents import Batch, ChosenRows, Row
from eval.core.errors import UserError
from eval.core.sections import NamedModel, Train
from eval.engines import silenced


class Term(NamedModel):
    """One distribution of the sum: of the teacher, or of another model, with or without a text in front."""

    weight: float = Field(description="factor of its log-probabilities; below 0: what is moved away from")
    architecture: dict[str, Any] | None = Field(
        None, description="a fresh model with the teacher's tokenizer: `model_type` and fields of its config"
    )
    train: Train | None = Field(
        None, description="how the model is trained on the training rows first; none: it is used as it is"
    )
    domains: list[str] = Field([], description="domains whose rows it is trained on; none: all")
    prompt: Text | None = Field(None, description="a text in front of each row")

    @model_validator(mode="after")
    def one_model(self) -> Self:
        if self.path is not None and self.architecture is not None:
            raise ValueError("give at most one of `path` and `architecture`")
        if self.train is None and (self.architecture is not None or self.domains):
            raise ValueError("`architecture` and `domains` need `train`")
        return self


@dataclass(frozen=True)
class Part:
    """A term that can answer."""

    model: PreTrainedModel | None  # None: the teacher
    prefix: Prefix | None


def guided(log_probs: Sequence[Tensor], weights: Sequence[float], plausible: float) -> Tensor:
    """[B, T, V] log-probabilities proportional to the product of p_k to the power of w_k.

    With `plausible` > 0 only ids to which the first distribution gives at least that share of its largest
    probability are weighed anew, as in Li et al. 2023, arXiv:2210.15097, eq. 4: they share the mass that it
    gives to all of them, and every other id keeps its own, where the paper gives it none.

    Args:
        log_probs: K tensors [B, T, V].
    """
    total = sum(weight * one for weight, one in zip(weights, log_probs, strict=True))
    assert isinstance(total, Tensor)
    if not plausible:
        return total.log_softmax(-1)
    expert = log_probs[0]
    plausible_mask = (expert - expert.amax(-1, keepdim=True)).exp() >= plausible
    mass = expert.masked_fill(~plausible_mask, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(
        plausible_mask, total.masked_fill(~plausible_mask, -torch.inf).log_softmax(-1) + mass, expert
    )


class Guidance(Method):
    card = Card(
        title="Guidance",
        paper="contrastive decoding: Li et al. 2023, arXiv:2210.15097; classifier-free guidance: Sanchez et "
        "al. 2023, arXiv:2306.17806; DExperts: Liu et al. 2021, arXiv:2105.03023; proxy tuning: Liu et al. "
        "2024, arXiv:2401.08565",
        claim="what one model or prompt says more than another is worth more than it says itself",
        touches="the output: a weighted sum of the log-probabilities of several models or prompts",
        limits="made for texts that are written; the likelihood of texts that are given may well fall",
    )

    class Settings(Frozen):
        terms: list[Term] = Field(
            min_length=2, description="what is summed; the first one is the expert, the control is it alone"
        )
        plausible: float = Field(
            0.0,
            ge=0,
            le=1,
            description="share of the expert's largest probability below which an id keeps its own; 0: none",
        )

    def control(self) -> Method:
        """The expert alone, trained as it is there."""
        expert = self.settings.terms[0].model_copy(update={"weight": 1.0})
        return Guidance(self.settings.model_copy(update={"terms": [expert], "plausible": 0.0}))

    @cached_property
    def identity(self) -> list[Any]:
        """The settings, with the texts and the content of the models that they name."""
        return [*super().identity, [self._origin(place) for place in range(len(self.settings.terms))]]

    def _origin(self, place: int) -> list[Any]:
        term = self.settings.terms[place]
        text = None if term.prompt is None else term.prompt.read()
        if term.path is None:
            return [text, {}]
        with TemporaryDirectory() as folder:
            where = f"method.settings.terms.{place}.path"
            return [text, model_origin(term, Path(folder) / "hashes.json", where)]

    @property
    def fits(self) -> bool:
        return any(term.train for term in self.settings.terms)

    def fit(self, context: MethodContext) -> None:
        """Trains the terms that are to be trained, each into a folder of its own."""
        for place, term in enumerate(self.settings.terms):
            if term.train is not None:
                model, rows = self._start(place, context), _rows_of(context.rows(), term.domains)
                context.train(model, rows, term.train, f"term{place}")
                with silenced("transformers"):
                    model.save_pretrained(context.folder / f"term{place}")

    def _start(self, place: int, context: MethodContext) -> PreTrainedModel:
        """The model of a term before it is trained: fresh, named, or the one that the teacher is."""
        term, where = self.settings.terms[place], f"method.settings.terms.{place}"
        if term.architecture is not None:
            rows = context.load_base(context.seed).get_input_embeddings().num_embeddings
            return fresh_model(
                term.architecture,
                context.tokenizer,
                context.seed,
                vocabulary=rows,
                where=f"{where}.architecture",
            )
        if term.path is None:
            return context.load_base(context.seed)
        _, origin = self._origin(place)
        model, tokenizer = named_model(term, origin.get("commit"), f"{where}.path")
        check_same_tokenizer(context.tokenizer, tokenizer, f"{where}.path")
        return model

    def tokens_in_front(self, tokenizer: PreTrainedTokenizerBase) -> int:
        prompts = [term.prompt.read() for term in self.settings.terms if term.prompt is not None]
        return max((len(front_ids(tokenizer, prompt)) for prompt in prompts), default=0)

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> list[Part]:
        return [self._part(place, teacher, context) for place in range(len(self.settings.terms))]

    def _part(self, place: int, teacher: PreTrainedModel, context: MethodContext) -> Part:
        term, model = self.settings.terms[place], None
        if term.train is not None:
            model = context.load(context.folder / f"term{place}").to(teacher.device)
        elif term.path is not None:
            model = self._start(place, context).to(teacher.device, teacher.dtype).requires_grad_(False)
        if term.prompt is None:
            return Part(model, None)
        ids = front_ids(context.tokenizer, term.prompt.read())
        return Part(model, read_prefix(teacher if model is None else model, ids))

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        outputs = []
        for part in self.parts:
            model = teacher if part.model is None else part.model
            outputs.append(
                self.model_output(model, batch)
                if part.prefix is None
                else self.model_output_after(model, batch, [part.prefix] * len(batch.ids))
            )
        if len(outputs) == 1:
            return outputs[0]
        log_probs = [one.dense() for one in outputs]
        fewest = min(one.shape[-1] for one in log_probs)  # some may be padded further
        weights = [term.weight for term in self.settings.terms]
        return TeacherOutput(
            guided([one[..., :fewest] for one in log_probs], weights, self.settings.plausible)
        )


def _rows_of(rows: Sequence[Row], domains: list[str]) -> Sequence[Row]:
    """The rows of some domains; of all, where none is named.

    Raises:
        UserError: a domain has none.
    """
    if not domains:
        return rows
    places: dict[str, list[int]] = {domain: [] for domain in domains}
    for place, row in enumerate(rows):
        if row.domain in places:
            places[row.domain].append(place)
    if empty := [domain for domain, rows_of in places.items() if not rows_of]:
        fix = "name domains of the data"
        raise UserError("method.settings: domains", f"no training row is of {empty[0]!r}", fix)
    return ChosenRows(rows, sorted(place for rows_of in places.values() for place in rows_of))
