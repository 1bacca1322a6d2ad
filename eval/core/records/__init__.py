"""Records: measured facts with their provenance, one JSON file each, below `records/` of a run folder."""

import math
import operator
import os
import platform
import socket
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from eval.core.artifacts import library_versions, write_text
from eval.core.config import OneLine, Stored
from eval.core.errors import UserError, first_error
from eval.core.records.measured import MOST, MOST_COUNT, Counted, Positive
from eval.core.records.measured import Arrivals as Arrivals
from eval.core.records.measured import Batched as Batched
from eval.core.records.measured import Bins as Bins
from eval.core.records.measured import Energy as Energy
from eval.core.records.measured import Process as Process
from eval.core.records.measured import Rerun as Rerun
from eval.core.records.measured import Server as Server

PLAIN = "plain"  # the recipe of the uncompressed student
TRAINING = "training documents"  # what the prompts of a cost are made of where a run folder is there
Kind = Literal["score", "test"]  # of scores: of the documents that decide, and of those kept unopened
VALIDATION = "validation"  # the slice of documents like the training ones


class Machine(Stored):
    host: str
    system: str
    cpu: str
    isa: str
    cores: int
    device: str  # cpu, or the name of the accelerator
    driver: str | None = None


class Provenance(Stored):
    artifact: str  # hash of the measured artifact
    config: str  # hash of the study; empty where none was there, until eval.cost.merge has bound the record
    machine: Machine
    versions: dict[str, str]
    time: str  # ISO 8601, UTC

    @field_validator("time")
    @classmethod
    def is_a_time(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError(f"{value!r} names no time zone")
        return value


class Documents(Stored):
    """Columns of equal length, one entry per scored document."""

    id: list[str]
    slice: list[str]
    bytes: list[int]  # what bits are divided by: of a text that is classified 1, the example that it is
    tokens: list[int]
    bits: list[float]  # negative log2 likelihood of the whole document
    correct: list[int] | None = None  # tokens that were held to be the likeliest
    calibration: dict[str, Bins] | None = None  # by slice
    cluster: list[str] | None = None  # documents of a slice in one are not independent; null: each is alone
    # where texts are classified: the number of the likeliest class, and the Brier score of all classes
    predicted: list[int] | None = Field(None, exclude_if=lambda value: value is None)
    brier: list[float] | None = Field(None, exclude_if=lambda value: value is None)

    @model_validator(mode="after")
    def check(self) -> Self:
        columns = self.id, self.slice, self.bytes, self.tokens, self.bits, self.correct, self.cluster
        classes = self.predicted, self.brier
        lengths = {len(column) for column in (*columns, *classes) if column is not None}
        if lengths == {0} or len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} entries; all must have the same, at least 1")
        if len(set(self.id)) < len(self.id) and (duplicate := self._find_duplicate()):
            raise ValueError(f"document {duplicate[1]!r} appears twice in slice {duplicate[0]!r}")
        # `min` and `map` look at 10,000 documents in a millisecond; a name is looked for on error alone
        if (least := min(self.bytes)) <= 0:
            name = self.id[self.bytes.index(least)]
            raise ValueError(f"document {name!r} has {least} bytes; drop empty documents")
        if not math.isfinite(sum(self.bits)) and not all(map(math.isfinite, self.bits)):
            name, bits = next(p for p in zip(self.id, self.bits, strict=True) if not math.isfinite(p[1]))
            raise ValueError(f"document {name!r} has {bits} bits; the model's output is not finite")
        if (least_bits := min(self.bits)) < 0:
            name = self.id[self.bits.index(least_bits)]
            raise ValueError(f"document {name!r} has {least_bits} bits; a likelihood is at most 1")
        self._check_bounds()
        counts = self.tokens if self.correct is None else self.correct
        if min(counts) < 0 or any(map(operator.gt, counts, self.tokens)):
            named = zip(self.id, self.tokens, counts, strict=True)
            name, tokens, correct = next(row for row in named if not 0 <= row[2] <= row[1])
            raise ValueError(f"document {name!r} has {tokens} tokens, of which {correct} are correct")
        if self.calibration is not None and set(self.calibration) != (slices := set(self.slice)):
            raise ValueError(
                f"calibration of slices {sorted(self.calibration)}, documents of {sorted(slices)}"
            )
        return self

    def _check_bounds(self) -> None:
        """Raises ValueError at a count or a sum that no document has: a figure made of it is none."""
        columns: dict[str, tuple[Sequence[float], float]] = {
            "bytes": (self.bytes, MOST_COUNT),
            "tokens": (self.tokens, MOST_COUNT),
            "bits": (self.bits, MOST),
        }
        for unit, (column, most) in columns.items():
            if max(column) > most:
                name = self.id[column.index(max(column))]
                raise ValueError(f"document {name!r} has more than {most:g} {unit}")

    @property
    def clusters(self) -> list[str]:
        """The cluster of each document: where none are named, each is one of its own."""
        return self.id if self.cluster is None else self.cluster

    def _find_duplicate(self) -> tuple[str, str] | None:
        """The first slice and id that come a second time."""
        seen: set[tuple[str, str]] = set()
        for pair in zip(self.slice, self.id, strict=True):
            if pair in seen:
                return pair
            seen.add(pair)
        return None


