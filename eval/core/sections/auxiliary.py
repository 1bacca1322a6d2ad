"""What a model predicts beside the next token while it is trained, and is not exported."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from eval.core.config import Frozen


class Future(Frozen):
    """Further heads that predict the tokens after the next one, in training alone: they are not exported."""

    tokens: int = Field(1, gt=0, description="how many tokens further ahead are predicted, by a head each")
    weight: float = Field(0.3, gt=0, description="factor of their cross-entropy in the loss")


class Exits(Frozen):
    """Middle layers that predict the next token too, in training alone, by the model's own norm and head."""

    layers: list[Annotated[int, Field(gt=0)]] = Field(
        min_length=1, description="their numbers: 1 is the first, the last one is no middle layer"
    )
    weight: float = Field(0.3, gt=0, description="factor of their cross-entropy in the loss")

    @model_validator(mode="after")
    def layers_differ(self) -> Self:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers are {self.layers}; give each layer once")
        return self
