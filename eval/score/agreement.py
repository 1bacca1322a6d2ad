"""How far every variant says what its uncompressed student says: `python -m eval.score.agreement`.

Flips are the share of next tokens whose likeliest prediction differs; KL(student || variant) is told in bits
per token. Beside them stands what the same variant differs by from itself in another batch and with other
threads. Variants that have a record of the same bytes, student, data and study are left alone.
"""

import argparse

from rich.console import Console
from rich.table import Table

from eval.core.artifacts import read_manifest
from eval.core.errors import entry
from eval.core.gate_file import Difference
from eval.core.jobs import Job, lock_folder, run_jobs
from eval.core.recipes import recipe_names
from eval.core.records import read_agreements
from eval.core.study import Study, study_from_command
from eval.engines import subject_of
from eval.score.divergence import agreement, compare_folder, uncompared, variant_folders


def compare_run(study: Study) -> int:
    """Compares what has not been compared yet; returns how many variants that were."""
    run = study.folder
    jobs = [
        Job(subject_of(read_manifest(folder)).label, compare_folder, (run, study, folder))
        for folder in uncompared(run, study)
    ]
    run_jobs("agreement", jobs, study.workers)
    return len(jobs)


def table(study: Study) -> Table:
    shown = Table("recipe", "flips", "noise", "KL", "noise", title="against the student, 95 % intervals")
    records = read_agreements(study.folder)
    for recipe in recipe_names(study)[1:]:
        flips, kl = agreement([r for r in records if r.recipe == recipe], study.seeds)
        if flips and kl:
            cells = [
                _cell(flips, 100, " %"),
                f"{100 * flips.floor:.3g} %",
                _cell(kl, 1, ""),
                f"{kl.floor:.3g}",
            ]
            shown.add_row(recipe, *cells)
    return shown


def _cell(of: Difference, factor: float, unit: str) -> str:
    if of.low is None or of.high is None:
        return f"{factor * of.value:.3g}{unit}"
    return f"{factor * of.value:.3g}{unit} [{factor * of.low:.3g}, {factor * of.high:.3g}]"


@entry
def main() -> None:
    study, _ = study_from_command(argparse.ArgumentParser(description=__doc__))
    read_manifest(study.folder / "data")  # a run that has none ends here, before anything is written
    with lock_folder(study.folder):
        done = compare_run(study)
    Console().print(table(study))
    print(
        f"compared {done} variants, {len(variant_folders(study.folder, study)) - done} were compared before"
    )


if __name__ == "__main__":
    main()
