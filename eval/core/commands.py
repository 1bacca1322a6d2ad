"""What all commands share: the study of a command line, its keys in `--help`, `--json`, and the run's log."""

import argparse
import json
import logging
import re
import sys
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from eval.core.artifacts import parse_stages, write_text
from eval.core.study import Study, check_trained, load_study

LOG = "log.txt"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
CURSOR = re.compile(r"\x1b\[|\r(?!\n)")  # what draws a progress bar, and is no line


def describe_fields(
    model: type[BaseModel], path: str = "", shown: dict[type, str] | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of every field below `model`; a section is shown once."""
    sections = {name: _section(field) for name, field in model.model_fields.items()}
    shown = {} if shown is None else shown
    for name, section in sections.items():
        if section is not None:
            shown.setdefault(section, f"{path}{name}")
    for name, field in model.model_fields.items():
        if field.exclude:  # set by a flag of its own
            continue
        key, section = f"{path}{name}", sections[name]
        meaning = field.description or (" ".join((section.__doc__ or "").split()) if section else "")
        if section is not None and shown[section] != key:
            meaning = f"{meaning.rstrip('.')}. Its keys are those of {shown[section]}."
        yield key, _type_text(field), _default_text(field), meaning
        if section is not None and shown[section] == key:
            yield from describe_fields(section, f"{key}.", shown)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model that a field holds, itself or as one of a union."""
    kinds = [field.annotation]
    if get_origin(field.annotation) in (Union, types.UnionType):
        kinds = list(get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _type_text(field: FieldInfo) -> str:
    text = (
        str(field.annotation) if get_origin(field.annotation) else getattr(field.annotation, "__name__", "")
    )
    text = re.sub(r"\b(?:typing|eval|pathlib|annotated_types)\.[\w.]*?(?=\w+\b(?!\.))", "", text)
    return re.sub(r"Annotated\[(\w+), [^\]]*\]\)?\]", r"\1", text).replace("NoneType", "None")


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
    """Parses `--study` (a YAML file or a run folder), the parser's own flags and overrides of its keys.

    Args:
        trained: the settings must be those that made the run folder.
        measures: the command also takes `--json FILE`, for `write_json`.
        stages: the command makes artifacts of these and takes `--accept-old`.
    """
    parser.add_argument(
        "--config", "--study", dest="study", required=True, help="a study's YAML file, or a run folder"
    )
    if measures:
        add_json(parser)
    if stages:
        about = "keep artifacts that other versions of the code or of libraries made from the same settings"
        parser.add_argument("--accept-old", metavar="STAGES", help=f"{about}: {','.join(stages)} or all")
    add_keys_help(parser)
    known, words = parser.parse_known_args()
    study = load_study(known.study, words)
    if stages and known.accept_old:
        study = study.model_copy(update={"accept_old": parse_stages(known.accept_old, stages)})
    if trained:
        check_trained(study)
        start_log(study.folder)
    return study, known


def add_keys_help(parser: argparse.ArgumentParser) -> None:
    """Lets `--help` list every key of a study that may be overridden."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = keys_help(Study).replace("%", "%%")


class _NewFile(argparse.Action):
    """A path to write to. A file there is deleted at once: after an error it would pass for the result."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, path: Any, option: str | None = None
    ) -> None:
        path.unlink(missing_ok=True)
        setattr(namespace, self.dest, path)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Takes `--json FILE`, for `write_json`."""
    about = "also write the result to this file, as JSON"
    parser.add_argument("--json", type=Path, action=_NewFile, metavar="FILE", help=about)


def write_json(path: Path | None, result: Any) -> None:
    """Writes what a command found, whole or not at all; nothing where no file was asked for."""
    if path is not None:
        text = json.dumps(_plain(result), indent=1, allow_nan=False, ensure_ascii=False)
        write_text(path, text + "\n")


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
    """On a full or read-only disk its lines are lost and nothing else: no command ends because of its log."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing is printed: that would be logged, without an end."""


def start_log(folder: Path) -> None:
    """From now on every line that this process prints goes to `log.txt` of the run folder too, with its time.

    Tracebacks that the terminal does not show go there through the logger `absorb`.
    """
    log = logging.getLogger("absorb")
    if log.handlers or not folder.is_dir():
        return
    handler = _LogFile(folder / LOG, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.info("$ %s", " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    sys.stdout, sys.stderr = _Copied(sys.stdout, log), _Copied(sys.stderr, log)
