"""Sources of documents: folders, data sets, topics of pydoc; what cannot be used is counted by its reason."""

import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from glob import glob
from importlib import import_module
from pathlib import Path
from typing import Any

from distill.data.files import FORMATS, Unusable, read_rows, read_text
from distill.data.parse import EMPTY_FILE, Raw, make_document, required_columns
from distill.packages import package_folder
from eval.core.artifacts import digest, text_sha256
from eval.core.config import PACKAGES
from eval.core.documents import NO_FOLDER, Document
from eval.core.errors import UserError
from eval.core.sections import Source

PACKAGED = (*FORMATS, "parquet", "arrow")  # names of formats: a folder of such a name is another thing


def source_root(path: str) -> Path:
    """The folder of a source: a path, `stdlib` or a package."""
    if path == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    if path.startswith(PACKAGES):
        return package_folder(path, "data source")
    root = Path(path)
    if not path or not root.is_dir():
        fix = "give an existing folder, `stdlib`, or a package such as `package:NAME`"
        raise UserError("data source", f"no folder {path!r}", fix)
    return root


def _files(source: Source) -> list[Path]:
    """Files of a folder source, relative to its root, in the order of their hashes."""
    root = source_root(source.path)
    fix = "give patterns of files below its path, such as **/*.py"
    for pattern in source.include:
        if not pattern or pattern.startswith("/") or ".." in Path(pattern).parts:
            raise UserError("data source", f"include {pattern!r} of {source.path!r}", fix)
    try:
        matches = {p.relative_to(root) for pattern in source.include for p in root.glob(pattern)}
    except (ValueError, IndexError) as error:  # what no glob pattern is, such as `**x`
        raise UserError(
            "data source", f"include {source.include} of {source.path!r}: {error}", fix
        ) from error
    files = [p for p in matches if not _is_excluded(p, source) and (root / p).is_file()]
    if not files:
        problem = f"no file in {source.path!r} matches {source.include}"
        fix = "change include or exclude (patterns below path, such as **/*.md), or give another path"
        raise UserError("data source", problem, fix)
    return sorted(files, key=lambda p: text_sha256(p.as_posix()))


def _is_excluded(path: Path, source: Source) -> bool:
    names = path.as_posix(), f"/{path.as_posix()}"  # so that `*/test/*` means one at the top as well
    return any(fnmatch(name, pattern) for name in names for pattern in source.exclude)


def _from_folder(source: Source) -> Iterator[Raw]:
    root, name = source_root(source.path), Path(source.path).name
    for path in _files(source):
        top = path.parts[0] if len(path.parts) > 1 else NO_FOLDER
        group = f"{name}/{top}" if source.group_by_folder else ""
        row: dict[str, Any] | Unusable
        try:
            text = read_text(root / path, source.encoding)
            row = {source.text_column: text} if text.strip() else Unusable(EMPTY_FILE)
        except Unusable as unusable:
            row = unusable
        yield Raw(f"{name}/{path.as_posix()}", row, source.domain or top, group, path.parent.name)


def _from_pydoc(source: Source) -> Iterator[Raw]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name in sorted(topics, key=text_sha256):
        yield Raw(f"pydoc/{name}", {source.text_column: topics[name]}, source.domain or "pydoc")


def _from_dataset(source: Source) -> Iterator[Raw]:
    """Rows of a data set of the hub, or of local files; those of a format in `FORMATS` are read here.

    Origins contain no folder above the files: an artifact must not depend on where they lie.
    """
    domain = source.domain or source.path
    if source.path not in FORMATS or _is_remote(source):
        for number, row in enumerate(_load_rows(source)):
            yield Raw(f"{Path(source.path).name}:{number}", row, domain)
        return
    files = _require_files(source)
    above = os.path.commonpath([path.absolute().parent for path in files])
    for path in files:
        name = path.absolute().relative_to(above).as_posix()
        for number, content in read_rows(path, source.path, source.encoding):
            yield Raw(f"{name}:{number}", content, domain)


