"""The one error that users see, and the one way an entry point ends."""

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches

from safetensors import SafetensorError

EXIT_PASS, EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_ERROR = 0, 1, 2, 3
EXITS = {"PASS": EXIT_PASS, "FAIL": EXIT_FAIL, "INCONCLUSIVE": EXIT_INCONCLUSIVE}  # of verdicts


class UserError(ValueError):
    """Bad input: names the thing, the value that was found and the fix."""

    def __init__(self, thing: str, found: object, fix: str) -> None:
        self.thing, self.found, self.fix = thing, found, fix
        super().__init__(f"{thing}: {found}; {fix}")

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, object, str]]:
        """Errors cross from worker processes whole."""
        return type(self), (self.thing, self.found, self.fix)


def require_one_of(thing: str, value: str, accepted: list[str]) -> str:
    """Returns `value` if it is accepted, else raises with the nearest accepted name."""
    if value in accepted:
        return value
    near = get_close_matches(value, accepted, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(thing, repr(value), f"{hint}accepted: {', '.join(sorted(accepted))}")


def entry(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wraps a command: bad input and failing disks end in one line on stderr and exit code 3."""

    @functools.wraps(main)
    def run() -> None:
        try:
            code = main() or EXIT_PASS
        except (UserError, OSError, SafetensorError) as error:  # the last one where a disk is full
            text = " ".join(str(error).split())
            print(f"error: {text}", file=sys.stderr)
            code = EXIT_ERROR
        except KeyboardInterrupt:
            print("stopped; the same command continues where it was", file=sys.stderr)
            code = 130
        except SystemExit as error:  # argparse ends with 2, which is the code of a verdict
            code = EXIT_ERROR if error.code else EXIT_PASS
        except Exception as error:  # must not read as FAIL
            log = logging.getLogger("absorb")
            if log.handlers:
                log.error(traceback.format_exc())
                place = getattr(log.handlers[0], "baseFilename", "the log")
                text = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"error: {text}; the traceback is in {place}", file=sys.stderr)
            else:
                traceback.print_exc()
            code = EXIT_ERROR
        sys.exit(code)

    return run
