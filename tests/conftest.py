"""The order of the suite, Ctrl-C as at a terminal, and a log that ends with its test."""

import logging
import signal

import pytest


def pytest_configure():
    """A shell starts what stands before an `&` with Ctrl-C ignored, and commands inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """The longest file first, so that the other process works through the rest beside it."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


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
