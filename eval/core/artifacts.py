"""Artifact folders: content hashes, a manifest, and writes that appear whole or not at all.

An artifact is a folder with a `manifest.json`. Its `hash` says what the bytes are; its `key` says what
it was made from (settings and parents), so that finished work is recognised and not done again.
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from eval.core.errors import UserError

MANIFEST = "manifest.json"
VERSIONED = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "optimum-intel",
    "openvino",
    "nncf",
)


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
    key: str  # digest of what it was made from
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
    return hashlib.sha256(text.encode()).hexdigest()


def source_hashes(kind: type, base: type) -> list[str]:
    """SHA-256 of the code of a plug-in: of its class and those that it inherits from, up to `base`.

    Of a class that lies outside this project, every Python file of its package counts.
    """
    root, found = Path(__file__).resolve().parents[2], set()
    for one in kind.__mro__:
        if one not in base.__mro__:
            path = Path(inspect.getfile(one)).resolve()
            packaged = sys.modules[one.__module__].__package__ and not path.is_relative_to(root)
            found |= set(path.parent.rglob("*.py")) if packaged else {path}
    return sorted(file_sha256(path) for path in found)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what an artifact is; absent ones are left out."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def hash_files(folder: Path) -> dict[str, FileEntry]:
    """Hash and size of every file below `folder`, its own manifest left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {
        p.relative_to(folder).as_posix(): FileEntry(sha256=file_sha256(p), bytes=p.stat().st_size)
        for p in files
    }


def content_hash(files: dict[str, FileEntry]) -> str:
    return digest({name: entry.sha256 for name, entry in files.items()})


@contextmanager
def build_artifact(
    folder: Path,
    *,
    kind: str,
    name: str,
    key: str,
    parents: dict[str, str],
    facts: dict[str, Any],
) -> Iterator[Path]:
    """Yields a folder to write into; on a clean exit it becomes `folder`, with its manifest.

    `facts` may be filled while the folder is written: it is read at the end.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        yield aside
        files = hash_files(aside)
        manifest = Manifest(
            kind=kind,
            name=name,
            key=key,
            hash=content_hash(files),
            files=files,
            parents=parents,
            facts=facts,
            versions=library_versions(),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_text(aside / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old.tmp")
            folder.rename(old)
            aside.rename(folder)
            shutil.rmtree(old)
        else:
            aside.rename(folder)
    finally:
        try:
            shutil.rmtree(aside, ignore_errors=True)
        except SystemExit:  # told to end while sweeping: it is told once
            shutil.rmtree(aside, ignore_errors=True)
            raise


def read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"artifact {folder}", f"no {MANIFEST}", "make it first, or name another folder")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(f"manifest {path}", error.errors()[0]["msg"], "make the artifact again") from error
    if manifest.hash != (found := content_hash(manifest.files)):
        said = f"says hash {manifest.hash[:12]}, its files give {found[:12]}"
        raise UserError(f"manifest {path}", said, "it was edited: make the artifact again")
    return manifest


def verify_artifact(folder: Path) -> Manifest:
    """The manifest of `folder`, after every file has been checked against it.

    Raises:
        UserError: a file is missing, was added, or differs by one bit from its recorded hash.
    """
    manifest = read_manifest(folder)
    found = hash_files(folder)
    for name, entry in manifest.files.items():
        if name not in found:
            raise UserError(f"artifact {folder}", f"{name} is missing", "delete the folder and run again")
        if found[name] != entry:
            raise UserError(
                f"artifact {folder}",
                f"{name} has sha256 {found[name].sha256[:12]} ({found[name].bytes} bytes), "
                f"recorded {entry.sha256[:12]} ({entry.bytes} bytes)",
                "delete the folder and run again",
            )
    if extra := sorted(set(found) - set(manifest.files)):
        raise UserError(f"artifact {folder}", f"unrecorded file {extra[0]}", "delete it")
    return manifest


def is_done(folder: Path, key: str) -> bool:
    """True if `folder` holds a whole artifact made from `key`; a damaged one raises."""
    if not (folder / MANIFEST).is_file() or read_manifest(folder).key != key:
        return False
    verify_artifact(folder)
    return True
