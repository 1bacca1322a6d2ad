"""What a method is: the component that a teacher carries and a student must not."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.losses.teacher_output import Dense, States
from distill.models.generation import sample_texts, stop_ids
from distill.models.lm_head import Head, capture_input, head_of, output_embedding
from distill.trainer.loop import Curve
from eval.core.artifacts import source_hashes
from eval.core.documents import Batch, Row, collate
from eval.core.errors import UserError
from eval.core.registry import plugin_class
from eval.core.sections import Frozen, Generation, MethodChoice, Train
from eval.core.study import validate_config
from eval.engines.torch import load_model

METHODS = "distill.methods"  # the registry: a file each


@dataclass(frozen=True)
class Card:
    """What a reader must know about a method before trusting it."""

    title: str
    paper: str
    claim: str
    touches: str  # what of the model or of its input it changes
    limits: str


@dataclass(frozen=True)
class TeacherOutput:
    """What a teacher says about a batch: log-probabilities, or hidden states and the heads that make them.

    log_probs: [B, T, V] float32, normalised over V; position p predicts token p + 1.
    hidden, heads: K tensors [B, T, D_k] and K heads; the answer is the mean of their distributions. A loss
        applies the heads chunk by chunk, so that no [B, T, V] is made.
    """

    log_probs: Tensor | None = None
    hidden: Sequence[Tensor] = ()
    heads: Sequence[Head] = ()

    def at(self, places: Tensor) -> Dense | States:
        """The answer at the N places that are True in [B, T] bool, in row-major order."""
        if self.log_probs is not None:
            return Dense(self.log_probs[places])
        return States([hidden[places] for hidden in self.hidden], list(self.heads))


@dataclass(frozen=True)
class MethodContext:
    """What a method may use: its own folder, the plain bases, the training rows and the trainer."""

    folder: Path  # what `fit` wrote; read-only once fitted
    seed: int
    seeds: list[int]  # of the study
    bases: dict[int, Path]  # seed -> folder of the plain base
    tokenizer: PreTrainedTokenizerBase
    rows: Callable[[], list[Row]]
    train: Callable[[PreTrainedModel, list[Row], Train, str], Curve]  # model, rows, settings, name
    load: Callable[[Path], PreTrainedModel] = load_model  # of a teacher that runs: as `targets` says

    def load_base(self, seed: int) -> PreTrainedModel:
        return self.load(self.bases[seed])


class Method(ABC):
    """One file in `distill/methods`, or any `package.module` that holds exactly one subclass.

    A subclass must define `card` and `signal`. The rest has defaults: nothing to fit, nothing to attach,
    one base of its own seed, and a plain teacher as its control.
    """

    card: ClassVar[Card]

    class Settings(Frozen):
        """Accepted under `method.settings`."""

    def __init__(self, settings: Frozen) -> None:
        self.settings: Any = settings

    def bases(self, seed: int, seeds: list[int]) -> list[int]:
        """Seeds of the plain bases that the teacher of `seed` is made of.

        Seeds that get one list share one teacher: it is a function of those bases alone.
        """
        return [seed]

    def fit(self, bench: MethodContext) -> None:
        """Trains or builds what the method needs, and writes it into `bench.folder`."""
        return None

    @contextmanager
    def attached(self, teacher: PreTrainedModel, bench: MethodContext) -> Iterator[None]:
        """The method is in force inside; on exit the teacher is bit-identical to before."""
        yield

    @abstractmethod
    def signal(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """What the teacher says of every token, in the student's vocabulary, inside `attached`."""

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        """The token ids that the teacher writes after each prompt, inside `attached`.

        This default draws from `signal`, token by token, and so it serves any method; it keeps no cache of
        keys and values, so that its time grows with the square of the length. A method that votes or reranks
        overrides it: with another seed it draws other texts.

        Args:
            prompts: rows of one length; what follows one depends on it and the seed alone.
            generation: at most `new_tokens` ids, the one that ends a text included.
        """

        @torch.no_grad()
        def following(rows: list[Row]) -> Tensor:
            batch = collate(rows, 0).to(teacher.device)
            last = torch.zeros_like(batch.input_ids, dtype=torch.bool)
            last[:, -1] = True
            return self.signal(teacher, batch).at(last).part(0, len(rows))

        return sample_texts(following, prompts, generation, seed, stop_ids(teacher))

    def control(self) -> "Method":
        """The method of T0: the idea taken away, the base, budget and data kept."""
        return Plain(Frozen())

    @cached_property
    def identity(self) -> list[Any]:
        """What decides the teacher beside its base: its code, the class, the settings."""
        code = source_hashes(type(self), Method)
        return [code, type(self).__qualname__, self.settings.model_dump(mode="json")]


