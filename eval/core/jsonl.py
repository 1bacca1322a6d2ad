"""JSON Lines that people write: one value a line, and every mistake told by its file and line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.core.errors import UserError

Line = tuple[str, int, str]  # where it is, its number, and what it says


def lines(path: Path, thing: str, fix: str) -> Iterator[Line]:
    """The lines of a UTF-8 file that hold anything; `fix` says what a file that is not there should be.

    Raises:
        UserError: there is no such file, it is not UTF-8, or no line of it holds anything.
    """
    if not path.is_file():
        raise UserError(thing, f"no such file: {path}", fix)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{thing} {path}", "not UTF-8", "save it as UTF-8") from error
    numbered = enumerate(text.split("\n"), start=1)  # and not splitlines: JSON may hold U+2028
    found = [(f"{path}, line {number}", number, line) for number, line in numbered if line.strip()]
    if not found:
        raise UserError(f"{thing} {path}", "the file is empty", fix)
    yield from found


def objects(path: Path, thing: str, fix: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The same, each line a JSON object.

    Raises:
        UserError: as above, or a line is no JSON object.
    """
    for where, number, line in lines(path, thing, fix):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(where, f"not JSON ({error})", "write one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(where, type(row).__name__, "write one JSON object a line")
        yield where, number, row
