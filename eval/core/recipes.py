"""Files of configs/recipes: which variants a study asks for. `compress` makes them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from eval.core.errors import UserError
from eval.core.records import PLAIN
from eval.core.sections import Frozen
from eval.core.study import Study, find_config, read_yaml, validate_config


class RecipeFile(Frozen):
    """A file of configs/recipes."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="of the variant, in every table")
    target: Literal["cpu", "gpu"] = Field(description="kind of machine that the variant runs on")
    passes: list[dict[str, Any]] = Field(min_length=1, description="`pass: NAME` and its options, in order")


def read_recipe(name: str) -> tuple[Path, RecipeFile]:
    """A recipe of configs/recipes by name, or from the path of a YAML file, and where it lies.

    Raises:
        UserError: names the file, the key and what is accepted.
    """
    path = find_config("recipes", name)
    found = validate_config(RecipeFile, read_yaml(path), str(path))
    if found.name == PLAIN:
        raise UserError(
            f"{path}: name", repr(PLAIN), "this name means the uncompressed student; take another"
        )
    return path, found


def recipe_names(study: Study) -> list[str]:
    """Names of the study's variants, the uncompressed student first.

    Raises:
        UserError: two have one name, or a file is not a recipe.
    """
    names = [PLAIN]
    for recipe in study.recipes:
        path, found = read_recipe(recipe)
        if found.name in names:
            raise UserError(f"{path}: name", repr(found.name), "another recipe has it: rename it")
        names.append(found.name)
    return names


def prefixes(study: Study) -> dict[str, list[str]]:
    """Recipe -> the recipes of the study whose passes it begins with, the shortest first."""
    passes = {found.name: found.passes for _, found in map(read_recipe, study.recipes)}
    return {
        name: sorted(
            (other for other, first in passes.items() if len(first) < len(of) and of[: len(first)] == first),
            key=lambda other: len(passes[other]),
        )
        for name, of in passes.items()
    }
