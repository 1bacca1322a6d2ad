"""Documents: read from their sources, split by hash, written once, tokenizer-free."""

import hashlib
import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from glob import glob
from importlib import import_module, metadata, util
from itertools import islice
from pathlib import Path
from typing import Any

from eval.core.artifacts import Manifest, build_artifact, digest, is_done, read_manifest
from eval.core.documents import TEST, TRAIN, VALIDATION, Document, Row, pack, read_documents, windows
from eval.core.errors import UserError
from eval.core.sections import Source
from eval.core.study import Study
from eval.score.corruptions import damaged_slices

ROWS_PER_DOCUMENT = 4  # at first; more only when the documents run out


def _order(text: str) -> str:
    """A fixed order that has nothing to do with names: the SHA-256 of the id."""
    return hashlib.sha256(text.encode()).hexdigest()


def source_root(path: str) -> Path:
    """The folder that a source names: a path, `stdlib` or `package:NAME`."""
    if path == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    if path.startswith("package:"):
        spec = util.find_spec(path.removeprefix("package:"))
        if spec is None or not spec.submodule_search_locations:
            raise UserError("data source", path, "no such installed package")
        return Path(next(iter(spec.submodule_search_locations)))
    root = Path(path)
    if not root.is_dir():
        raise UserError("data source", path, "no such folder; give a folder, `stdlib` or `package:NAME`")
    return root


def _files(source: Source) -> list[Path]:
    """Files of a folder source, relative to its root, in the order of their hashes."""
    root = source_root(source.path)
    found = {p.relative_to(root) for pattern in source.include for p in root.glob(pattern)}
    kept = [p for p in found if not any(fnmatch(f"/{p.as_posix()}", pattern) for pattern in source.exclude)]
    kept = [p for p in kept if (root / p).is_file()]
    if not kept:
        raise UserError("data source", source.path, f"no file matches {source.include}")
    return sorted(kept, key=lambda p: _order(p.as_posix()))


def _from_folder(source: Source) -> Iterator[Document]:
    root = source_root(source.path)
    for path in _files(source):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not text: a folder of sources holds such files, and they are no documents
        domain = source.domain or (path.parts[0] if len(path.parts) > 1 else "top")
        if text.strip():
            yield Document(f"{Path(source.path).name}/{path.as_posix()}", domain, text)


def _from_pydoc(source: Source) -> Iterator[Document]:
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name in sorted(topics, key=_order):
        if topics[name].strip():
            yield Document(f"pydoc/{name}", source.domain or "pydoc", topics[name])


def _from_dataset(source: Source) -> Iterator[Document]:
    """Documents of a hub data set, or of local JSONL, Parquet or text files, through `datasets`.

    Ids carry the name of the file, not its place: a split must not change when a folder moves.
    """
    for number, row in enumerate(_load_rows(source)):
        yield _row_to_document(source, row, number)


def _load_rows(source: Source) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if source.data_files and "://" not in source.data_files and not _local_files(source):
        raise UserError("data source", source.data_files, "no such file")
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
        raise UserError("data source", source.path, " ".join(str(error).split())[:300]) from error


def _row_to_document(source: Source, row: dict[str, Any], number: int) -> Document:
    """One row of a data set: a text, a prompt with its completion, or a chat that ends with an answer."""
    body = source.messages_column or source.text_column
    for column in filter(None, (body, source.prompt_column, source.domain_column)):
        if column not in row:
            raise UserError("data source", f"no column {column!r}", f"columns: {', '.join(row)}")
    where = f"{Path(source.data_files or source.path).name}:{row.get('id', number)}"
    domain = str(row[source.domain_column] if source.domain_column else source.domain or source.path)
    prompt: str | list[dict[str, str]] = ""
    if source.messages_column:
        prompt, text = _split_chat(where, row[body])
    else:
        text = row[body]
        prompt = _require_text(where, row[source.prompt_column]) if source.prompt_column else ""
    return Document(where, domain, _require_text(where, text), prompt)


def _require_text(where: str, text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"document {where}", repr(text)[:60], "drop empty documents from the data")
    return text


def _split_chat(where: str, messages: object) -> tuple[list[dict[str, str]], str]:
    """What was said before the last answer, and that answer."""
    turns = messages if isinstance(messages, list) else []
    plain = all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns)
    if len(turns) < 2 or not plain or turns[-1]["role"] != "assistant":
        fix = "give turns of role and content, the last one by the assistant"
        raise UserError(f"document {where}", repr(messages)[:60], fix)
    before = [{"role": turn["role"], "content": _require_text(where, turn["content"])} for turn in turns[:-1]]
    return before, turns[-1]["content"]


READERS = {"folder": _from_folder, "pydoc": _from_pydoc, "dataset": _from_dataset}


