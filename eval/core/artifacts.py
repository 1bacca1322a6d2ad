"""Artifact folders: content hashes, a manifest, and writes that appear whole or not at all.

An artifact is a folder with a `manifest.json`. Its `hash` says what the bytes are; its `key` says what
it was made from (`inputs`: settings and parents) and by which versions (`code`), so that finished work is
recognised and not done again. docs/cache-keys.md says what is done again, and when.
"""

import hashlib
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from eval.core.config import ROOT
from eval.core.errors import UserError, first_error, require_one_of

MANIFEST = "manifest.json"
FILE_HASHES = "file-hashes.json"  # of a run: hashes of its large files, by size, times and inode
LARGE = 2**20  # bytes from which a finished file is not read again at every start
Hashes = dict[str, str]  # name of a file -> its SHA-256


class Stage(NamedTuple):
    """The code of one kind of artifact."""

    version: int  # raise it when the code may make other artifacts; `tests/test_stage_digests.py` asks for it
    libraries: tuple[str, ...]  # distributions whose versions decide what is made


_MODELS = ("torch", "transformers", "tokenizers")
VERSIONS = {
    "data": Stage(7, ()),  # and `datasets` or `datasketch`, where they are used
    "tokenizer": Stage(1, ("transformers", "tokenizers")),
    "tokens": Stage(2, ("transformers", "tokenizers")),
    "base": Stage(6, (*_MODELS, "accelerate")),
    "method": Stage(5, (*_MODELS, "accelerate", "peft")),
    "targets": Stage(4, (*_MODELS, "peft")),
    "student": Stage(6, (*_MODELS, "accelerate", "peft")),
    "variant": Stage(6, _MODELS),  # and what its passes need
}
# Where the artifacts of a run lie, and what they are called in a sentence.
FOLDERS = {"data": "documents", "tokenizer": "tokenizer", "base": "bases", "method": "teachers"}
FOLDERS |= {name: name for name in ("tokens", "targets", "students", "variants")}
_ENGINES = ("bitsandbytes", "optimum-intel", "openvino", "nncf", "onnxruntime", "onnxruntime-genai")
VERSIONED = (*_MODELS, "peft", "accelerate", *_ENGINES, "llama-cpp-python")


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What lies in an artifact folder and where it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = 1
    kind: str  # data, model, method, targets, variant
    name: str  # path below the run folder, e.g. students/S1/s0
    key: str  # digest of `inputs` and `code`
    inputs: str = ""  # digest of the settings and parents that it was made from
    code: dict[str, str] = {}  # versions that made it: of its stage, of libraries, digests of plug-ins
    accepted: dict[str, str] = {}  # the versions that it was accepted for, where others made it
    hash: str  # digest of the file hashes
    files: dict[str, FileEntry]
    parents: dict[str, str]  # role -> artifact hash
    facts: dict[str, Any]  # arm, seed, recipe, engine, loss curve ...
    versions: dict[str, str]
    time: str = ""  # when it was made: ISO 8601, UTC; empty in manifests of before

    @property
    def bytes(self) -> int:
        """Bytes of every file of the artifact (the manifest itself is not counted)."""
        return sum(entry.bytes for entry in self.files.values())


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text_sha256(text)


def text_sha256(text: str) -> str:
    """In hexadecimal, of its UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Key:
    """What an artifact is made from: settings and parents, and the versions of what makes it."""

    inputs: str
    code: dict[str, str] = field(default_factory=dict)
    stage: str = ""

    @cached_property
    def digest(self) -> str:
        return digest([self.inputs, self.code])


def make_key(stage: str, inputs: Any, code: dict[str, str] | None = None) -> Key:
    """The key of an artifact of `stage`; `code` adds to the versions of the stage and of its libraries."""
    return Key(digest(inputs), {**stage_code(stage), **(code or {})}, stage)


def parse_stages(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The stages in `base,student` or `all`, of those that are `known`."""
    names = tuple(known)
    if text == "all":
        return names
    return tuple(require_one_of("--accept-old", part.strip(), [*names, "all"]) for part in text.split(","))


