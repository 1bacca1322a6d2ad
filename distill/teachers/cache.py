"""The target cache: targets of a teacher on disk in shards, read by the hash of a row.

A shard is one safetensors file that appears complete or not at all. Its rows and content depend on the
training rows alone, neither on the number of processes nor on where a run was interrupted.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from distill.losses.teacher_output import StoredTargets, Target, Teacher, TopK, Whole, to_device
from distill.teachers.codec import Codec, Columns, TopKCodec
from eval.core.artifacts import Manifest, digest, link_files, verify_artifact
from eval.core.documents import Batch, Row, batches, tokens_per_batch
from eval.core.errors import UserError

S = TypeVar("S")
KEY_BYTES = 16  # stored of a row's hash
SHARD_TOKENS, SHARD_BYTES, SHARDS = 2**14, 2**26, 512
EMPTY: Columns = {"row": np.zeros((0, KEY_BYTES), np.uint8), "size": np.zeros((0, 2), np.int64)}
REBUILD = "delete the folder and run again"


def row_key(row: Row) -> str:
    """Hash of a row: its id, its tokens and which of them are predicted."""
    fields = {name: value for name, value in vars(row).items() if name != "skipped" or value}
    return digest({**fields, "id": row.id})


def shard_batches(
    rows: Sequence[Row], pad: int, codec: Codec, batch_tokens: int | None = None
) -> Iterator[list[Batch]]:
    """The batches of each shard, decided by rows, codec and padded tokens of a batch alone."""
    total = sum(row.predicted for row in rows)
    wanted = max(SHARD_TOKENS, total // SHARDS)  # few files, and little to repeat after an interruption
    limit = min(wanted, SHARD_BYTES // codec.max_bytes())
    shard: list[Batch] = []
    tokens = 0
    for batch in batches(rows, pad, batch_tokens or tokens_per_batch(codec.vocabulary)):
        shard.append(batch)
        tokens += int(batch.mask.sum())
        if tokens >= limit:
            yield shard
            shard, tokens = [], 0
    if shard:
        yield shard


def _encode_rows(batch: Batch, keys: dict[str, str], teacher: Teacher, codec: Codec) -> Iterator[Columns]:
    """The columns of each row of a batch, with its key and its numbers of tokens and bytes."""
    target, start = teacher(batch), 0
    assert isinstance(target, Whole | TopK), "only a teacher that answers is written to the cache"
    for name, tokens in zip(batch.ids, batch.mask.sum(1).tolist(), strict=True):
        if isinstance(target, TopK):
            assert isinstance(codec, TopKCodec), "a teacher that names ids is kept as such"
            part = target.slice(start, start + tokens)
            if bool((part.log_probs == -torch.inf).all()):  # the teacher has no answer: not kept
                start += tokens
                continue
            columns = codec.encode_top_k(part.ids.numpy(), part.log_probs.numpy())
        else:
            columns = codec.encode(target.log_softmax(start, start + tokens), keys[name])
        key = np.frombuffer(bytes.fromhex(keys[name])[:KEY_BYTES], dtype=np.uint8)[None]
        size = np.array([[tokens, len(columns.get("bytes", ()))]], dtype=np.int64)
        yield {**columns, "row": key, "size": size}
        start += tokens


def _check_disk_space(folder: Path, codec: Codec, tokens: int) -> None:
    written = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    needed, free = tokens * codec.max_bytes() - written, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        problem = f"needs up to {needed / 2**30:.1f} GiB of disk space, {free / 2**30:.1f} GiB are free"
        raise UserError(f"targets {folder}", problem, "set targets.source: online, or targets.form: sampled")


def write_missing_shards(
    folder: Path,
    suffix: str,
    shards: Iterable[S],
    write: Callable[[Path, S], None],
    process: int,
    processes: int,
) -> None:
    """Writes the missing shards of this process; each appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        path = folder / f"shard-{number:05}.{suffix}"
        if number % processes == process and not path.is_file():
            temporary = path.with_suffix(".tmp")
            write(temporary, shard)
            temporary.replace(path)


