"""Logs of training metrics to TensorBoard and other trackers, by accelerate's names for them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from eval.core.errors import UserError, require_one_of


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
    acc: Accelerator, names: list[str], folder: Path, run: str, fresh: bool
) -> Iterator[Log | None]:
    """The log of a run on the first process, with files in `folder / run`; None without trackers.

    Args:
        fresh: the run starts at its first step: logs of an earlier one in that folder are deleted.
    """
    if not names or not acc.is_main_process:
        yield None
        return
    if fresh:
        shutil.rmtree(folder / run, ignore_errors=True)
    trackers = [_start_tracker(name, run, folder) for name in names]

    def log(step: int, values: dict[str, float]) -> None:
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()


def _start_tracker(name: str, run: str, folder: Path) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(run, folder) if kind.requires_logging_directory else kind(run)
    tracker.start()
    return tracker
