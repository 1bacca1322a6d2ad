"""The file of a recipe: the passes that make a variant."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eval.core.config import FileName, Frozen, check_circle, find_config, read_yaml, validate_config
from eval.core.errors import UserError
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


def recipe_at(path: Path, chain: tuple[Path, ...] = ()) -> RecipeFile:
    """The recipe in a file, with the passes of those that it includes in their place."""
    recipe = validate_config(RecipeFile, read_yaml(path, "recipes"), str(path))
    passes: list[dict[str, Any]] = []
    for i, entry in enumerate(recipe.passes):
        if "include" not in entry:
            passes.append(entry)
            continue
        thing = f"config {path}: passes.{i}"
        if [*entry] != ["include"] or not isinstance(entry["include"], str):
            raise UserError(thing, repr(entry), "give `include: NAME` (or a path) and no other key")
        file = find_config("recipes", entry["include"], path)
        check_circle(path, file, chain, f"passes.{i}.include")
        included = recipe_at(file, (*chain, path))
        if included.target != recipe.target:
            fix = f"include recipes for {recipe.target}, the target of this one"
            raise UserError(f"{thing}.include", f"{entry['include']} is for {included.target}", fix)
        if included.calibration is not None:
            fix = "give it in the recipe that includes, and take it out there"
            raise UserError(f"{thing}.include", f"{entry['include']} has a calibration of its own", fix)
        passes += included.passes
    return recipe.model_copy(update={"passes": passes})