class Plain(Method):
    """The teacher without a method."""

    card = Card(
        title="Plain teacher",
        paper="none",
        claim="none: this is what every gain is measured against",
        touches="nothing",
        limits="none",
    )

    def signal(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return plain_output(teacher, batch=batch)


def plain_output(*models: PreTrainedModel, batch: Batch, **inputs: Any) -> TeacherOutput:
    """The mean of the distributions of plain models, from one forward pass of each.

    Args:
        inputs: what the forward passes take beside the batch.

    Raises:
        UserError: the last step of a model is no plain linear layer (an adapter sits on it, say).
    """
    hidden, heads = [], []
    for model in models:
        with capture_input(output_embedding(model)) as seen:
            model(**batch.inputs, **inputs, use_cache=False)
        hidden.append(seen[0])
        heads.append(head_of(model).ready(seen[0].dtype))
    return TeacherOutput(hidden=hidden, heads=heads)


def check_output(signal: object, batch: Batch, vocabulary: int, name: str) -> TeacherOutput:
    """A signal that holds what its type says, for every token of the batch.

    Raises:
        UserError: the method returned something else: no signal, another shape, NaN, or not normalised.
    """
    thing, fix = f"method {name!r}", "return TeacherOutput(log_probs) from `signal`"
    if not isinstance(signal, TeacherOutput):
        raise UserError(thing, f"signal returned {type(signal).__name__}", fix)
    if (signal.log_probs is None) != bool(signal.heads) or len(signal.hidden) != len(signal.heads):
        raise UserError(thing, "a signal that is neither log_probs nor hidden states with a head each", fix)
    if signal.log_probs is not None:
        return replace(signal, log_probs=_check_log_probs(signal.log_probs, batch, vocabulary, thing))
    for hidden, head in zip(signal.hidden, signal.heads, strict=True):
        wanted, rows = (*batch.input_ids.shape, head.weight.shape[1]), head.weight.shape[0]
        if tuple(hidden.shape) != wanted or rows != vocabulary:
            found = f"hidden states of shape {tuple(hidden.shape)}, a head of {rows} tokens"
            raise UserError(thing, found, f"must be {wanted} = [B, T, D] and {vocabulary}")
        if not bool(torch.isfinite(hidden[batch.attention_mask.bool()]).all()):
            fix = f"look at rows {', '.join(batch.ids)}"
            raise UserError(thing, "hidden states with NaN or infinity", fix)
    return signal


def _check_log_probs(found: Tensor, batch: Batch, vocabulary: int, thing: str) -> Tensor:
    wanted = (*batch.input_ids.shape, vocabulary)
    if tuple(found.shape) != wanted:
        raise UserError(thing, f"log_probs of shape {tuple(found.shape)}", f"must be {wanted} = [B, T, V]")
    if not found.dtype.is_floating_point:
        raise UserError(thing, f"log_probs of type {found.dtype}", "return float32 log-probabilities")
    found = found.float()
    total = found.logsumexp(dim=-1)[batch.attention_mask.bool()]
    if not bool(torch.isfinite(total).all()):
        raise UserError(thing, "log_probs with NaN or infinity", f"look at rows {', '.join(batch.ids)}")
    if bool((found.amin(dim=-1) == -torch.inf)[batch.attention_mask.bool()].any()):
        fix = "mix in a little of the plain model: KL to it is infinite"
        raise UserError(thing, "a probability of 0", fix)
    if float(total.abs().max()) > 1e-2:
        raise UserError(
            thing, f"log_probs sum to {float(total.max().exp()):.4g}", "normalise with log_softmax"
        )
    return found


def method_class(name: str) -> type[Method]:
    """The one subclass of Method in `distill/methods/<name>.py` or in the module `name`."""
    return plugin_class(METHODS, name, "method.name", Method, {"card": Card})


def make_method(choice: MethodChoice) -> Method:
    """The method that a study names, with its settings checked."""
    kind = method_class(choice.name)
    return kind(validate_config(kind.Settings, choice.settings, "method.settings"))
