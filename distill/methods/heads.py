"""More to predict in the teacher's training, then dropped: later tokens, or the next one early."""

from typing import Self

from pydantic import Field, model_validator

from distill.method import Card, Method, Retrained
from eval.core.config import Frozen
from eval.core.sections import Future, Train


class Heads(Retrained):
    card = Card(
        title="Multi-token prediction, or early exits",
        paper="Gloeckle et al. 2024, arXiv:2404.19737; heads: Cai et al. 2024, arXiv:2401.10774; "
        "exits: Lee et al. 2015, arXiv:1409.5185; as in LayerSkip: Elhoushi et al. 2024, arXiv:2404.16710",
        claim="a model that must also predict the tokens after the next one, or the next one from its middle "
        "layers, learns better features",
        touches="the training of the teacher: heads of their own for later tokens, dropped afterwards; exits "
        "have the model's own norm and head",
        limits="the first paper finds gains in large models, and losses in small ones; early exits can cost "
        "the last layer accuracy (Elbayad et al. 2020, arXiv:1910.10073)",
    )

    class Settings(Frozen):
        train: Train = Field(
            Train(future=Future(tokens=2)),
            description="how the teacher and its heads are trained",
        )

        @model_validator(mode="after")
        def has_heads(self) -> Self:
            if self.train.future is None and self.train.exits is None:
                problem = (
                    "`train.future` says which later tokens are predicted, `train.exits` which layers do"
                )
                raise ValueError(f"{problem}: one of them is the method")
            return self

    def control(self) -> Method:
        """The same training without the heads and exits."""
        train = self.settings.train.model_copy(update={"future": None, "exits": None})
        return Heads(self.settings.model_copy(update={"train": train}))