class Score(Stored):
    """Quality of one model on every document; on the test documents it is of a kind of its own."""

    schema_version: Literal[1] = 1
    kind: Kind = "score"
    arm: str  # B, T0, T1, S1, S0, CE
    seed: int
    recipe: str = PLAIN
    engine: str  # torch, openvino; method for a teacher that carries one
    by: OneLine | None = None  # what scored it elsewhere, with its version; null: this project, by `engine`
    metric: Literal["bits_per_byte"] = "bits_per_byte"
    data: str  # hash of the data artifact
    documents: Documents
    provenance: Provenance


class TargetRecord(Stored):
    """What was measured of one variant on one target, and how."""

    schema_version: Literal[1] = 1
    kind: Literal["cost", "load"]
    arm: str
    seed: int
    recipe: str = PLAIN
    engine: str
    target: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    warmup: Counted | None = None  # requests; null in older records: unknown
    prompts: str = TRAINING  # what the prompts were made of
    provenance: Provenance


class CostRecord(TargetRecord):
    """Cost of one variant on one target."""

    kind: Literal["cost"] = "cost"
    disk_bytes: Counted
    processes: list[Process] = Field(min_length=1)  # in rounds: process r of every variant ran in round r


class LoadRecord(TargetRecord):
    """Open-loop load of one variant on one target."""

    kind: Literal["load"] = "load"
    seconds: Positive  # per rate
    slo_ms: Positive | None
    processes: list[Server] = Field(min_length=1)  # in rounds, whose arrivals all variants share


class SampleScores(Stored):
    """Columns of equal length, one entry per sample of a task."""

    id: list[str] = Field(min_length=1)
    value: list[float]  # its score, 0 to 1
    raw: list[float] | None = None  # of multiple choice: by likelihood not divided by bytes
    output: list[str] | None = None  # what was generated

    @model_validator(mode="after")
    def check(self) -> Self:
        columns = self.id, self.value, self.raw, self.output
        if len({len(column) for column in columns if column is not None}) > 1:
            raise ValueError("columns of different lengths")
        if len(set(self.id)) < len(self.id) or not all(0 <= value <= 1 for value in self.value):
            raise ValueError("a sample appears twice, or its score is not between 0 and 1")
        return self


class TaskScore(Stored):
    """Scores of one model on the samples of one task."""

    schema_version: Literal[1] = 1
    kind: Literal["task"] = "task"
    task: str  # its name in the study
    source: str  # digest of the settings and the file of the task
    metric: str
    arm: str
    seed: int
    recipe: str = PLAIN
    engine: str
    samples: SampleScores
    provenance: Provenance


