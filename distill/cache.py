"""`python -m distill.cache --config STUDY`: what every teacher of a study says, kept ahead of training."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

# A launcher that starts this file puts distill/ first on the path: put the root in its place.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.launch import start_missing_processes  # noqa: E402
from distill.lessons import check_kept  # noqa: E402
from distill.loop import accelerator  # noqa: E402
from distill.plan import base_jobs, prepare_inputs, run, teacher_jobs  # noqa: E402
from distill.teachers import teacher_groups, teacher_name  # noqa: E402
from eval.artifacts import read_manifest  # noqa: E402
from eval.errors import entry  # noqa: E402
from eval.study import Study, make_folder, study_from_command  # noqa: E402
from eval.workers import locked  # noqa: E402


def tell(study: Study) -> None:
    """One line per teacher: what is kept, how much of it, where."""
    for side, groups in teacher_groups(study).items():
        for seeds in groups.values():
            folder = study.folder / "targets" / teacher_name(side, seeds)
            manifest = read_manifest(folder)
            facts = manifest.facts
            print(
                f"{side} of seeds {', '.join(map(str, seeds))}: {facts['form']}, {facts['tokens']} tokens, "
                f"{facts['bytes_per_token']} bytes per token, {manifest.bytes / 2**20:.1f} MiB in {folder}"
            )


@entry
def main() -> None:
    start_missing_processes()
    study, _ = study_from_command(argparse.ArgumentParser(description=__doc__), trained=False)
    check_kept(study)
    acc = accelerator()
    with locked(make_folder(study)) if acc.is_main_process else nullcontext():
        prepare_inputs(study, acc)
        run(study, [*base_jobs(study), *teacher_jobs(study)], "cache")
        if acc.is_main_process:
            tell(study)


if __name__ == "__main__":
    main()
