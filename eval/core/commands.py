"""What all commands share: the study of a command line, its keys in `--help`, `--json`, and the run's log."""

import argparse
import json
import logging
import math
import os
import re
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from eval.core.artifacts import MANIFEST, parse_stages, tool_text, write_text
from eval.core.errors import Parser, UserError, one_line
from eval.core.study import Study, check_trained, is_run, load_study

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120  # columns of a table at most, and where nobody can tell, e.g. in a log
STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow"}  # of verdicts, on a terminal
LOG = "log.txt"
MARKS = (MANIFEST, "rollout.json")  # what the folder of an artifact or a release has, and that of a rollout
TYPED = "ABSORB_TYPED"  # environment variable: the command as it was typed, where `absorb` started it
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
CURSOR = re.compile(r"\x1b\[|\r(?!\n)")  # what draws a progress bar, and is no line


def level_text(level: float) -> str:
    """`90 %`, and `97.5 %` where it is not whole."""
    return f"{100 * level:.4g} %"


def stamp_line(what: str, time: str = "", tool: str = "") -> str:
    """When and by what a table was made: `judged on 2026-01-02 by absorb 0.9.0 (0123456789ab)`.

    Args:
        time: ISO 8601; now, and `tool` this very project, where they are not given.
    """
    return f"{what} on {(time or datetime.now(UTC).isoformat())[:10]} by {tool or tool_text()}"


def new_console() -> "Console":
    """Where tables are printed: as wide as the terminal, and never wider than `WIDTH`."""
    from rich.console import Console

    width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout and sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False)


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows `doc` as it is written, and is called after the command as it was typed."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = f"python -m {spec.name.removesuffix('.__main__')}" if spec else f"python {sys.argv[0]}"
    name = os.environ.get(TYPED, module)
    return Parser(prog=name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


MOST_DIGITS = 15  # of a count: float64 holds each


def positive(text: str) -> float:
    """The type of a flag that takes a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def count(text: str) -> int:
    """The type of a flag that takes a whole number from 1 on."""
    if not text.isdecimal() or len(text) > MOST_DIGITS or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, expected a whole number, 1 or more")
    return int(text)


def text_line(text: str) -> str:
    """The type of a flag that takes a name or a reason: one line of text, wherever it is shown."""
    try:
        return one_line(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def describe_fields(
    model: type[BaseModel], path: str = "", shown: dict[type, str] | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of every field below `model`; a section is shown once."""
    sections = {name: _section(field) for name, field in model.model_fields.items()}
    shown = {} if shown is None else shown
    for name, section in sections.items():
        if section is not None:
            shown.setdefault(section, f"{path}{name}")
    hints = get_type_hints(model)  # without the constraints on the values
    for name, field in model.model_fields.items():
        if field.exclude:  # set by a flag of its own
            continue
        key, section = f"{path}{name}", sections[name]
        meaning = field.description or (" ".join((section.__doc__ or "").split()) if section else "")
        if section is not None and shown[section] != key:
            meaning = f"{meaning.rstrip('.')}. Its keys are those of {shown[section]}."
        yield key, _type_text(hints[name]), _default_text(field), meaning
        if section is not None and shown[section] == key:
            yield from describe_fields(section, f"{key}.", shown)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, itself or as one of a union."""
    kinds = [field.annotation]
    if get_origin(field.annotation) in (Union, types.UnionType):
        kinds = list(get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _type_text(kind: Any) -> str:
    text = str(kind) if get_origin(kind) else getattr(kind, "__name__", "")
    text = re.sub(
        r"\b(?:typing|eval|distill|compress|pathlib|annotated_types)\.[\w.]*?(?=\w+\b(?!\.))", "", text
    )
    return text.replace("NoneType", "None")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return ""
    if isinstance(value, BaseModel):
        return ""
    return "none" if value is None else json.dumps(value, default=str)


def keys_help(model: type[BaseModel]) -> str:
    """The keys of a study as `--help` shows them."""
    lines = ["keys of the study, each of which can be set as --KEY VALUE:"]
    for key, kind, default, meaning in describe_fields(model):
        shown = f"{kind}, {default}" if default else kind
        lines += [f"  --{key}  ({shown})", *([f"        {meaning}"] if meaning else [])]
    return "\n".join(lines)


def study_from_command(
    parser: argparse.ArgumentParser,
    trained: bool = True,
    measures: bool = False,
    stages: tuple[str, ...] = (),
) -> tuple[Study, argparse.Namespace]:
    """Parses `--study` (see `find_study`), the parser's own flags and overrides of its keys.

    Args:
        trained: the settings must be those that made the run folder.
        measures: the command also takes `--json FILE`, for `write_json`.
        stages: the command makes artifacts of these and takes `--accept-old`.
    """
    add_study(parser, required=trained is False)
    if measures:
        add_json(parser)
    if stages:
        about = "keep artifacts that other versions of the code or of libraries made from the same settings"
        parser.add_argument("--accept-old", metavar="STAGES", help=f"{about}: {','.join(stages)} or all")
    add_keys_help(parser)
    known, words = parser.parse_known_args()
    names = [word.partition("=")[0] for word in words]
    if known.study is None and (typo := next((n for n in names if get_close_matches(n, ["--study"])), None)):
        raise UserError(parser.prog, f"no option {typo}", "did you mean --study? --help lists what it takes")
    study = load_study(known.study, words)
    if stages and known.accept_old is not None:
        study = study.model_copy(update={"accept_old": parse_stages(known.accept_old, stages)})
    if trained:
        check_trained(study)
        start_log(study.folder)
    return study, known


def add_study(parser: argparse.ArgumentParser, required: bool = False) -> None:
    here = "" if required else " (default: the run folder that this is called in)"
    about = f"a study's YAML file, its name in configs/studies, or a run folder{here}"
    parser.add_argument("--config", "--study", dest="study", metavar="STUDY", required=required, help=about)


def add_keys_help(parser: argparse.ArgumentParser) -> None:
    """Lets `--help` list every key of a study that may be overridden, above the command's own options."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        about = parser.description or ""
        parser.description = f"{about.rstrip()}\n\n{keys_help(Study)}"


class NewFile(argparse.Action):
    """A path to write to. A file there is deleted at once: after an error it would pass for the result.

    Raises:
        UserError: it is a folder, a file of a run, an artifact, a release or a rollout, or named twice: what
            a command reads is no place for what it writes.
    """

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, path: Any, option: str | None = None
    ) -> None:
        if path.is_dir():
            raise UserError(f"{option} {path}", "is a folder", "give the path of a file")
        if not _is_stream(path):
            path = path.resolve()  # the file behind a link is replaced, not the link
            fix = "give a path outside of it, or delete the file first"
            if path.exists() and any(map(is_run, path.parents)):
                raise UserError(f"{option} {path}", "is a file of a run", fix)
            if path.exists() and any((folder / mark).is_file() for folder in path.parents for mark in MARKS):
                raise UserError(f"{option} {path}", "is a file of an artifact, a release or a rollout", fix)
            words = [word.partition("=")[2] if word[:1] == "-" else word for word in sys.argv[1:]]
            if path.exists() and sum(os.path.exists(w) and os.path.samefile(w, path) for w in words) > 1:
                problem = "is named twice: one of them would replace the other"
                raise UserError(f"{option} {path}", problem, "give a path of its own")
            path.unlink(missing_ok=True)
        setattr(namespace, self.dest, path)


