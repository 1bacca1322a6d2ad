"""Local files that rows are read from: JSON Lines, CSV or text, in any encoding, plain or compressed."""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from eval.core.errors import UserError, require_installed

FORMATS = ("json", "csv", "text")  # that are read here; `datasets` reads the others
LONGEST_WINDOW = 2**31  # bytes that zstd may look back: `zstd --long=31` writes such files
BOMS = {  # the longer ones first: UTF-32 begins as UTF-16 does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNDECODABLE, NO_JSON = "not decodable", "not a JSON object"
MARK = "\udcff"  # stands for bytes that cannot be decoded: no text holds a lone surrogate
codecs.register_error("absorb.mark", lambda error: (MARK, error.end))  # type: ignore[attr-defined]


class Unusable(Exception):
    """A row of which no document can be made; `args[0]` is the reason by which such rows are counted."""

    @property
    def reason(self) -> str:
        return str(self.args[0])


RawRow = dict[str, Any] | Unusable  # a row, or why there is none


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where its name ends with .gz or .zst."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix != ".zst":
        return path.open("rb")
    return io.BufferedReader(_Zstandard(path), 2**18)


class _Zstandard(io.RawIOBase):
    """What lies packed in the frames of a file; one that ends within a frame is refused, not cut."""

    def __init__(self, path: Path) -> None:
        require_installed("zstandard", f"data source {path}", "run `pip install '.[data]'`")
        import zstandard

        unpacker = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
        self._new_frame = unpacker.decompressobj
        self._file, self._frame, self._left = path.open("rb"), self._new_frame(), memoryview(b"")
        self._is_within = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_within = self._new_frame(), False
            packed = packed or self._file.read(2**17)
            if not packed and self._is_within:
                raise EOFError("it ends in the middle of what was packed")
            if not packed:
                return 0
            self._is_within = True
            self._left = memoryview(self._frame.decompress(packed))
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _encoding(path: Path, encoding: str) -> str:
    """What the byte order mark at the start of a file says; without one, `encoding`."""
    with _open(path) as stream:
        start = stream.read(4)
    return next((name for mark, name in BOMS.items() if start.startswith(mark)), encoding)


def _broken(path: Path, error: Exception) -> UserError:
    problem = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"data source {path}", problem, "copy the file again, or pack it anew")


def _packing_errors() -> tuple[type[Exception], ...]:
    """What a damaged .gz or .zst raises while it is read."""
    module = sys.modules.get("zstandard")
    return (OSError, EOFError, zlib.error, *((module.ZstdError,) if module else ()))


def read_text(path: Path, encoding: str) -> str:
    """A whole file as it stands, line ends included, without its byte order mark.

    Raises:
        Unusable: it is not text of this encoding.
        UserError: it cannot be read or unpacked.
    """
    try:
        with _open(path) as stream:
            return stream.read().decode(_encoding(path, encoding))
    except UnicodeDecodeError as error:
        raise Unusable(UNDECODABLE) from error
    except _packing_errors() as error:
        raise _broken(path, error) from error


def text_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers; `MARK` stands where a byte cannot be decoded."""
    try:
        stream = io.TextIOWrapper(_open(path), _encoding(path, encoding), "absorb.mark", newline="\n")
        with stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except _packing_errors() as error:
        raise _broken(path, error) from error


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[int, RawRow]]:
    """Lines of one JSON object each, or one JSON list of objects."""
    lines = text_lines(path, encoding)
    first = next(lines, None)
    if first is not None and first[1].lstrip().startswith("["):
        try:
            rows = json.loads("".join([first[1], *(line for _, line in lines)]))
        except (ValueError, RecursionError) as error:
            fix = "write one JSON object a line, or one list of objects"
            raise UserError(f"data source {path}", f"a list that is not JSON: {error}", fix) from error
        yield from ((i, _require_object(row)) for i, row in enumerate(rows, start=1))
        return
    for number, line in [*([first] if first else [])]:
        yield number, _parse_line(line)
    for number, line in lines:
        yield number, _parse_line(line)


def _parse_line(line: str) -> RawRow:
    try:
        return _require_object(json.loads(line))
    except (ValueError, RecursionError):
        return Unusable(UNDECODABLE if MARK in line else NO_JSON)


def _require_object(row: Any) -> RawRow:
    return row if isinstance(row, dict) else Unusable(NO_JSON)


def _csv_rows(path: Path, encoding: str) -> Iterator[tuple[int, RawRow]]:
    """Rows below a line of column names; the number is that of the row."""
    csv.field_size_limit(sys.maxsize)
    try:
        name = _encoding(path, encoding)
        with io.TextIOWrapper(_open(path), name, "absorb.mark", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), start=1):
                yield number, Unusable("another number of columns") if None in row else dict(row)
    except csv.Error as error:
        raise UserError(f"data source {path}", f"not CSV: {error}", "save it as CSV again") from error
    except _packing_errors() as error:
        raise _broken(path, error) from error


def _line_rows(path: Path, encoding: str) -> Iterator[tuple[int, RawRow]]:
    """Every line is a text, without its end."""
    for number, line in text_lines(path, encoding):
        yield number, {"text": line.removesuffix("\n").removesuffix("\r")}


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, RawRow]]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "text": _line_rows,
}


def read_rows(path: Path, kind: str, encoding: str) -> Iterator[tuple[int, RawRow]]:
    """Number and content of every row of a file of one of `FORMATS`; a broken row is an `Unusable`.

    Raises:
        UserError: the file cannot be read or unpacked, or is no file of this format.
    """
    return READERS[kind](path, encoding)
