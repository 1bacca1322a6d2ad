"""The one error that users see, and the one way an entry point ends."""

import argparse
import functools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import bidirectional, category

from safetensors import SafetensorError

EXIT_PASS, EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_ERROR = 0, 1, 2, 3
TURNING = {*("LRE", "RLE", "LRO", "RLO", "PDF"), *("LRI", "RLI", "FSI", "PDI")}  # the direction of writing
EXIT_PIPE = 141  # what a shell gives a program that SIGPIPE ended
EXITS = {"PASS": EXIT_PASS, "FAIL": EXIT_FAIL, "INCONCLUSIVE": EXIT_INCONCLUSIVE}  # of verdicts


class UserError(ValueError):
    """Bad input: names the thing, the problem with the value that was found, and the fix."""

    def __init__(self, thing: str, problem: object, fix: str) -> None:
        self.thing, self.problem, self.fix = thing, problem, fix
        super().__init__(f"{thing}: {problem}; {fix}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, object, str]]:
        """Errors cross from worker processes whole."""
        return type(self), (self.thing, self.problem, self.fix)


class Parser(argparse.ArgumentParser):
    """A command line that it does not take is bad input like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(self.prog, message, "--help lists what it takes")


def one_line(text: str) -> str:
    """Returns a text that a terminal or a page shows as the one line that it is.

    Raises:
        ValueError: something in it breaks the line, moves the cursor or turns the direction of writing.
    """
    for letter in text:
        if category(letter) in ("Cc", "Cs", "Zl", "Zp") or bidirectional(letter) in TURNING:
            raise ValueError(f"found {letter!r} in it, expected one line without control characters")
    return text


def require_installed(library: str, thing: str, fix: str) -> None:
    """Refuses what needs a library that is not installed.

    Args:
        library: a module, which may lie in a package: `optimum.intel`.
        thing: what needs it: a key of a config, an option, a file.

    Raises:
        UserError: it is not installed.
    """
    top = library.partition(".")[0]  # without it, the search for a module in it would be an error of its own
    if find_spec(top) is None or find_spec(library) is None:
        raise UserError(thing, f"needs {library}, which is not installed", fix)


def require_one_of(thing: str, value: str, accepted: list[str]) -> str:
    """Returns `value` if it is accepted, else raises with the nearest accepted name."""
    if value in accepted:
        return value
    near = get_close_matches(value, accepted, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(thing, repr(value), f"{hint}accepted: {', '.join(sorted(accepted))}")


EXPECTED = {  # kind of pydantic's error -> what was expected, from its context
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text; quote it",
    "list": "a list, such as [0, 1]",
    "tuple": "a list, such as [0, 1]",
    "dict": "keys with values, such as {{key: value}}",
    "model": "keys with values, such as {{key: value}}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "a name of letters, digits and . _ -, of which the first is a letter or digit",
}


def expected_text(error: Any) -> str:
    """What a validator of pydantic expected, as the fix of a `UserError`.

    Args:
        error: one of `ValidationError.errors()`.
    """
    kind = error["type"]
    text = EXPECTED.get(kind) or EXPECTED.get(kind.split("_")[0])
    if text is None:
        return str(error["msg"]).removeprefix("Value error, ")
    return f"expected {text.format(**error.get('ctx', {}))}"


def first_error(thing: object, error: Any, fix: str) -> UserError:
    """What is wrong first in a file that was read: the place in it, what is there, and what was expected.

    Args:
        error: a `ValidationError`.
    """
    first = error.errors()[0]
    place, value = ".".join(map(str, first["loc"])), first["input"]
    there = f"found {repr(value)[:40]}, " if place and isinstance(value, str | int | float | None) else ""
    return UserError(f"{thing}: {place or 'top level'}", there + expected_text(first), fix)


STOPPED = "stopped; the same command goes on where it was"


def _show_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C while a command imports its libraries is one line too; Python then ends with 130."""
    if issubclass(kind, KeyboardInterrupt):
        print(STOPPED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def entry(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wraps a command: bad input and failing disks end in one line on stderr and exit code 3."""

    @functools.wraps(main)
    def run() -> None:
        interrupts: list[int] = []
        _print_any_letter()
        try:
            with _noted(interrupts):
                code = main() or EXIT_PASS
                if sys.stdout is not None:
                    sys.stdout.flush()
        except KeyboardInterrupt:
            print(STOPPED, file=sys.stderr)
            code = 130
        except SystemExit as error:  # argparse ends with 2, which is the code of a verdict
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            code = EXIT_ERROR if error.code else EXIT_PASS
        except BrokenPipeError:  # whoever read our lines, such as `head`, has enough of them
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = EXIT_PIPE
        except Exception as error:  # must not read as FAIL
            if interrupts:  # a library made an error of it
                print(STOPPED, file=sys.stderr)
            else:
                _report_error(error)
            code = 130 if interrupts else EXIT_ERROR
        sys.exit(code)

    return run


def _print_any_letter() -> None:
    """A terminal may lack a letter: it shows a ? there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="replace")


@contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Adds to `interrupts` whenever Ctrl-C comes, which raises KeyboardInterrupt as ever."""
    usual = signal.default_int_handler
    if (
        signal.getsignal(signal.SIGINT) is not usual
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def note(number: int, frame: Any) -> None:
        interrupts.append(number)
        usual(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def attempt(run: Callable[..., Any], *args: Any) -> str:
    """Runs what the rest of a command does not need: the line of its error, empty if there was none."""
    try:
        run(*args)
    except Exception as error:
        return _error_line(error)
    return ""


def _report_error(error: Exception) -> None:
    """One line on stderr; the traceback of an error of this project or of a library goes to the log."""
    if isinstance(error, UserError | OSError | SafetensorError) or logging.getLogger("absorb").handlers:
        print(f"error: {_error_line(error)}", file=sys.stderr)
    else:
        traceback.print_exception(error)


def _error_line(error: Exception) -> str:
    """What an error says, in one line; its traceback goes to the log, or to stderr where there is none."""
    log, text = logging.getLogger("absorb"), str(error)
    if not isinstance(error, (UserError, OSError, SafetensorError)):  # the last one where a disk is full
        text = f"{type(error).__name__}: {error}"
        if not log.handlers:
            traceback.print_exception(error)
    if log.handlers and not isinstance(error, UserError):
        log.error("".join(traceback.format_exception(error)))
        text += f"; the traceback is in {getattr(log.handlers[0], 'baseFilename', 'the log')}"
    return " ".join(text.split())


def _is_command() -> bool:
    """Is this process one of our own commands, not a notebook or a script that imports us?"""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return path is not None and Path(path).resolve().is_relative_to(Path(__file__).resolve().parents[2])


if _is_command():
    sys.excepthook = _show_uncaught
