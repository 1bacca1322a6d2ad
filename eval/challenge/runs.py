"""Trains and scores a study by its commands, each in a process of its own with a log."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from eval.core.artifacts import link_files, write_text
from eval.core.errors import UserError
from eval.core.study import Study, study_text

SHARED = ("data", "tokens", "base", "method", "targets", "students")  # of a run folder: known by their keys
COMMANDS = (("distill.train", "--config"), ("eval.score", "--study"))


def run_study(study: Study, path: Path | None = None) -> None:
    """Trains and scores a study; what is done already is found by its keys.

    Beside its run folder lie its settings, `NAME.yaml`, and what the commands printed, `NAME.log`.

    Args:
        path: a folder from which modules are imported too: the method's.

    Raises:
        UserError: a command ended with an error; its last line and the log are named.
    """
    config, log = (study.folder.with_name(f"{study.name}.{kind}") for kind in ("yaml", "log"))
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, study_text(study))
    places = [str(path)] if path else []
    places += [place for place in (os.environ.get("PYTHONPATH"),) if place]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    for module, flag in COMMANDS:
        with log.open("a", encoding="utf-8") as stream:
            start = stream.tell()
            words = [sys.executable, "-m", module, flag, str(config)]
            code = subprocess.run(words, stdout=stream, stderr=stream, env=env, check=False).returncode
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt  # a child is stopped with its parent, by Ctrl-C
        if code < 0:
            problem = f"{module} was ended by {signal.Signals(-code).name}"
            raise UserError(f"study {study.name}", problem, "free some memory, and run this again")
        if code:
            with log.open(encoding="utf-8", errors="replace") as stream:
                stream.seek(start)
                lines = stream.read().strip().splitlines() or [""]
            raise UserError(f"study {study.name}", f"{module} ended with {code}: {lines[-1]}", f"see {log}")


def share_artifacts(source: Path, run: Path) -> None:
    """Links the artifacts of another run: what has the same key is found, all else is made anew."""
    new = run.with_name(f".{run.name}")
    shutil.rmtree(new, ignore_errors=True)  # of a command that was killed
    folders = [source / name for name in SHARED]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    link_files(source, new, [str(path.relative_to(source)) for path in files])
    os.rename(new, run)
