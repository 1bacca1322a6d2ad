"""Further heads in the teacher's training, which predict later tokens and are then dropped."""

from typing import Self

from pydantic import Field, model_validator

from distill.method import Card, Method, Retrained
from eval.core.config import Frozen
from eval.core.sections import Future, Train


class Heads(Retrained):
    card = Card(
        title="Multi-token prediction",
        paper="Gloeckle et al. 2024, arXiv:2404.19737; heads as in Medusa: Cai et al. 2024, arXiv:2401.10774",
        claim="a model that must also predict the tokens after the next one learns better features",
        touches="the training of the teacher: heads of their own for later tokens, dropped afterwards",
        limits="the paper finds gains in large models, and losses in small ones",
    )

    class Settings(Frozen):
        train: Train = Field(
            Train(future=Future(tokens=2)),
            description="how the teacher and its heads are trained",
        )

        @model_validator(mode="after")
        def has_heads(self) -> Self:
            if self.train.future is None:
                raise ValueError("`train.future` says which later tokens are predicted: it is the method")
            return self

    def control(self) -> Method:
        """The same training without the heads."""
        train = self.settings.train.model_copy(update={"future": None})
        return Heads(self.settings.model_copy(update={"train": train}))
