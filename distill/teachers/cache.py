"""Teachers' targets on disk: made once, shard by shard, and found again by row and by the hash of its tokens.

A shard is one safetensors file that appears whole or not at all. Which rows it holds and what it says of
them depends on the rows alone, never on the number of processes nor on where a run was stopped.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from distill.losses.teacher_output import Dense, Sampled, States, Target, Teacher, TopK
from distill.models.generation import uniforms
from distill.teachers.codec import draw, pack, packed_bytes, unpack
from eval.core.artifacts import Manifest, digest, verify_artifact
from eval.core.documents import Batch, Row, batches, tokens_per_batch
from eval.core.errors import UserError
from eval.core.sections import Targets

Columns = dict[str, np.ndarray]  # an entry per token; of "bytes", as many as the tokens need
S = TypeVar("S")
KEY = 16  # bytes of a row's hash that are kept
SHARD_TOKENS, SHARD_BYTES, SHARDS = 2**14, 2**26, 512
REBUILD = "delete the folder and run again"


def row_key(row: Row) -> str:
    """What tells a row: its id, its tokens and which of them are predicted."""
    return digest({**vars(row), "id": row.id})


class Codec(ABC):
    """How targets are written: a distribution to columns, and back to what a loss takes."""

    name: ClassVar[str]
    vocabulary: int

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """All that a reader must know, and that must be as the study says."""

    @abstractmethod
    def most_bytes(self) -> int:
        """Of one token, whatever the teacher says."""

    @abstractmethod
    def columns(self, log_probs: torch.Tensor, key: str) -> Columns:
        """[n, V] float32 log-probabilities at T = 1 of the n predicted tokens of the row `key`."""

    @abstractmethod
    def target(self, columns: Columns) -> Target:
        """The target of the tokens whose columns these are."""


class DenseCodec(Codec):
    """Every log-probability in fp16: off by at most 2^-9 of a probability that is above e^-8."""

    name = "dense"

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    @property
    def facts(self) -> dict[str, Any]:
        return {"form": self.name, "vocabulary": self.vocabulary}

    def most_bytes(self) -> int:
        return 2 * self.vocabulary

    def columns(self, log_probs: torch.Tensor, key: str) -> Columns:
        return {"log_probs": log_probs.half().cpu().numpy()}

    def target(self, columns: Columns) -> Target:
        return Dense(torch.from_numpy(columns["log_probs"]))


class SampledCodec(Codec):
    """N draws at the temperature of the loss, packed, and the entropy of what they were drawn from."""

    name = "sampled"

    def __init__(self, vocabulary: int, draws: int, temperature: float) -> None:
        self.vocabulary, self.draws, self.temperature = vocabulary, draws, temperature
        self.count = np.min_scalar_type(draws)

    @property
    def facts(self) -> dict[str, Any]:
        settings = {"draws": self.draws, "temperature": self.temperature}
        return {"form": self.name, "vocabulary": self.vocabulary, **settings}

    def most_bytes(self) -> int:
        sizes = packed_bytes(np.arange(1, self.draws + 1), self.draws, self.vocabulary)
        return int(sizes.max()) + self.count.itemsize + 2

    def columns(self, log_probs: torch.Tensor, key: str) -> Columns:
        points = torch.from_numpy(uniforms(f"targets {key}", len(log_probs), self.draws))
        ids, entropy = draw(log_probs, points.to(log_probs.device), self.temperature)
        packed, distinct = pack(ids.cpu().numpy(), self.vocabulary)
        return {
            "bytes": packed,
            "distinct": distinct.astype(self.count),
            "entropy": entropy.half().cpu().numpy(),
        }

    def target(self, columns: Columns) -> Target:
        ids, counts = unpack(columns["bytes"], columns["distinct"], self.draws, self.vocabulary)
        entropy = torch.from_numpy(columns["entropy"]).float()
        return Sampled(torch.from_numpy(ids), torch.from_numpy(counts), entropy, self.temperature)


class TopKCodec(Codec):
    """The k likeliest ids, their log-probabilities in fp16, rounded down: the tail is never negative."""

    name = "top_k"

    def __init__(self, vocabulary: int, k: int) -> None:
        if k >= vocabulary:
            raise UserError("targets.k", k, f"the vocabulary has {vocabulary} ids: take targets.form: dense")
        self.vocabulary, self.k = vocabulary, k
        self.id = np.min_scalar_type(vocabulary - 1)

    @property
    def facts(self) -> dict[str, Any]:
        return {"form": self.name, "vocabulary": self.vocabulary, "k": self.k}

    def most_bytes(self) -> int:
        return self.k * (self.id.itemsize + 2)

    def columns(self, log_probs: torch.Tensor, key: str) -> Columns:
        values, ids = (tensor.cpu().numpy() for tensor in log_probs.topk(self.k, dim=-1))
        rounded = values.astype(np.float16)
        below = np.nextafter(rounded, np.float16(-np.inf))
        return {
            "ids": ids.astype(self.id),
            "log_probs": np.where(rounded.astype(np.float32) > values, below, rounded),
        }

    def target(self, columns: Columns) -> Target:
        ids = torch.from_numpy(columns["ids"].astype(np.int64))
        return TopK(ids, torch.from_numpy(columns["log_probs"]).float())


def make_codec(targets: Targets, vocabulary: int, temperature: float) -> Codec:
    """The form that a study asks for; draws are made at the temperature of its loss."""
    if targets.form == "sampled":
        return SampledCodec(vocabulary, targets.draws, temperature)
    return TopKCodec(vocabulary, targets.k) if targets.form == "top_k" else DenseCodec(vocabulary)


def shard_batches(rows: list[Row], pad: int, form: Codec) -> Iterator[list[Batch]]:
    """The batches of every shard, which the rows and the form alone decide."""
    total = sum(row.predicted for row in rows)
    least = max(SHARD_TOKENS, total // SHARDS)  # few files for many tokens, little lost by a stop
    limit = min(least, SHARD_BYTES // form.most_bytes())
    held: list[Batch] = []
    tokens = 0
    for batch in batches(rows, pad, tokens_per_batch(form.vocabulary)):
        held.append(batch)
        tokens += int(batch.mask.sum())
        if tokens >= limit:
            yield held
            held, tokens = [], 0
    if held:
        yield held


def _encode_rows(batch: Batch, keys: dict[str, str], teacher: Teacher, form: Codec) -> Iterator[Columns]:
    """The columns of each row of a batch, with its key and how many tokens and bytes it has."""
    target, start = teacher(batch), 0
    assert isinstance(target, Dense | States), "a teacher that runs knows every probability"
    for name, tokens in zip(batch.ids, batch.mask.sum(1).tolist(), strict=True):
        columns = form.columns(target.log_softmax(start, start + tokens), keys[name])
        key = np.frombuffer(bytes.fromhex(keys[name])[:KEY], dtype=np.uint8)[None]
        size = np.array([[tokens, len(columns.get("bytes", ()))]], dtype=np.int64)
        yield {**columns, "row": key, "size": size}
        start += tokens


def _check_disk_space(folder: Path, form: Codec, tokens: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    needed, free = tokens * form.most_bytes() - there, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        size = f"{tokens} tokens of at most {form.most_bytes()} bytes take {needed / 2**30:.1f} GiB"
        fix = f"{free / 2**30:.1f} GiB are free: set targets.source: online, or targets.form: sampled"
        raise UserError(f"targets {folder}", size, fix)


def write_missing_shards(
    place: Path,
    suffix: str,
    shards: Iterable[S],
    write: Callable[[Path, S], None],
    process: int,
    processes: int,
) -> None:
    """Writes every shard that is this process's and not there yet; each appears whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        path = place / f"shard-{number:05}.{suffix}"
        if number % processes == process and not path.is_file():
            aside = path.with_suffix(".tmp")
            write(aside, shard)
            aside.replace(path)