def write_shards(
    folder: Path,
    rows: Sequence[Row],
    teacher: Teacher,
    codec: Codec,
    *,
    pad: int,
    report: Callable[[float], None],
    batch_tokens: int | None = None,
    written: Callable[[Batch], None] = lambda batch: None,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Writes the missing shards of this process.

    Args:
        folder: shared by all processes; shards of an interrupted run are not written again.
        teacher: returns complete distributions (Dense or States), or TopK for a codec of that form.
        batch_tokens: padded tokens that the teacher is asked for at a time; none: by the vocabulary.
        written: called with every batch of a shard that has been written.

    Raises:
        UserError: not enough disk space.
    """
    keys = {row.id: row_key(row) for row in rows}
    assert len(keys) == len(rows), "row ids must be unique"
    folder.mkdir(parents=True, exist_ok=True)
    _check_disk_space(folder, codec, sum(row.predicted for row in rows))
    done = 0

    def write_shard(path: Path, shard: list[Batch]) -> None:
        nonlocal done
        encoded: list[Columns] = []
        for batch in shard:
            encoded += _encode_rows(batch, keys, teacher, codec)
            done += len(batch.ids)
            report(min(1.0, processes * done / len(rows)))
        encoded = encoded or [EMPTY]
        save_file({name: np.concatenate([row[name] for row in encoded]) for name in encoded[0]}, path)
        for batch in shard:
            written(batch)

    shards = shard_batches(rows, pad, codec, batch_tokens)
    write_missing_shards(folder, "safetensors", shards, write_shard, process, processes)


def missing_rows(folder: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of which no shard in `folder` holds a target."""
    present: set[bytes] = set()
    for path in folder.glob("shard-*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            present |= {key.tobytes() for key in file.get_tensor("row")}
    return [row for row in rows if bytes.fromhex(row_key(row))[:KEY_BYTES] not in present]


def link_shards(scratch: Path, artifact: Path, tokens: int) -> dict[str, float]:
    """Links all shards into the artifact that is being built; returns facts for its manifest.

    Linked, not moved: an interruption before the artifact is complete loses none of them.
    """
    shards = sorted(scratch.glob("shard-*"))
    link_files(scratch, artifact, (path.name for path in shards))
    size = sum(path.stat().st_size for path in shards)
    return {"tokens": tokens, "bytes_per_token": round(size / tokens, 2)}


def check_lineage(folder: Path, manifest: Manifest, expected: dict[str, Any]) -> None:
    """Refuses targets of another teacher, tokenizer, data or form, naming the first difference."""
    for name, value in expected.items():
        if manifest.facts.get(name) != value:
            problem = f"made with {name} {manifest.facts.get(name)}, this study has {value}"
            raise UserError(f"targets {folder}", problem, REBUILD)


class CachedTeacher(StoredTargets):
    """A teacher that reads its targets from the cache, mapped into memory.

    Raises:
        UserError: the cache is damaged, of another teacher, tokenizer, data, form or temperature, or lacks a
            row with these tokens.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], codec: Codec, lineage: dict[str, Any]) -> None:
        check_lineage(folder, verify_artifact(folder, remembered=True), lineage | codec.facts)
        self.codec = codec
        every = [safe_open(p, framework="numpy") for p in sorted(folder.glob("shard-*.safetensors"))]
        self.files = [file for file in every if len(file.keys()) > len(EMPTY)]
        names = [name for name in self.files[0].keys() if name not in ("row", "size")]  # noqa: SIM118
        self.slices = [{name: file.get_slice(name) for name in names} for file in self.files]
        locations: dict[bytes, tuple[int, np.ndarray, np.ndarray]] = {}
        for number, file in enumerate(self.files):
            ends = np.cumsum(file.get_tensor("size"), axis=0)
            for key, start, end in zip(
                file.get_tensor("row"), ends - file.get_tensor("size"), ends, strict=True
            ):
                locations[key.tobytes()] = number, start, end
        self.locations = {}
        for row in rows:
            key = bytes.fromhex(row_key(row))[:KEY_BYTES]
            if key not in locations:
                raise UserError(f"targets {folder}", f"has no row {row.id} with these tokens", REBUILD)
            self.locations[row.id] = locations[key]

    def _read_row(self, name: str) -> Columns:
        number, start, end = self.locations[name]
        return {
            column: values[start[1] : end[1]] if column == "bytes" else values[start[0] : end[0]]
            for column, values in self.slices[number].items()
        }

    def __call__(self, batch: Batch) -> Target:
        rows = [self._read_row(name) for name in batch.ids]
        columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return to_device(self.codec.decode(columns), batch.input_ids.device)
