"""`python -m eval.score --study runs/X`: bits per byte of every base, student and variant of a run.

Each model is loaded from its folder by its own engine, in a process that did not make it. Models that have
a record of the same bytes, data and study are left alone. Teachers with a method are scored where they are
made, by `distill`: only there can they be run.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.artifacts import read_manifest
from eval.engines import subject_of
from eval.errors import entry
from eval.records import Score, read_scores
from eval.scoring import corpus_bits_per_byte, model_folders, score_folder, unscored
from eval.study import Study, study_from_command
from eval.workers import Job, Report, locked, run_jobs


def score_run(study: Study) -> int:
    """Scores what has no score yet; returns how many models that were."""
    run = study.folder
    folders = unscored(run, study)
    jobs = [Job(_label(folder), _score, (run, study, folder)) for folder in folders]
    run_jobs("score", jobs, study.workers)
    return len(jobs)


def _label(folder: Path) -> str:
    return subject_of(read_manifest(folder)).label


def _score(run: Path, study: Study, folder: Path, report: Report) -> None:
    score_folder(run, study, folder, report)


def table(records: list[Score]) -> Table:
    rows = corpus_bits_per_byte(records)
    slices = sorted({name for row in rows.values() for name in row}, key=lambda n: (n != "heldout", n))
    shown = Table("recipe", "arm", *slices, title="bits per byte, lower is better")
    for (recipe, arm), row in rows.items():
        shown.add_row(recipe, arm, *(f"{row[name]:.4f}" for name in slices))
    return shown


@entry
def main() -> None:
    study, _ = study_from_command(argparse.ArgumentParser(description=__doc__))
    read_manifest(study.folder / "data")  # a run that has none ends here, before anything is written
    with locked(study.folder):
        done = score_run(study)
    if done:
        Console().print(table(read_scores(study.folder)))
    print(f"scored {done} models, {len(model_folders(study.folder, study)) - done} were scored before")


if __name__ == "__main__":
    main()
