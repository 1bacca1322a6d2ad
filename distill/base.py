"""`python -m distill.base --config STUDY`: data, tokenizer and the plain base of every seed."""

import argparse

from eval.errors import entry
from eval.study import make_folder, study_from_command
from eval.workers import locked


@entry
def main() -> None:
    study, _ = study_from_command(argparse.ArgumentParser(description=__doc__), trained=False)
    # Seconds to import: a mistake in the study is told before.
    from distill.loop import accelerator
    from distill.plan import base_jobs, prepare_inputs, run

    acc = accelerator()
    with locked(make_folder(study)):
        prepare_inputs(study, acc)
        run(study, base_jobs(study), "base")


if __name__ == "__main__":
    main()
