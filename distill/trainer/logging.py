"""Logs of training metrics to TensorBoard and other trackers, by accelerate's names for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from eval.core.errors import UserError, require_one_of

# How each tracker calls a run inside of a project, in the arguments that accelerate hands on.
RUN_NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}
SIMPLE = (str, int, float, bool)  # what every tracker takes as the value of a setting


class Log(Protocol):
    """Writes the metrics of one step."""

    def __call__(self, step: int, values: dict[str, float]) -> None: ...


def check_trackers(names: list[str]) -> None:
    """Refuses a tracker that accelerate does not know or that is not installed."""
    installed = {str(kind.value) for kind in get_available_trackers()}
    for name in names:
        require_one_of("trackers", name, list(LOGGER_TYPE_TO_CLASS))
        if name not in installed:
            raise UserError(
                "trackers", f"{name} is not installed", f"run `pip install {name}`, or leave it out"
            )


@contextmanager
def open_trackers(
    acc: Accelerator,
    names: list[str],
    folder: Path,
    run: str,
    fresh: bool,
    *,
    project: str = "",
    config: dict[str, Any] | None = None,
) -> Iterator[Log | None]:
    """The log of a run on the first process, with files in `folder / run`; None without trackers.

    Args:
        run: arm and seed, the name of the run inside of its project.
        fresh: the run starts at its first step: logs of an earlier one in that folder are deleted.
        project: name of the study.
        config: the settings of the study, stored with the run: one dotted name each.
    """
    if not names or not acc.is_main_process:
        yield None
        return
    if fresh:
        shutil.rmtree(folder / run, ignore_errors=True)
    trackers = [start_tracker(name, project, run, folder, config or {}) for name in names]

    def log(step: int, values: dict[str, float]) -> None:
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()


def make_tracker(name: str, project: str, run: str, folder: Path) -> GeneralTracker:
    """A tracker that was not started: accelerate takes its first argument for the project of most."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:  # files below `folder`, by run
        named = {"experiment": project} if name == "aim" else {}
        return kind(run, folder, **named)
    if name == "dvclive":
        return kind(project, dir=str(folder / run))
    return kind(project, **{RUN_NAMES[name]: run} if name in RUN_NAMES else {})


def start_tracker(name: str, project: str, run: str, folder: Path, config: dict[str, Any]) -> GeneralTracker:
    tracker = make_tracker(name, project, run, folder)
    tracker.start()
    if name == "comet_ml":
        tracker.tracker.set_name(run)
    values = {key: value if isinstance(value, SIMPLE) else json.dumps(value) for key, value in config.items()}
    if name == "tensorboard":  # its own way to store settings begins a second run beside this one
        rows = "".join(f"| {key} | {value} |\n" for key, value in values.items())
        tracker.tracker.add_text("study", f"| setting | value |\n|---|---|\n{rows}")
    elif values:
        tracker.store_init_configuration(values)
    return tracker
