"""Documents: read from their sources, split by hash and written once, without a tokenizer."""

import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from glob import glob
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from distill.packages import package_folder
from eval.core.artifacts import (
    Key,
    Manifest,
    build_artifact,
    digest,
    installed_versions,
    is_done,
    make_key,
    read_manifest,
)
from eval.core.documents import TEST, TRAIN, VALIDATION, Document, Row, pack, read_documents, windows
from eval.core.errors import UserError
from eval.core.sections import PACKAGES, Source
from eval.core.study import Study
from eval.score.corruptions import damaged_slices

ROWS_PER_DOCUMENT = 4  # at first; more only where all documents have been used


def _sha256(text: str) -> str:
    """Sort key of a fixed pseudo-random order: the SHA-256 of the text."""
    return hashlib.sha256(text.encode()).hexdigest()


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
    included = [
        p for p in matches if not any(fnmatch(f"/{p.as_posix()}", pattern) for pattern in source.exclude)
    ]
    files = [p for p in included if (root / p).is_file()]
    if not files:
        problem = f"no file in {source.path!r} matches {source.include}"
        raise UserError("data source", problem, "fix path, include or exclude")
    return sorted(files, key=lambda p: _sha256(p.as_posix()))


def _from_folder(source: Source) -> Iterator[Document]:
    root = source_root(source.path)
    for path in _files(source):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # binary files in a folder are no documents
        domain = source.domain or (path.parts[0] if len(path.parts) > 1 else "top")
        if text.strip():
            yield Document(f"{Path(source.path).name}/{path.as_posix()}", domain, text)


def _from_pydoc(source: Source) -> Iterator[Document]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name in sorted(topics, key=_sha256):
        if topics[name].strip():
            yield Document(f"pydoc/{name}", source.domain or "pydoc", topics[name])


def _from_dataset(source: Source) -> Iterator[Document]:
    """Documents of a hub data set, or of local JSONL, Parquet or text files, read by `datasets`.

    Ids contain the name of a file without its folder: a split must not change when the folder moves.
    """
    for number, row in enumerate(_load_rows(source)):
        yield _row_to_document(source, row, number)


def _load_rows(source: Source) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if source.data_files and "://" not in source.data_files and not _local_files(source):
        raise UserError("data source", f"no file {source.data_files!r}", "fix data_files")
    try:
        yield from load_dataset(
            source.path,
            source.config,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        problem = f"{source.path}: {' '.join(str(error).split())[:300]}"
        raise UserError("data source", problem, "fix path, config, split or data_files") from error


def _row_to_document(source: Source, row: dict[str, Any], number: int) -> Document:
    """One row of a data set: a text, a prompt with its completion, or a chat that ends with an answer."""
    text_column = source.messages_column or source.text_column
    for column in filter(None, (text_column, source.prompt_column, source.domain_column)):
        if column not in row:
            raise UserError("data source", f"no column {column!r}", f"choose among {', '.join(row)}")
    name = f"{Path(source.data_files or source.path).name}:{row.get('id', number)}"
    domain = str(row[source.domain_column] if source.domain_column else source.domain or source.path)
    prompt: str | list[dict[str, str]] = ""
    if source.messages_column:
        prompt, text = _split_chat(name, row[text_column])
    else:
        text = row[text_column]
        prompt = _require_text(name, row[source.prompt_column]) if source.prompt_column else ""
    return Document(name, domain, _require_text(name, text), prompt)


def _require_text(name: str, text: object) -> str:
    """`text`, refused where it is empty."""
    if not isinstance(text, str) or not text.strip():
        problem = f"expected a text, found {text!r:.60}"
        raise UserError(f"document {name}", problem, "remove empty documents from the data")
    return text


def _split_chat(name: str, messages: object) -> tuple[list[dict[str, str]], str]:
    """The turns before the last answer, and that answer."""
    turns = messages if isinstance(messages, list) else []
    valid = all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns)
    if len(turns) < 2 or not valid or turns[-1]["role"] != "assistant":
        fix = "give two or more turns with role and content, the last one by the assistant"
        raise UserError(f"document {name}", f"found {messages!r:.60}", fix)
    before = [{"role": turn["role"], "content": _require_text(name, turn["content"])} for turn in turns[:-1]]
    return before, turns[-1]["content"]


READERS = {"folder": _from_folder, "pydoc": _from_pydoc, "dataset": _from_dataset}


def read_source(source: Source) -> Iterator[Document]:
    """Documents of one source, at most `source.documents` of them."""
    for i, document in enumerate(READERS[source.kind](source)):
        if source.documents is not None and i >= source.documents:
            return
        yield document


def fingerprint(source: Source) -> Any:
    """A value that changes when a source changes, without reading its content."""
    if source.kind == "pydoc":
        return sys.version
    if source.kind == "folder":
        root = source_root(source.path)
        stats = [(p.as_posix(), (root / p).stat()) for p in _files(source)]
        return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    files = _local_files(source) + [p for p in Path(source.path).rglob("*") if p.is_file()]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]


def _local_files(source: Source) -> list[Path]:
    """The local files of `data_files`, relative to `path` where that is a folder."""
    if not source.data_files or "://" in source.data_files:
        return []
    root = source.path if Path(source.path).is_dir() else None
    names = glob(source.data_files, root_dir=root, recursive=True)
    return [path for name in names if (path := Path(root or "") / name).is_file()]


