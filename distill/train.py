"""Trains a study: data, bases, teachers with their targets, students, each with its scores.

`accelerate launch distill/train.py --config STUDY [--until STAGE] [--KEY VALUE ...]`; several processes on a
CPU: `torchrun --nproc_per_node 2 distill/train.py --config STUDY`. Finished artifacts are kept.
"""

import os
import sys
from pathlib import Path

# A launcher puts distill/ first on the path and leaves the root out: put the root in its place.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from compress.recipe import load_recipes
from eval.core.checks import check_plan
from eval.core.commands import new_parser, start_log, study_from_command
from eval.core.errors import UserError, entry, require_one_of
from eval.core.study import Study, make_run_folder

# What --accept-old may name.
TRAINED = ("data", "tokenizer", "tokens", "base", "method", "targets", "student")
STAGES = ("data", "bases", "teachers", "students")


def check_processes() -> None:
    """Refuses a launch of several processes of which only one was started.

    Where there are not so many GPUs and no MPI host file, `accelerate launch --num_processes N` (1.15) starts
    one process. It sets the address of a process group but neither rank nor size: that process would train
    as if it were the only one.
    """
    several = (
        "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    )  # the first: by that way alone
    mpi_launch = any(name.startswith(("OMPI_", "PMI_")) for name in os.environ)
    if several and "RANK" not in os.environ and not mpi_launch:
        raise UserError(
            "accelerate launch",
            "started only one of several processes",
            "use `torchrun --nproc_per_node N distill/train.py ...` for N processes on a CPU",
        )


def check_stages(study: Study) -> None:
    """Refuses before anything is trained what a later stage would refuse: the budget, recipes, lengths.

    Raises:
        UserError: one of them cannot be read, or does not fit.
    """
    check_plan(study)
    load_recipes(study, runs_here=False)


def distil(study: Study, until: str = STAGES[-1]) -> Path:
    """Checks a study, then trains it as this command does, up to a stage; returns its run folder.

    Args:
        until: `data`, `bases`, `teachers` (with their targets) or `students`.

    Raises:
        UserError: the study cannot be trained; what can be known early is refused before anything is made.
    """
    if not isinstance(study, Study):
        raise UserError("study", repr(study)[:60], "give what `load_study` returns")
    require_one_of("until", str(until), list(STAGES))
    check_stages(study)
    from distill.pipeline import train_study

    return train_study(study, until)


@entry
def main() -> None:
    check_processes()
    parser = new_parser(__doc__)
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    study, args = study_from_command(parser, trained=False, stages=TRAINED)
    check_stages(study)
    start_log(make_run_folder(study))
    # This import takes seconds: a mistake in the study is reported before it.
    from distill.pipeline import train_study

    train_study(study, args.until)


if __name__ == "__main__":
    main()