def _is_stream(path: Path) -> bool:
    """True for what is written in place: a device, a pipe, or the file that this process prints to."""
    printed_to = [stream.fileno() for stream in (sys.__stdout__, sys.__stderr__) if stream is not None]
    return path.exists() and (
        not path.is_file() or any(os.path.samestat(path.stat(), os.fstat(number)) for number in printed_to)
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Takes `--json FILE`, for `write_json`."""
    about = "also write the result to this file, as JSON"
    parser.add_argument("--json", type=Path, action=NewFile, metavar="FILE", help=about)


def write_json(path: Path | None, result: Any) -> None:
    """Writes what a command found, a file whole or not at all; nothing where no file was asked for."""
    if path is None:
        return
    text = json.dumps(_plain(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    if _is_stream(path):
        sys.stdout.flush()  # the result may follow what was printed
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
    else:
        write_text(path, text)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {" ".join(k) if isinstance(k, tuple) else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


class _Copied:
    """A stream whose whole lines also go to the log; what draws a progress bar does not."""

    def __init__(self, stream: TextIO, log: logging.Logger) -> None:
        self._stream, self._log, self._open = stream, log, ""

    def write(self, text: str) -> int:
        plain = COLOURS.sub("", text)
        if not CURSOR.search(plain):
            *lines, self._open = (self._open + plain).split("\n")
            for line in lines:
                if line.strip():
                    self._log.info(line.rstrip())
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LogFile(logging.FileHandler):
    """`log.txt`. Where it cannot be written, one warning is printed, and the command goes on without it."""

    def __init__(self, path: Path, terminal: TextIO) -> None:
        super().__init__(path, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
        self.terminal = terminal
        self.start_in_worker = partial(start_log, path.parent, worker=True)

    def handleError(self, record: logging.LogRecord) -> None:
        """Replaces the method that prints to `sys.stderr`, which is copied to this log: it would recurse."""
        log = logging.getLogger("absorb")
        log.removeHandler(self)
        _warn_of_log(Path(self.baseFilename), sys.exc_info()[1], self.terminal)
        with suppress(OSError):  # what could not be written is still buffered
            self.close()
        if record.levelno >= logging.ERROR:
            log.addHandler(_Terminal(self.terminal))
            log.handle(record)


class _Terminal(logging.StreamHandler[TextIO]):
    """Prints a traceback that the log could not take."""

    baseFilename = "the output above"  # where an error says that its traceback is

    def __init__(self, terminal: TextIO) -> None:
        super().__init__(terminal)
        self.setLevel(logging.ERROR)


def _warn_of_log(path: Path, error: BaseException | None, terminal: TextIO) -> None:
    cause = getattr(error, "strerror", None) or error
    with suppress(OSError, ValueError):  # a terminal that is closed is no reason to end either
        print(f"warning: {path}: {cause}; this command goes on without its log", file=terminal, flush=True)


def start_log(folder: Path, worker: bool = False) -> None:
    """From now on every line that this process prints goes to `log.txt` of the run folder too, with its time.

    Tracebacks that the terminal does not show go there through the logger `absorb`.

    Args:
        worker: this process has no command line of its own.
    """
    log = logging.getLogger("absorb")
    if log.handlers or not folder.is_dir():
        return
    try:
        log.addHandler(_LogFile(folder / LOG, sys.stderr))
    except OSError as error:  # a read-only disk: a command that only reads has no need of one
        _warn_of_log(folder / LOG, error, sys.stderr)
        return
    log.setLevel(logging.INFO)
    log.propagate = False
    if not worker:
        log.info("$ %s", " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    sys.stdout, sys.stderr = (s and _Copied(s, log) for s in (sys.stdout, sys.stderr))  # None: it is closed
