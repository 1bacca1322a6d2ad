"""The file of a recipe: the passes that make a variant."""

from typing import Any, Literal

from pydantic import Field

from eval.core.config import FileName, Frozen
from eval.core.sections.source import Source


class Calibration(Frozen):
    """Rows that passes calibrate on, in place of training rows."""

    documents: list[Source] = Field(
        min_length=1, description="sources of them; one document of each in turn is taken"
    )
    rows: int = Field(128, gt=0, description="rows that are made of them, at most")


class RecipeFile(Frozen):
    """A file of configs/recipes."""

    name: FileName = Field(description="name of the variant, in every table")
    target: Literal["cpu", "gpu"] = Field(description="kind of machine that the variant runs on")
    passes: list[dict[str, Any]] = Field(
        min_length=1, description="in order: `pass: NAME` and its options, or `include: RECIPE`"
    )
    calibration: Calibration | None = Field(None, exclude_if=lambda value: value is None)
