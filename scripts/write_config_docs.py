"""Writes docs/config.md from the configs' own fields: `python scripts/write_config_docs.py`."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pydantic import BaseModel

from compress.recipe import PASSES, pass_class
from distill.method import METHODS, method_class
from eval.core.artifacts import write_text
from eval.core.budget import Budget, Limit, Target
from eval.core.commands import describe_fields
from eval.core.config import ROOT, plugin_names
from eval.core.sections import Corruption, Source, Task, Train
from eval.core.sections.recipe import RecipeFile
from eval.core.study import Study

FILE = ROOT / "docs" / "config.md"
HEAD = """# Every key of a config

Written by `python scripts/write_config_docs.py` from the fields in the code; a test holds it.

A key of a study can be set on the command line of every command as `--KEY VALUE`, such as
`--train.optimizer.lr 0.01`. Unknown keys are refused, with the nearest known one.

A study, a budget or a recipe may begin with `extends: NAME` (a file beside it, or in its folder of
`configs/`), a path, or a list of them. Mappings merge, everything else replaces; later files win over earlier
ones, and the file itself over all. A null takes an inherited key away. `name` and `title` are not inherited.
"""
RECIPE = """A file of `configs/recipes`.

Every entry of `passes` is the name of a pass and its options, which stand below under that name. They are
checked before anything is trained; the packages that a pass needs are asked for where it runs."""
PARTS: list[tuple[str, str, type[BaseModel]]] = [
    ("Study", "A file of `configs/studies`.", Study),
    ("A source of documents", "An entry of `data.documents`, and of each slice in `data.shifted`.", Source),
    ("A corruption", "An entry of `data.corruptions`.", Corruption),
    ("A task", "A value of `data.tasks`.", Task),
    ("Recipe", RECIPE, RecipeFile),
    ("Budget", "A file of `configs/budgets`.", Budget),
    ("A target", "A value of `targets` in a budget.", Target),
    ("A limit", "A value of `limits` in a target.", Limit),
]


def plugins() -> list[tuple[str, str, type[BaseModel]]]:
    """As PARTS, of every method and every pass that has a setting."""
    methods: list[tuple[str, type[BaseModel]]] = [
        (name, method_class(name).Settings) for name in plugin_names(METHODS)
    ]
    passes: list[tuple[str, type[BaseModel]]] = [
        (name, pass_class(name).Options) for name in plugin_names(PASSES)
    ]
    parts = [(f"Method `{name}`", "Keys of `method.settings`.", settings) for name, settings in methods]
    parts += [
        (f"Pass `{name}`", f"Keys beside `pass: {name}` in a recipe.", options) for name, options in passes
    ]
    return [part for part in parts if part[2].model_fields]


def config_docs() -> str:
    """The text of docs/config.md."""
    parts = [HEAD]
    plugin_parts = plugins()
    for part in [*PARTS, *plugin_parts]:
        title, where, model = part
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        above: dict[type, str] = {Train: "`train` in a study"} if part in plugin_parts else {}
        for key, kind, default, meaning in describe_fields(model, shown=above):
            assert meaning, f"{title}: {key} has no description"
            shown = default if default in ("", "required", "none") else f"`{default}`"
            cells = (f"`{key}`", f"`{kind}`".replace("|", "\\|"), shown, meaning.replace("|", "\\|"))
            rows.append(f"| {' | '.join(cells)} |")
        parts.append(f"## {title}\n\n{where}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    write_text(FILE, config_docs())


if __name__ == "__main__":
    main()
