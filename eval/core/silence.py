"""Keeps progress bars and log lines of libraries off the terminal: what is wrong is raised instead."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Inside, the loggers `names` and all below them report errors only, and transformers shows no bars."""
    from transformers.utils import logging as transformers_logging

    below = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in names]
    levels = {logger: logger.level for logger in map(logging.getLogger, {*names, *below})}
    with_bars = transformers_logging.is_progress_bar_enabled()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if with_bars:
            transformers_logging.enable_progress_bar()
