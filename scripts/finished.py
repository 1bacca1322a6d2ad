"""Is there nothing left to do? `python scripts/finished.py --study STUDY [--mark]`, exit code 0 or 1.

Each stage recognises its own finished work by hash; this asks for all of them at once, and loads no model.
Anything that could matter, and has changed, sends the question back to the stages.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from compress.recipe import load_recipes
from distill.data.split import data_key
from distill.method import make_method
from distill.models.load import BASE_FILES, study_origins
from eval.core.artifacts import (
    FILE_HASHES,
    digest,
    file_sha256,
    library_versions,
    remembered_hashes,
    write_text,
)
from eval.core.budget import load_budget
from eval.core.checks import check_plan
from eval.core.commands import study_from_command
from eval.core.config import ROOT
from eval.core.errors import entry
from eval.core.study import Study, read_recipe
from eval.score.samples import task_digest_or_none

MARK = "finished"
LATER = {
    MARK,
    FILE_HASHES,
    ".lock",
    BASE_FILES,
    "log.txt",
    "gate.json",
    "gate-runs.jsonl",
    "table.md",
    "table.csv",
    "report.html",
}  # made from the rest, or made anew each time
AFTER = ("logs/", "signoff/", "release/", "records/test/")  # what people do with a finished run


def state(study: Study) -> str:
    """Digest of all that a finished run was made from, and of every file that it made."""
    recipes = [read_recipe(name)[1].model_dump(mode="json") for name in study.recipes]
    method = make_method(study.method)
    plugins = [method.code, method.control().code, *(recipe.code for recipe in load_recipes(study))]
    code = sorted(p for top in ("distill", "compress", "eval") for p in (ROOT / top).rglob("*.py"))
    # Without what is being written now: the verdict, beside this.
    present = (p for p in study.folder.rglob("*") if p.suffix != ".tmp" and p.is_file())
    every = {p.relative_to(study.folder).as_posix(): p for p in present}
    files = {name: p for name, p in every.items() if p.name not in LATER and not name.startswith(AFTER)}
    return digest(
        [
            study.model_dump(mode="json"),
            load_budget(study).model_dump(mode="json"),
            recipes,
            data_key(study).digest,
            study_origins(study),
            plugins,
            {name: task_digest_or_none(task) for name, task in study.data.tasks.items()},
            library_versions(),
            [file_sha256(p) for p in [*code, ROOT / "requirements.lock"]],
            remembered_hashes(dict(sorted(files.items())), study.folder / FILE_HASHES),
        ]
    )


@entry
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mark", action="store_true", help="note that everything is done now")
    study, args = study_from_command(parser, trained=False)
    check_plan(study)
    load_recipes(study)  # the options of their passes
    mark = study.folder / MARK
    if args.mark:
        write_text(mark, state(study) + "\n")
        return 0
    return 0 if mark.is_file() and mark.read_text().strip() == state(study) else 1


if __name__ == "__main__":
    main()