def read_source(source: Source) -> Iterator[Document]:
    """Documents of one source, at most `source.documents` of them."""
    for i, document in enumerate(READERS[source.kind](source)):
        if source.documents is not None and i >= source.documents:
            return
        yield document


def fingerprint(source: Source) -> Any:
    """What tells that a source has changed, without reading it."""
    if source.kind == "pydoc":
        return sys.version
    if source.kind == "folder":
        root = source_root(source.path)
        stats = [(p.as_posix(), (root / p).stat()) for p in _files(source)]
        return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    files = _local_files(source) + [p for p in Path(source.path).rglob("*") if p.is_file()]
    seen = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(files)]
    return seen or metadata.version("datasets")


def _local_files(source: Source) -> list[Path]:
    """The local files that `data_files` names, below the folder that `path` may be."""
    if not source.data_files or "://" in source.data_files:
        return []
    root = source.path if Path(source.path).is_dir() else None
    found = glob(source.data_files, root_dir=root, recursive=True)
    return [path for name in found if (path := Path(root or "") / name).is_file()]


def _drop_duplicates(documents: Iterator[Document], seen: set[str]) -> list[Document]:
    """Documents whose text was not seen before: a copy in two splits would leak."""
    kept = []
    for document in documents:
        mark = _text_hash(document)
        if mark not in seen:
            seen.add(mark)
            kept.append(document)
    return kept


def _text_hash(document: Document) -> str:
    """A hash of all that the document says."""
    said = document.text if not document.prompt else json.dumps([document.prompt, document.text])
    return _order(said)


def _truncate(document: Document, limit: int) -> Document:
    """The first `limit` bytes, whole characters only; an answer to a prompt is not cut."""
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
        raise UserError(where, f"two documents are named {twice[0]!r}", "give each its own id")


def split_documents(study: Study) -> dict[str, list[Document]]:
    """Documents by split and slice. The hash of an id decides, so that a new file moves few others."""
    data, seen = study.data, set[str]()
    pool = _drop_duplicates((d for source in data.documents for d in read_source(source)), seen)
    pool.sort(key=lambda d: _order(d.id))
    _check_unique_ids("data.documents", pool)
    if len(pool) <= data.validation + data.test:
        raise UserError(
            "data",
            f"{len(pool)} documents for {data.validation} validation and {data.test} test ones",
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
            raise UserError(f"data.shifted.{name}", "a reserved name", "give the slice another name")
        documents = _drop_duplicates((d for source in sources for d in read_source(source)), seen)
        if not documents:
            raise UserError(f"slice {name!r}", "no documents", "fix its source")
        _check_unique_ids(f"slice {name!r}", documents)
        splits[name] = [_truncate(d, data.scored_bytes) for d in documents]
    return splits | damaged_slices(splits[VALIDATION], data.corruptions, splits)


def data_key(study: Study) -> str:
    """What the data artifact is made from: the settings, and the sources as they are now."""
    sources = [*study.data.documents, *(s for group in study.data.shifted.values() for s in group)]
    settings = study.data.model_dump(mode="json", exclude={"context", "train_rows", "tasks"})
    return digest([settings, [fingerprint(source) for source in sources]])


def prepare(study: Study) -> Manifest:
    """Writes the data artifact of a study, unless it is there already."""
    folder, key = study.folder / "data", data_key(study)
    if is_done(folder, key):
        return read_manifest(folder)
    splits = split_documents(study)
    facts = {f"{name}_documents": len(documents) for name, documents in splits.items()}
    with build_artifact(folder, kind="data", name="data", key=key, parents={}, facts=facts) as aside:
        for name, documents in splits.items():
            _write(aside / f"{name}.jsonl", documents)
    return read_manifest(folder)


def _candidate_rows(study: Study, tokenizer) -> Iterator[Row]:
    """Rows of the training documents: a few of each first, in the order of hashes."""
    spare = list[Row]()
    for document in read_documents(study.folder / "data", TRAIN):
        if not document.text.strip():
            raise UserError(f"document {document.id!r}", "empty", "drop empty documents")
        found = sorted(windows(tokenizer, document, study.data.context), key=lambda r: _order(r.id))
        found = [row for row in found if row.predicted]
        yield from found[:ROWS_PER_DOCUMENT]
        spare += found[ROWS_PER_DOCUMENT:]
    yield from sorted(spare, key=lambda r: _order(r.id))


def training_rows(study: Study, tokenizer) -> list[Row]:
    """`data.train_rows` rows, spread over the training documents by hash; packed where the study says so."""
    stream, wanted = _candidate_rows(study, tokenizer), study.data.train_rows
    rows = list(islice(pack(stream, study.data.context) if study.data.packing else stream, wanted))
    if len(rows) < wanted:
        raise UserError(
            "data.train_rows", wanted, f"the training documents hold {len(rows)} rows: ask for fewer"
        )
    return rows
