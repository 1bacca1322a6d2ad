"""Methods one after another: each acts on what those before it say."""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.method import Card, Method, MethodContext, OutputFunction, TeacherOutput, make_method
from eval.core.config import Frozen
from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.core.sections import MethodChoice


class Chain(Method):
    card = Card(
        title="Chain of methods",
        paper="several components in one teacher: see the cards of its methods",
        claim="methods that each help, help more together",
        touches="what its methods touch",
        limits="every method is fitted to the plain base, and not to those before it; no key-value cache",
    )

    class Settings(Frozen):
        methods: list[MethodChoice] = Field(
            min_length=2, description="`name` and `settings` of each, the one next to the model first"
        )
        tested: int | None = Field(
            None,
            ge=0,
            description="number of the one, from 0, that alone the control replaces by its control; none: it "
            "replaces all",
        )

    def __init__(self, settings: Frozen, replaced: Collection[int] = ()) -> None:
        """`replaced`: numbers of the methods in whose place their controls stand."""
        super().__init__(settings)
        methods = [make_method(choice) for choice in self.settings.methods]
        if self.settings.tested is not None and self.settings.tested >= len(methods):
            problem = f"{self.settings.tested}, but methods are numbered 0 to {len(methods) - 1}"
            raise UserError("method.settings.tested", problem, "give one of these")
        self.methods = [m.control() if i in replaced else m for i, m in enumerate(methods)]
        for place, (choice, method) in enumerate(zip(self.settings.methods, self.methods, strict=True)):
            self._check(place, choice.name, method)
            if place:
                method.below = self._below(self.methods[place - 1], choice.name)

    @staticmethod
    def _check(place: int, name: str, method: Method) -> None:
        thing = f"method.settings.methods.{place}"
        if method.only_writes or method.model == "base":
            problem = (
                f"{name} {'writes texts' if method.only_writes else 'is the choice of a model'} and no more"
            )
            raise UserError(thing, problem, "leave it out of the chain")
        if method.own_model and place:
            raise UserError(thing, f"{name} speaks by a model of its own", "put it first")

    def _below(self, previous: Method, name: str) -> OutputFunction:
        """What a method says to the next one, which is called `name`."""

        def model_output(model: PreTrainedModel, batch: Batch) -> TeacherOutput:
            if previous.own_model and model is not self.parts:
                problem = f"{name} runs several models, and the method before it has one of its own"
                raise UserError("method chain", problem, "leave one of the two out")
            return previous.output(model, batch)

        return model_output

    def control(self) -> Method:
        """The chain of the controls, or that in which only the one under test is replaced by its control."""
        tested = self.settings.tested
        return Chain(self.settings, range(len(self.methods)) if tested is None else [tested])

    @cached_property
    def identity(self) -> list[Any]:
        return [type(self).__qualname__, *(method.identity for method in self.methods)]

    @cached_property
    def code(self) -> dict[str, str]:
        each = [method.code for method in self.methods]
        return super().code | {
            f"{i}.{name}": code for i, own in enumerate(each) for name, code in own.items()
        }

    def bases(self, seed: int, seeds: list[int]) -> list[int]:
        return sorted({base for method in self.methods for base in method.bases(seed, seeds)})

    def tokens_in_front(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return sum(method.tokens_in_front(tokenizer) for method in self.methods)

    @property
    def fits(self) -> bool:
        return any(method.fits for method in self.methods)

    def _own(self, context: MethodContext, place: int) -> MethodContext:
        """The context of one method: a folder of its own, and names of trainings of its own."""

        def train(model: Any, rows: Any, config: Any, name: str) -> Any:
            return context.train(model, rows, config, f"{place}-{name}")

        return replace(context, folder=context.folder / str(place), train=train)

    def fit(self, context: MethodContext) -> None:
        for place, method in enumerate(self.methods):
            if method.fits:
                own = self._own(context, place)
                own.folder.mkdir()
                method.fit(own)

    @contextmanager
    def attached(self, teacher: PreTrainedModel, context: MethodContext) -> Iterator[None]:
        self.parts = teacher
        try:
            with ExitStack() as stack:
                for place, method in enumerate(self.methods):
                    stack.enter_context(method.attached(teacher, self._own(context, place)))
                yield
        finally:
            self.parts = None

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return self.methods[-1].output(teacher, batch)
