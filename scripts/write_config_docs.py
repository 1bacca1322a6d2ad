"""Writes docs/config.md from the configs' own fields: `python scripts/write_config_docs.py`."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from pydantic import BaseModel

from eval.core.artifacts import write_text
from eval.core.budget import Budget, Limit, Target
from eval.core.commands import describe_fields
from eval.core.config import ROOT
from eval.core.sections import Corruption, Source, Task
from eval.core.study import RecipeFile, Study

FILE = ROOT / "docs" / "config.md"
HEAD = """# Every key of a config

Written by `python scripts/write_config_docs.py` from the fields in `eval/core/`; a test holds it.

A key of a study can be set on the command line of every command as `--KEY VALUE`, such as
`--train.optimizer.lr 0.01`. Unknown keys are refused, with the nearest known one.

A study, a budget or a recipe may begin with `extends: NAME` (a file beside it, or in its folder of
`configs/`), a path, or a list of them. Mappings merge, everything else replaces; later files win over earlier
ones, and the file itself over all. A null takes an inherited key away. `name` and `title` are not inherited.
"""
RECIPE = """A file of `configs/recipes`.

`scripts/pipeline.sh` and `absorb compress` check the options of its passes before they do anything else.
`absorb train` alone does not: the machine that trains needs none of the packages of the passes."""
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


def config_docs() -> str:
    """The text of docs/config.md."""
    parts = [HEAD]
    for title, where, model in PARTS:
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default, meaning in describe_fields(model):
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