class Agreement(Stored):
    """How far a variant says what its uncompressed student says, on the validation documents."""

    schema_version: Literal[1] = 1
    kind: Literal["agreement"] = "agreement"
    arm: str
    seed: int
    recipe: str
    engine: str
    data: str  # hash of the data artifact
    student: str  # hash of the uncompressed student
    id: list[str] = Field(min_length=1)  # of documents, as are the columns below
    tokens: list[int]
    flips: list[int]  # tokens whose likeliest prediction differs
    kl_bits: list[float]  # sum over tokens of KL(student || variant)
    reruns: dict[str, Rerun] = Field(
        min_length=1
    )  # of the variant, on some of the documents: other batch, other threads
    provenance: Provenance

    @model_validator(mode="after")
    def check(self) -> Self:
        if len({len(column) for column in (self.id, self.tokens, self.flips, self.kl_bits)}) > 1:
            raise ValueError("columns of different lengths")
        if len(set(self.id)) < len(self.id):
            raise ValueError("a document appears twice")
        for tokens, flips, kl_bits in zip(self.tokens, self.flips, self.kl_bits, strict=True):
            Rerun(tokens=tokens, flips=flips, kl_bits=kl_bits)
        return self


Record = Score | CostRecord | LoadRecord  # what the gate judges
AnyRecord = Record | TaskScore | Agreement
R = TypeVar("R", Score, CostRecord, LoadRecord, TaskScore, Agreement)


def machine(device: str = "cpu", driver: str | None = None) -> Machine:
    """This machine, as records carry it."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return Machine(
        host=socket.gethostname(),
        system=platform.platform(),
        cpu=cpu,
        isa=torch.backends.cpu.get_cpu_capability(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        device=device,
        driver=driver,
    )


def provenance(artifact: str, config: str, device: str = "cpu", driver: str | None = None) -> Provenance:
    return Provenance(
        artifact=artifact,
        config=config,
        machine=machine(device, driver),
        versions={"python": platform.python_version(), **library_versions()},
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def record_path(run: Path, record: AnyRecord) -> Path:
    """`records/<kind>/[<target or task>/]<recipe>/<arm>-s<seed>.json`."""
    top = run / "records" / record.kind
    if isinstance(record, TargetRecord | TaskScore):
        top = top / (record.task if isinstance(record, TaskScore) else record.target)
    return top / record.recipe / f"{record.arm}-s{record.seed}.json"


def write_record(run: Path, record: AnyRecord) -> Path:
    path = record_path(run, record)
    write_text(path, record.model_dump_json() + "\n")
    return path


def _read(run: Path, path: Path, kind: type[R]) -> R:
    """A record that lies where its content says: else two may speak of one model."""
    try:
        record = kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise first_error(f"record {path}", error, "delete it and measure again") from error
    if path != record_path(run, record):
        raise UserError(f"record {path}", "its path and its content name different models", "delete it")
    return record


def each_score(run: Path, kind: Kind = "score") -> Iterator[Score]:
    """Every score record of a run, in the order of their paths; one at a time, for they are large."""
    for path in sorted((run / "records" / kind).glob("*/*.json")):
        yield _read(run, path, Score)


def read_scores(run: Path) -> list[Score]:
    """Every score record of a run, in the order of their paths."""
    return list(each_score(run))


def read_costs(run: Path) -> list[CostRecord]:
    """Every cost record of a run, in the order of their paths."""
    paths = sorted((run / "records" / "cost").glob("*/*/*.json"))
    return [_read(run, path, CostRecord) for path in paths]


def read_loads(run: Path) -> list[LoadRecord]:
    """Every load record of a run, in the order of their paths."""
    paths = sorted((run / "records" / "load").glob("*/*/*.json"))
    return [_read(run, path, LoadRecord) for path in paths]


def read_task_scores(run: Path) -> list[TaskScore]:
    """Every task record of a run, in the order of their paths."""
    paths = sorted((run / "records" / "task").glob("*/*/*.json"))
    return [_read(run, path, TaskScore) for path in paths]


def read_agreements(run: Path) -> list[Agreement]:
    """Every agreement record of a run, in the order of their paths."""
    paths = sorted((run / "records" / "agreement").glob("*/*.json"))
    return [_read(run, path, Agreement) for path in paths]