def _drop_duplicates(documents: Iterator[Document], seen: set[str]) -> list[Document]:
    """Documents whose text is new, added to `seen`: a copy in two splits would leak."""
    unique = []
    for document in documents:
        text_hash = _text_hash(document)
        if text_hash not in seen:
            seen.add(text_hash)
            unique.append(document)
    return unique


def _text_hash(document: Document) -> str:
    """SHA-256 of the text of a document with its prompt."""
    return _sha256(json.dumps([document.prompt, document.text]) if document.prompt else document.text)


def _truncate(document: Document, limit: int) -> Document:
    """The first `limit` bytes in whole characters; an answer to a prompt is not cut."""
    if document.prompt:
        return document
    text = document.text.encode()[:limit].decode(errors="ignore")
    return Document(document.id, document.domain, text)


def _write(path: Path, documents: list[Document]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for d in documents:
            row: dict[str, Any] = {"id": d.id, "domain": d.domain, "bytes": d.bytes, "sha256": _text_hash(d)}
            row |= {"text": d.text, **({"prompt": d.prompt} if d.prompt else {})}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _check_unique_ids(where: str, documents: list[Document]) -> None:
    count = Counter(document.id for document in documents)
    if twice := [name for name, times in count.items() if times > 1]:
        raise UserError(
            where, f"{count[twice[0]]} documents have the id {twice[0]!r}", "give each its own id"
        )


def split_documents(study: Study) -> dict[str, list[Document]]:
    """Documents by split and slice, by the hash of their ids: a new file moves few others.

    Raises:
        UserError: too few documents, two with one id, or an empty or wrongly named slice.
    """
    data, seen = study.data, set[str]()
    pool = _drop_duplicates((d for source in data.documents for d in read_source(source)), seen)
    pool.sort(key=lambda d: _sha256(d.id))
    _check_unique_ids("data.documents", pool)
    if len(pool) <= data.validation + data.test:
        raise UserError(
            "data",
            f"{len(pool)} documents, need more than {data.validation} for validation + {data.test} for test",
            "add documents, or lower data.validation or data.test",
        )
    first, second = data.validation, data.validation + data.test
    splits = {
        VALIDATION: [_truncate(d, data.scored_bytes) for d in pool[:first]],
        TEST: [_truncate(d, data.scored_bytes) for d in pool[first:second]],
        TRAIN: pool[second:],
    }
    for name, sources in data.shifted.items():
        if name in splits:
            raise UserError(f"data.shifted.{name}", "this name is reserved", "give the slice another name")
        documents = _drop_duplicates((d for source in sources for d in read_source(source)), seen)
        if not documents:
            problem = "no documents, or all are copies of others"
            raise UserError(f"slice {name!r}", problem, "fix its source")
        _check_unique_ids(f"slice {name!r}", documents)
        splits[name] = [_truncate(d, data.scored_bytes) for d in documents]
    return splits | damaged_slices(splits[VALIDATION], data.corruptions, splits)


def data_key(study: Study) -> Key:
    """Key of the data artifact: the settings, the present state of the sources, and what reads data sets."""
    sources = [*study.data.documents, *(s for group in study.data.shifted.values() for s in group)]
    settings = study.data.model_dump(mode="json", exclude={"context", "train_rows", "tasks"})
    libraries = ["datasets"] if any(source.kind == "dataset" for source in sources) else []
    fingerprints = [fingerprint(source) for source in sources]
    return make_key("data", [settings, fingerprints], installed_versions(libraries))


def prepare(study: Study) -> Manifest:
    """Writes the data artifact of a study, unless it is there already."""
    folder, key = study.folder / "data", data_key(study)
    if is_done(folder, key, study.accept_old):
        return read_manifest(folder)
    splits = split_documents(study)
    facts = {f"{name}_documents": len(documents) for name, documents in splits.items()}
    with build_artifact(folder, kind="data", name="data", key=key, parents={}, facts=facts) as temporary:
        for name, documents in splits.items():
            _write(temporary / f"{name}.jsonl", documents)
    return read_manifest(folder)


def _candidate_rows(study: Study, tokenizer) -> Iterator[Row]:
    """Rows of the training documents, in the order of hashes: first a few of each, then the rest."""
    rest = list[Row]()
    for document in read_documents(study.folder / "data", TRAIN):
        if not document.text.strip():
            raise UserError(f"document {document.id!r}", "empty", "remove empty documents")
        rows = sorted(windows(tokenizer, document, study.data.context), key=lambda r: _sha256(r.id))
        rows = [row for row in rows if row.predicted]
        yield from rows[:ROWS_PER_DOCUMENT]
        rest += rows[ROWS_PER_DOCUMENT:]
    yield from sorted(rest, key=lambda r: _sha256(r.id))


def training_rows(study: Study, tokenizer) -> list[Row]:
    """`data.train_rows` rows, spread over the training documents by hash; packed where the study says so."""
    stream, wanted = _candidate_rows(study, tokenizer), study.data.train_rows
    rows = list(islice(pack(stream, study.data.context) if study.data.packing else stream, wanted))
    if len(rows) < wanted:
        problem = f"{wanted}, but the training documents have {len(rows)} rows"
        raise UserError("data.train_rows", problem, "lower it, or add documents")
    return rows