def _load_rows(source: Source) -> Iterator[dict[str, Any]]:
    """Rows that `datasets` reads."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    files: Any = source.data_files
    if files and not _is_remote(source):
        is_packaged = source.path in PACKAGED
        files = [str(path) for path in _require_files(source)] if is_packaged else source.patterns
    try:
        rows = load_dataset(
            source.path,
            source.config,
            data_files=files,
            split=source.split,
            revision=source.revision,
            streaming=is_streamed(source),
        )
        for number, row in enumerate(rows):
            if number == 0 and (missing := [c for c in required_columns(source) if c not in row]):
                raise UserError("data source", f"no column {missing[0]!r}", f"choose among {', '.join(row)}")
            yield row
    except (DatasetsError, ValueError, TypeError, OSError, ImportError) as error:
        problem = f"{source.path}: {_with_causes(error)}"
        raise UserError("data source", problem, "fix path, config, split or data_files") from error


def is_streamed(source: Source) -> bool:
    """Whether `datasets` reads rows one by one; a part of a split, such as `train[:10%]`, cannot."""
    if source.streaming is None:
        return source.documents is not None and "[" not in source.split
    return source.streaming


def _with_causes(error: BaseException | None) -> str:
    """The message of an error and of those that it was raised from, on one line."""
    messages: list[str] = []
    while error is not None:
        message = " ".join(str(error).split())[:300] or type(error).__name__
        if not any(message in known for known in messages):
            messages.append(message)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ", because of: ".join(messages)


READERS = {"folder": _from_folder, "pydoc": _from_pydoc, "dataset": _from_dataset}


def read_source(
    source: Source, left_out: Counter[str] | None = None, labels: Sequence[str] = ()
) -> Iterator[Document]:
    """Documents of one source, at most `source.documents` of them.

    Args:
        left_out: reason -> number of rows of which no document could be made; filled on the way.
        labels: the classes that documents are of, where they have some.

    Raises:
        UserError: the source cannot be read, or not one of its rows can be used.
    """
    reasons: Counter[str] = Counter()
    used, columns = 0, list[str]()
    for raw in READERS[source.kind](source):
        columns = columns or (list(raw.row) if isinstance(raw.row, dict) else [])
        try:
            document = make_document(source, raw, labels)
        except Unusable as unusable:
            reasons[unusable.reason] += 1
            continue
        yield document
        used += 1
        if used == source.documents:
            break
    if left_out is not None:
        left_out.update(reasons)
    if not used and reasons:
        problem = f"no row can be used: {list_reasons(reasons)}"
        fix = f"clean it, or fix its settings; columns of its first row: {', '.join(columns) or 'none'}"
        raise UserError(f"data source {source_name(source)}", problem, fix)


def source_name(source: Source) -> str:
    """What people recognise a source by."""
    return f"{source.kind} {source.path} {' '.join(source.patterns)}".strip()


def list_reasons(reasons: dict[str, int]) -> str:
    """`12 no text, 3 an empty turn`: the most frequent first."""
    ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def fingerprint(source: Source) -> Any:
    """A value that changes when a source changes, without reading its content."""
    if source.kind == "pydoc":
        return sys.version
    if source.kind == "folder":
        root = source_root(source.path)
        stats = [(p.as_posix(), (root / p).stat()) for p in _files(source)]
        return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    files = _local_files(source)
    if source.path not in PACKAGED:
        files += [p for p in Path(source.path).rglob("*") if p.is_file()]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(set(files))]


def libraries(source: Source) -> list[str]:
    """Distributions that decide what is read from a source, beside this project."""
    is_read_here = source.kind != "dataset" or (source.path in FORMATS and not _is_remote(source))
    return [] if is_read_here else ["datasets"]


def _is_remote(source: Source) -> bool:
    return any("://" in pattern for pattern in source.patterns)


def _local_files(source: Source) -> list[Path]:
    """The local files of `data_files`, relative to `path` where that is a folder; of a pattern by name."""
    if _is_remote(source):
        return []
    root = source.path if source.path not in PACKAGED and Path(source.path).is_dir() else None
    names = [name for pattern in source.patterns for name in _matches(pattern, root)]
    return list(dict.fromkeys(path for name in names if (path := Path(root or "") / name).is_file()))


def _matches(pattern: str, root: str | None) -> list[str]:
    """Names below `root` that match a pattern; a file of that very name, brackets and all, comes first."""
    if (Path(root or "") / pattern).is_file():
        return [pattern]
    return sorted(glob(pattern, root_dir=root, recursive=True))


def _require_files(source: Source) -> list[Path]:
    """The same; every pattern must match a file."""
    if not source.patterns:
        raise UserError("data source", f"{source.path} without files", "name them in data_files")
    for pattern in source.patterns:
        if not _local_files(source.model_copy(update={"data_files": pattern})):
            above = source.path if source.path not in PACKAGED and Path(source.path).is_dir() else Path.cwd()
            fix = f"give data_files that are there; they are read from {above}"
            raise UserError("data source", f"no file {pattern!r}", fix)
    return _local_files(source)