def stage_code(stage: str) -> dict[str, str]:
    """The version of a stage and of the libraries that it depends on, as installed."""
    version, libraries = VERSIONS[stage]
    return {stage: str(version), **installed_versions(libraries)}


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remembered_hashes(files: dict[str, Path], memory: Path, fresh: Hashes | None = None) -> Hashes:
    """The hashes of files: `fresh`, or each read where its size, times or inode are not those in `memory`."""
    known, hashes, seen = _read_memory(memory), {}, {}
    for name, path in files.items():
        location, stat = str(path.resolve()), path.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        before, content = known.get(location, ([], ""))
        if fresh is not None:
            content = fresh[name]
        elif before != state:
            content = file_sha256(path)
        hashes[name], seen[location] = content, [state, content]
    remembered = {place: entry for place, entry in known.items() if Path(place).is_file()} | seen
    if remembered != known:
        write_text(memory, json.dumps(remembered, indent=1))
    return hashes


def _read_memory(memory: Path) -> dict[str, Any]:
    """What is remembered; nothing where the file is damaged: all is read again."""
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) and all(map(_is_entry, known.values())) else {}


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and [type(part) for part in entry] == [list, str]


@cache
def commit_text(digits: int) -> str:
    """Of the checkout at work, then `-dirty` where files were changed; empty where there is no checkout."""
    if not (ROOT / ".git").exists() or not (git := shutil.which("git")):
        return ""
    words = [git, "-C", str(ROOT), "describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def tool_text() -> str:
    """Name, version as installed, and commit of this project."""
    version, commit = f"absorb {_version('absorb')}".strip(), commit_text(12)
    return f"{version} ({commit})" if commit else version


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what an artifact is; absent ones are left out."""
    return {name: version for name in VERSIONED if (version := _version(name))}


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions for a key: one build of torch (`2.13.0+cpu`) stands for the others."""
    return {name: version.split("+")[0] for name in names if (version := _version(name))}


@cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_files(folder: Path, memory: Path | None = None) -> dict[str, FileEntry]:
    """Hash and size of every file below `folder`, its own manifest left out.

    Args:
        memory: where hashes of large files are remembered; none: every byte is read.

    Raises:
        UserError: something there is a link: what it names may change, or lie anywhere.
    """
    every = sorted(folder.rglob("*"))
    if link := next((p for p in every if p.is_symlink()), None):
        name = link.relative_to(folder).as_posix()
        raise UserError(f"artifact {folder}", f"{name} is a link", "put there what it names")
    files = [p for p in every if p.is_file() and p != folder / MANIFEST]
    named = {p.relative_to(folder).as_posix(): p for p in files}
    large = {name: p for name, p in named.items() if memory is not None and p.stat().st_size >= LARGE}
    known = remembered_hashes(large, memory) if memory is not None and large else {}
    return {
        name: FileEntry(sha256=known[name] if name in known else file_sha256(p), bytes=p.stat().st_size)
        for name, p in named.items()
    }


def _memory(folder: Path, name: str) -> Path | None:
    """Where the run of an artifact remembers hashes; none if it lies elsewhere than `name` says."""
    run = folder.resolve().parents[name.count("/")]
    return run / FILE_HASHES if run / name == folder.resolve() else None


def link_files(source: Path, folder: Path, names: Iterable[str]) -> None:
    """One more name in `folder` for files that are never changed; copies where there are no links."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, folder / name)
        except OSError:
            shutil.copyfile(source / name, folder / name)


def content_hash(files: dict[str, FileEntry]) -> str:
    return digest({name: entry.sha256 for name, entry in files.items()})


@contextmanager
def build_artifact(
    folder: Path,
    *,
    kind: str,
    name: str,
    key: Key,
    parents: dict[str, str],
    facts: dict[str, Any],
    finish: Callable[[Path], None] | None = None,
) -> Iterator[Path]:
    """Yields a folder to write into; on a clean exit it becomes `folder`, with its manifest.

    `facts` may be filled while the folder is written: it is read at the end. `finish` is called once the
    manifest is written, before the folder appears.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        files = hash_files(temporary)
        manifest = Manifest(
            kind=kind,
            name=name,
            key=key.digest,
            inputs=key.inputs,
            code=key.code,
            hash=content_hash(files),
            files=files,
            parents=parents,
            facts=facts,
            versions=library_versions(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_text(temporary / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        if finish is not None:
            finish(temporary)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old.tmp")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
        large = {path: entry.sha256 for path, entry in files.items() if entry.bytes >= LARGE}
        if large and (memory := _memory(folder, name)):
            remembered_hashes({path: folder / path for path in large}, memory, large)
    finally:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
        except SystemExit:  # stopped while deleting: the signal comes once
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"artifact {folder}", f"no {MANIFEST}", "make it first, or name another folder")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise first_error(f"manifest {path}", error, f"delete {folder} and run again") from error
    if manifest.hash != (computed := content_hash(manifest.files)):
        difference = f"says hash {manifest.hash[:12]}, its files give {computed[:12]}"
        raise UserError(f"manifest {path}", difference, f"it was edited: delete {folder} and run again")
    return manifest


def verify_artifact(folder: Path, *, remembered: bool = False) -> Manifest:
    """The manifest of `folder`, after every file has been checked against it.

    Args:
        remembered: large files with the size, times and inode of their last reading are not read again: for
            the start of a training, never for what is measured, judged or signed.

    Raises:
        UserError: a file is missing, was added, or differs by one bit from its recorded hash.
    """
    manifest = read_manifest(folder)
    present = hash_files(folder, _memory(folder, manifest.name) if remembered else None)
    for name, entry in manifest.files.items():
        if name not in present:
            raise UserError(f"artifact {folder}", f"{name} is missing", "delete the folder and run again")
        if present[name] != entry:
            raise UserError(
                f"artifact {folder}",
                f"{name} has sha256 {present[name].sha256[:12]} ({present[name].bytes} bytes), "
                f"recorded {entry.sha256[:12]} ({entry.bytes} bytes)",
                "delete the folder and run again",
            )
    if extra := sorted(set(present) - set(manifest.files)):
        raise UserError(f"artifact {folder}", f"unrecorded file {extra[0]}", "delete it")
    return manifest


def is_done(folder: Path, key: Key, accept_old: Collection[str] = ()) -> bool:
    """True if `folder` holds a whole artifact made from `key`; a damaged one raises (see `remembered` above).

    One of a stage in `accept_old` that other versions made from the same inputs is accepted, as its manifest
    then says.
    """
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    is_current, same_code = manifest.key == key.digest, manifest.code == key.code
    if not is_current and not (manifest.inputs == key.inputs and (key.stage in accept_old or same_code)):
        return False
    verify_artifact(folder, remembered=True)
    if not is_current:
        changes = {"key": key.digest, "accepted": {} if same_code else key.code}
        write_text(folder / MANIFEST, manifest.model_copy(update=changes).model_dump_json(indent=1) + "\n")
    return True


def describe_accepted(run: Path) -> list[str]:
    """What --accept-old accepted in a run folder: a sentence per kind of artifact and versions."""
    counts = Counter(
        (plural, _describe_versions(manifest))
        for top, plural in FOLDERS.items()
        for path in sorted((run / top).glob(f"**/{MANIFEST}"))
        if (manifest := read_manifest(path.parent)).accepted
    )
    return [f"accepted: {plural} made by {versions} ({n})" for (plural, versions), n in counts.items()]


def _describe_versions(manifest: Manifest) -> str:
    """The versions that made an artifact, where others are current."""
    used, current = manifest.code, manifest.accepted
    names = [name for name in {**used, **current} if used.get(name) != current.get(name)]
    libraries = set(VERSIONED) | {name for name in names if "." in {**current, **used}[name]}
    phrases = []
    for name in names:
        if name in VERSIONS:
            phrases.append(f"code version {used.get(name, 'unknown')}")
        elif name in libraries:
            phrases.append(f"{name} {used[name]}" if name in used else f"no {name}")
        else:
            phrases.append(f"other code of {name}")
    return ", ".join(phrases)
