"""The order of the suite, Ctrl-C as at a terminal, and a log that ends with its test."""

import logging
import signal

import pytest


def pytest_configure():
    """A shell starts what stands before an `&` with Ctrl-C ignored, and commands inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# A file is the work of one process: the long ones come first, so that at the end none waits for another.
LONGEST = ("pipeline", "challenge", "readme_example", "train", "signoff", "compare", "classification")


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def log_ends_with_its_test():
    """A command that ran inside a test opens the log of its run for the life of the process: close it."""
    yield
    log = logging.getLogger("absorb")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.NOTSET)
    log.propagate = True
