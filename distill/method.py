"""What a method is: the component that a teacher carries and a student must not."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.losses.teacher_output import Dense, States
from distill.models.cached import NextLogProbs, reader_after
from distill.models.generation import CachedReader, generate_texts, sample_texts, stop_ids
from distill.models.lm_head import Head, capture_input, head_of, output_embedding
from distill.models.prefix import Prefix, hidden_after, put_in_front, read_prefix
from distill.trainer.loop import Curve
from eval.core.artifacts import file_sha256
from eval.core.config import Frozen, plugin_class, plugin_code, plugin_names, validate_config
from eval.core.documents import Batch, Row, collate
from eval.core.errors import UserError
from eval.core.sections import Generation, MethodChoice, Train
from eval.engines import silenced
from eval.engines.torch import load_model

METHODS = "distill.methods"  # the registry: a file each
MODEL = "model"  # folder of a teacher that is a model of its own
OTHERS = ""  # the name of what stands in front of rows of every domain that has nothing of its own


@dataclass(frozen=True)
class Card:
    """Facts about a method that a reader needs in order to judge it."""

    title: str
    paper: str
    claim: str
    touches: str  # which part of the model or of its input it changes
    limits: str


@dataclass(frozen=True)
class TeacherOutput:
    """A teacher's distributions for a batch: log-probabilities, or hidden states with their heads.

    log_probs: [B, T, V] float32, normalised over V; position p predicts token p + 1.
    hidden, heads: K tensors [B, T, D_k] and K heads; the output is the mean of their distributions. A loss
        applies the heads chunk by chunk, so that no [B, T, V] is made.
    """

    log_probs: Tensor | None = None
    hidden: Sequence[Tensor] = ()
    heads: Sequence[Head] = ()

    def select(self, mask: Tensor) -> Dense | States:
        """The output at the N positions that are True in `mask` [B, T] bool, in row-major order."""
        if self.log_probs is not None:
            return Dense(self.log_probs[mask])
        return States([hidden[mask] for hidden in self.hidden], list(self.heads))

    def dense(self) -> Tensor:
        """[B, T, V] float32 log-probabilities of every position."""
        if self.log_probs is not None:
            return self.log_probs.float()
        shape = self.hidden[0].shape[:2]
        states = States([hidden.flatten(0, 1) for hidden in self.hidden], list(self.heads))
        return states.log_softmax(0, shape.numel()).unflatten(0, shape)


OutputFunction = Callable[[PreTrainedModel, Batch], TeacherOutput]


@dataclass(frozen=True)
class MethodContext:
    """Inputs of a method: its own folder, the plain bases, the training rows and the trainer."""

    folder: Path  # written by `fit`, read-only afterwards
    seed: int
    seeds: list[int]  # of the study
    bases: dict[int, Path]  # seed -> folder of the plain base
    tokenizer: PreTrainedTokenizerBase
    rows: Callable[[], Sequence[Row]]  # each is read when it is asked for
    train: Callable[[PreTrainedModel, Sequence[Row], Train, str], Curve]  # model, rows, settings, name
    load: Callable[[Path], PreTrainedModel] = load_model  # a running teacher: in the dtype of `targets`

    def load_base(self, seed: int) -> PreTrainedModel:
        return self.load(self.bases[seed])


class Method(ABC):
    """One file in `distill/methods`, or any `package.module` that holds exactly one subclass.

    A subclass must define `card` and `output`. The rest has defaults: nothing to fit, nothing to attach,
    one base of its own seed, and a plain teacher as its control.
    """

    card: ClassVar[Card]
    model: ClassVar[Literal["teacher", "base"]] = (
        "teacher"  # what it runs in: the study's teacher, or the base
    )
    only_prompt: ClassVar[bool] = False  # True: `in_front` is all it does, so that a server can carry it
    own_model: ClassVar[bool] = False  # True: `output` is of a model of its own, or of a changed teacher
    classifies: ClassVar[bool] = False  # True: it also goes with texts that are classified as a whole
    only_writes: ClassVar[bool] = False  # True: `write` is all it does: it needs targets.source: sequence

    def __init_subclass__(cls) -> None:
        """A class with an `output` of its own inherits no reading and writing that is made for another."""
        for name in ("reader", "write"):
            if "output" in vars(cls) and name not in vars(cls):
                setattr(cls, name, vars(Method)[name])

    class Settings(Frozen):
        """Accepted under `method.settings`."""

    def __init__(self, settings: Frozen) -> None:
        self.settings: Any = settings
        self.parts: Any = None
        self.below: OutputFunction | None = None  # in a chain: what the methods before it say

    def check_task(self, task: str) -> None:
        """Refuses, before any work, a study whose task it does not go with.

        Raises:
            UserError: texts are classified, and it changes how a text goes on.
        """
        if task == "classification" and not self.classifies:
            name = type(self).__module__.rpartition(".")[2]
            problem = "changes or continues a text that goes on, and texts are classified"
            others = [other for other in plugin_names(METHODS) if method_class(other).classifies]
            raise UserError(f"method {name}", problem, f"take one of {', '.join(others)}")

    def bases(self, seed: int, seeds: list[int]) -> list[int]:
        """Seeds of the plain bases from which the teacher of `seed` is built.

        Seeds with the same list share one teacher, which depends on those bases alone.
        """
        return [seed]

    def fit(self, context: MethodContext) -> None:
        """Trains or builds the parts of the method, and writes them into `context.folder`."""
        return None

    @property
    def fits(self) -> bool:
        """True if `fit` makes something: each seed then has a teacher of its own."""
        return type(self).fit is not Method.fit

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> Any:
        """What `output` needs beside the teacher, as `self.parts`: other models, texts in front, a memory."""
        return None

    @contextmanager
    def attached(self, teacher: PreTrainedModel, context: MethodContext) -> Iterator[None]:
        """The method is active inside; on exit the teacher is bit-identical to before.

        This default holds `load_parts` in `self.parts`; a method that changes the teacher overrides it.
        """
        self.parts = self.load_parts(teacher, context)
        try:
            yield
        finally:
            self.parts = None

    def model_output(self, model: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """What a model says by itself; in a chain, with the methods before this one."""
        return plain_output(model, batch=batch) if self.below is None else self.below(model, batch)

    def model_output_after(
        self, model: PreTrainedModel, batch: Batch, prefixes: Sequence[Prefix | None]
    ) -> TeacherOutput:
        """The same of rows that each stand after a prefix, or after nothing."""
        if self.below is None:
            return prefixed_output(model, batch, prefixes)
        log_probs: Tensor | None = None
        for rows, longer, size in put_in_front(batch, prefixes):
            outputs = self.below(model, longer).dense()[:, size:]
            if log_probs is None:
                log_probs = outputs.new_zeros(*batch.input_ids.shape, outputs.shape[-1])
            log_probs[rows] = outputs
        return TeacherOutput(log_probs)

    @abstractmethod
    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """The teacher's distribution of every token, in its own vocabulary, inside `attached`."""

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> NextLogProbs:
        """Log-probabilities of the token after rows that grow from `prompts` by a token between two calls.

        This default asks `output` about the whole rows, in a time that grows with the square of their length.
        Where `output` is forward passes of models, `CachedReader` keeps their keys and values, `reader_after`
        also those of texts in front.
        """

        @torch.no_grad()
        def next_log_probs(rows: list[Row]) -> Tensor:
            batch = collate(rows, 0).to(teacher.device)
            last = torch.zeros_like(batch.input_ids, dtype=torch.bool)
            last[:, -1] = True
            return self.output(teacher, batch).select(last).log_softmax(0, len(rows))

        return next_log_probs

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        """The token ids that the teacher generates after each prompt, inside `attached`.

        This default samples from `reader`. A method that votes or reranks overrides it; another seed gives
        other texts.

        Args:
            prompts: rows of one length; each text depends on its prompt and the seed alone.
            generation: at most `new_tokens` ids per text, including the stop id.
        """
        return sample_texts(self.reader(teacher, prompts), prompts, generation, seed, stop_ids(teacher))

    def in_front(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """Domain (or OTHERS) -> ids before each of its rows; with data.context they must fit the model."""
        return {}

    def tokens_in_front(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The most tokens that the teacher reads before a row."""
        return max(map(len, self.in_front(tokenizer).values()), default=0)

    def control(self) -> "Method":
        """The method of T0: the same base, budget and data without the idea under test."""
        return Plain(Frozen())

    @cached_property
    def identity(self) -> list[Any]:
        """What decides the teacher beside its base and its code: the class, the settings."""
        return [type(self).__qualname__, self.settings.model_dump(mode="json")]

    @cached_property
    def code(self) -> dict[str, str]:
        """Digests of its code, for the key of the teacher."""
        return plugin_code(type(self), Method)

    @cached_property
    def files(self) -> dict[str, str]:
        """The file of its module, and of those that it is made of -> SHA-256: where a teacher is from."""
        parts = vars(self).get("methods", [])  # of a chain
        kinds = [type(part) for part in (self, *parts) if isinstance(part, Method)]
        return {f"{k.__module__.replace('.', '/')}.py": file_sha256(Path(inspect.getfile(k))) for k in kinds}


class Plain(Method):
    """The teacher without a method."""

    card = Card(
        title="Plain teacher",
        paper="none",
        claim="none: every gain is measured against it",
        touches="nothing",
        limits="none",
    )
    only_prompt = True

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return self.model_output(teacher, batch)

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> NextLogProbs:
        return CachedReader([teacher], prompts)

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        return plain_texts(teacher, prompts, generation, seed)


class InFront(Method):
    """The plain teacher after tokens that stand in front of each row: a subclass defines `card`, `in_front`.

    They are run once, and their keys and values reused.
    """

    only_prompt = True

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> dict[str, Prefix]:
        ids = self.in_front(context.tokenizer)
        return {name: read_prefix(teacher, tokens) for name, tokens in ids.items()}

    def _prefixes(self, domains: Sequence[str]) -> list[Prefix | None]:
        return [self.parts.get(name, self.parts.get(OTHERS)) for name in domains]

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return self.model_output_after(teacher, batch, self._prefixes(batch.domains))

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> NextLogProbs:
        return reader_after(teacher, prompts, self._prefixes([row.domain for row in prompts]))


class Retrained(Method):
    """A teacher that is a model of its own: what `start` gives, trained on the training rows by `fit`.

    A subclass defines `card`, and `start` where that is not the base; its settings have `train`.
    """

    own_model = True
    card = Card("The base, trained longer", "none", "none: a control", "the weights", "none")

    class Settings(Frozen):
        train: Train

    def start(self, context: MethodContext) -> PreTrainedModel:
        """The model before it is trained."""
        return context.load_base(context.seed)

    def fit(self, context: MethodContext) -> None:
        model = self.start(context)
        context.train(model, context.rows(), self.settings.train, MODEL)
        with silenced("transformers"):
            model.save_pretrained(str(context.folder / MODEL))

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> PreTrainedModel:
        return context.load(context.folder / MODEL).to(teacher.device)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return plain_output(self.parts, batch=batch)

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> NextLogProbs:
        return CachedReader([self.parts], prompts)

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        return plain_texts(self.parts, prompts, generation, seed)


class PlainBase(Plain):
    """The student's own base, where the study names another teacher: the control of a method that is size."""

    model = "base"


def plain_output(*models: PreTrainedModel, batch: Batch, **inputs: Any) -> TeacherOutput:
    """The mean of the distributions of plain models, from one forward pass of each.

    Args:
        inputs: further arguments of the forward passes.

    Raises:
        UserError: the output embedding of a model is no plain linear layer (it has an adapter, for example).
    """
    hidden, heads = [], []
    for model in models:
        with capture_input(output_embedding(model)) as captured:
            model(**batch.inputs, **inputs, use_cache=False)
        hidden.append(captured[0])
        heads.append(head_of(model).detach(captured[0].dtype))
    return TeacherOutput(hidden=hidden, heads=heads)


def plain_texts(
    teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: object
) -> list[list[int]]:
    """What `Method.write` samples where `output` is `plain_output(teacher)`, with a key-value cache."""
    return generate_texts(teacher, prompts, generation, seed, pad=0)


def candidates(write: Callable[[object], list[list[int]]], seed: object, count: int) -> list[list[list[int]]]:
    """For each prompt `count` texts to choose from; the first is the one of `seed` itself.

    Args:
        write: seed -> a text for each prompt.
    """
    drawn = [write(f"{seed} {number}" if number else seed) for number in range(count)]
    return [list(texts) for texts in zip(*drawn, strict=True)]


def prefixed_output(
    model: PreTrainedModel, batch: Batch, prefix: Prefix | Sequence[Prefix | None]
) -> TeacherOutput:
    """The distributions of a plain model after tokens that stand in front of every row.

    Args:
        prefix: what `read_prefix` returned for this model; or one for each row, None where nothing stands.

    Raises:
        UserError: the output embedding of the model is no plain linear layer.
    """
    prefixes = [prefix] * len(batch.ids) if isinstance(prefix, Prefix) else prefix
    hidden = hidden_after(model, batch, prefixes)
    return TeacherOutput(hidden=[hidden], heads=[head_of(model).detach(hidden.dtype)])


def method_class(name: str) -> type[Method]:
    """The one subclass of Method in `distill/methods/<name>.py` or in the module `name`."""
    return plugin_class(METHODS, name, "method.name", Method, {"card": Card})


def make_method(choice: MethodChoice) -> Method:
    """The method that a study names, with its settings checked."""
    kind = method_class(choice.name)
    return kind(validate_config(kind.Settings, choice.settings, "method.settings"))