def write_shards(
    place: Path,
    rows: list[Row],
    teacher: Teacher,
    form: Codec,
    *,
    pad: int,
    report: Callable[[float], None],
    process: int = 0,
    processes: int = 1,
) -> None:
    """Writes every shard that is this process's and not there yet.

    Args:
        place: a folder that all processes share; shards of an earlier, stopped run are kept.
        teacher: knows every probability (Dense or States).

    Raises:
        UserError: the disk does not have the room.
    """
    keys = {row.id: row_key(row) for row in rows}
    assert len(keys) == len(rows), "row ids are unique"
    place.mkdir(parents=True, exist_ok=True)
    _check_disk_space(place, form, sum(row.predicted for row in rows))
    done = 0

    def shard(aside: Path, held: list[Batch]) -> None:
        nonlocal done
        parts: list[Columns] = []
        for batch in held:
            parts += _encode_rows(batch, keys, teacher, form)
            done += len(batch.ids)
            report(min(1.0, processes * done / len(rows)))
        save_file({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, aside)

    write_missing_shards(place, "safetensors", shard_batches(rows, pad, form), shard, process, processes)


def link_shards(place: Path, folder: Path, tokens: int) -> dict[str, float]:
    """Puts all shards into the artifact that is being built; what to note in its manifest.

    They are linked, not moved: a stop before the artifact is whole loses none of them.
    """
    size = 0
    for path in sorted(place.glob("shard-*")):
        size += path.stat().st_size
        try:
            os.link(path, folder / path.name)
        except OSError:  # a file system without links
            shutil.copyfile(path, folder / path.name)
    return {"tokens": tokens, "bytes_per_token": round(size / tokens, 2)}


def to_device(target: Target, device: torch.device) -> Target:
    """The same target with its tensors moved."""
    moved = {n: v.to(device) for n, v in vars(target).items() if isinstance(v, torch.Tensor)}
    return replace(target, **moved)  # type: ignore[arg-type]


def check_lineage(folder: Path, manifest: Manifest, wanted: dict[str, Any]) -> None:
    """Refuses targets of another teacher, tokenizer, data or form, naming what differs first."""
    for name, value in wanted.items():
        if manifest.facts.get(name) != value:
            found = f"{name} is {manifest.facts.get(name)}, of this study it is {value}"
            raise UserError(f"targets {folder}", found, REBUILD)


class CachedTeacher:
    """A teacher that reads its targets from disk, mapped into memory.

    Raises:
        UserError: the cache is damaged; or of another teacher, tokenizer, data, form or temperature; or has
            no such row, or not of these tokens.
    """

    def __init__(self, folder: Path, rows: list[Row], form: Codec, lineage: dict[str, Any]) -> None:
        check_lineage(folder, verify_artifact(folder), lineage | form.facts)
        self.form = form
        self.files = [safe_open(p, framework="numpy") for p in sorted(folder.glob("shard-*.safetensors"))]
        names = [name for name in self.files[0].keys() if name not in ("row", "size")]  # noqa: SIM118
        self.slices = [{name: file.get_slice(name) for name in names} for file in self.files]
        places: dict[bytes, tuple[int, np.ndarray, np.ndarray]] = {}
        for number, file in enumerate(self.files):
            ends = np.cumsum(file.get_tensor("size"), axis=0)
            for key, start, end in zip(
                file.get_tensor("row"), ends - file.get_tensor("size"), ends, strict=True
            ):
                places[key.tobytes()] = number, start, end
        self.places = {}
        for row in rows:
            key = bytes.fromhex(row_key(row))[:KEY]
            if key not in places:
                raise UserError(f"targets {folder}", f"row {row.id} is not of these tokens", REBUILD)
            self.places[row.id] = places[key]

    def _columns(self, name: str) -> Columns:
        number, start, end = self.places[name]
        return {
            column: part[start[1] : end[1]] if column == "bytes" else part[start[0] : end[0]]
            for column, part in self.slices[number].items()
        }

    def __call__(self, batch: Batch) -> Target:
        parts = [self._columns(name) for name in batch.ids]
        target = self.form.target({name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
        return to_device(target, batch.input_ids.device)
