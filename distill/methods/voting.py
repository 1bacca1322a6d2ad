"""Several texts for each prompt, of which one is taught: by a vote of their answers, or by a score."""

import ast
import inspect
from collections import Counter
from functools import cached_property
from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.method import Card, MethodContext, Plain, candidates, plain_texts
from eval.core.artifacts import digest
from eval.core.config import Frozen, plugin_function
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections import Generation
from eval.syntax import normalize


def last_word(text: str) -> str | None:
    """The answer of a text that ends with it."""
    words = text.split()
    return words[-1].strip(".,;:!?") if words else None


class Voting(Plain):
    card = Card(
        title="Voting",
        paper="self-consistency: Wang et al. 2022, arXiv:2203.11171; best of n: Stiennon et al. 2020, "
        "arXiv:2009.01325; distilled: Yu et al. 2024, arXiv:2407.06023",
        claim="the text whose answer most of several give, or that a verifier prefers, is right more often",
        touches="the texts that the teacher writes, not its probabilities",
        limits="a gain of texts shows in tasks, not in bits per byte: both teachers have the same scores, "
        "and the gate cannot see it",
    )
    only_prompt = False
    only_writes = True

    class Settings(Frozen):
        samples: int = Field(8, gt=1, description="texts for each prompt; the first is that of the control")
        answer: str | None = Field(
            None,
            description="`package.module.function`: text -> its answer, or None if it has none; taught is "
            "the first text with the answer that most of them give",
        )
        score: str | None = Field(
            None,
            description="`package.module.function`: (prompt, text) -> a number; taught is the text with the "
            "largest one",
        )

        @model_validator(mode="after")
        def one_rule(self) -> Self:
            if (self.answer is None) == (self.score is None):
                raise ValueError("give exactly one of `answer` and `score`")
            return self

    def __init__(self, settings: Frozen) -> None:
        super().__init__(settings)
        key = "score" if self.settings.answer is None else "answer"
        self.function = plugin_function(getattr(self.settings, key), f"method.settings.{key}")

    @cached_property
    def identity(self) -> list[Any]:
        """The settings, and the code of the module that the function is in."""
        module = inspect.getmodule(self.function)
        assert module is not None
        return [*super().identity, digest(normalize(ast.parse(inspect.getsource(module))))]

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> PreTrainedTokenizerBase:
        return context.tokenizer

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        """Of `samples` texts for each prompt the one that wins.

        Raises:
            UserError: the temperature is 0: all would be the same.
        """
        if generation.temperature == 0:
            problem = "0, but voting needs texts that differ"
            raise UserError("targets.generation.temperature", problem, "set it above 0")
        written = candidates(
            lambda each: plain_texts(teacher, prompts, generation, each), seed, self.settings.samples
        )
        return [texts[self._winner(row, texts)] for row, texts in zip(prompts, written, strict=True)]

    def _winner(self, prompt: Row, texts: list[list[int]]) -> int:
        """The place of the text that is taught; the first one where none is better."""
        read = [self.parts.decode(tokens, skip_special_tokens=True) for tokens in texts]
        if self.settings.score is not None:
            asked = self.parts.decode(prompt.tokens, skip_special_tokens=True)
            scores = [float(self.function(asked, text)) for text in read]
            return scores.index(max(scores))
        answers = [self.function(text) for text in read]
        counts = Counter(answer for answer in answers if answer is not None)
        return answers.index(max(counts, key=counts.__getitem__)) if counts else 0
