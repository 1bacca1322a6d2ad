"""`accelerate launch distill/train.py --config STUDY`: bases, teachers, students, with their scores."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

# The launcher puts distill/ first on the path and leaves the root out: put the root in its place.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from distill.launch import start_missing_processes  # noqa: E402
from eval.errors import entry  # noqa: E402
from eval.study import ended, make_folder, study_from_command  # noqa: E402
from eval.workers import locked  # noqa: E402


@entry
def main() -> None:
    start_missing_processes()
    study, _ = study_from_command(argparse.ArgumentParser(description=__doc__), trained=False)
    # Seconds to import: a mistake in the study is told before.
    from distill.loop import accelerator
    from distill.plan import base_jobs, prepare_inputs, run, student_jobs, teacher_jobs

    acc = accelerator()
    with locked(make_folder(study)) if acc.is_main_process else nullcontext():
        prepare_inputs(study, acc)
        run(study, [*base_jobs(study), *teacher_jobs(study), *student_jobs(study)], "train")
        if acc.is_main_process:
            ended(study)


if __name__ == "__main__":
    main()
