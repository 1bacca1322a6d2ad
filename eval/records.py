"""Records: measured facts with their provenance, one JSON file each, below `records/` of a run folder."""

import math
import os
import platform
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import ValidationError, model_validator

from eval.artifacts import versions, write_text
from eval.errors import UserError
from eval.sections import Frozen
from eval.study import Study, find_config, read_yaml

PLAIN = "plain"  # the recipe of the uncompressed student
HELDOUT = "heldout"  # the slice of documents like the training ones


class Machine(Frozen):
    host: str
    system: str
    cpu: str
    isa: str
    cores: int
    device: str  # cpu, or the name of the accelerator
    driver: str | None = None


class Provenance(Frozen):
    artifact: str  # hash of the measured artifact
    config: str  # hash of the study
    machine: Machine
    versions: dict[str, str]
    time: str  # ISO 8601, UTC


class Documents(Frozen):
    """Columns of equal length, one entry per scored document."""

    id: list[str]
    slice: list[str]
    bytes: list[int]
    tokens: list[int]
    bits: list[float]  # negative log2 likelihood of the whole document

    @model_validator(mode="after")
    def sound(self) -> Self:
        lengths = {len(c) for c in (self.id, self.slice, self.bytes, self.tokens, self.bits)}
        if lengths == {0} or len(lengths) != 1:
            raise ValueError(f"columns of {sorted(lengths)} entries; all must have the same, at least 1")
        if len(set(zip(self.slice, self.id, strict=True))) < len(self.id):
            raise ValueError("a document id appears twice in one slice")
        for name, size, bits in zip(self.id, self.bytes, self.bits, strict=True):
            if size <= 0:
                raise ValueError(f"document {name!r} has {size} bytes; drop empty documents")
            if not math.isfinite(bits):
                raise ValueError(f"document {name!r} has {bits} bits; the model's output is not finite")
        return self


class Score(Frozen):
    """Quality of one model on every document."""

    schema_version: int = 1
    kind: Literal["score"] = "score"
    arm: str  # B, T0, T1, S1, S0, CE
    seed: int
    recipe: str = PLAIN
    engine: str  # torch, openvino; method for a teacher that carries one
    metric: Literal["bits_per_byte"] = "bits_per_byte"
    data: str  # hash of the data artifact
    documents: Documents
    provenance: Provenance


class Process(Frozen):
    """What one fresh process measured."""

    prefill_ms: list[float]  # one entry per request
    decode_ms: list[float]  # one entry per generated token after the first
    load_s: float
    peak_memory_bytes: int  # VmHWM on a CPU, the reserved peak on CUDA


class Measured(Frozen):
    """Cost of one variant on one target."""

    schema_version: int = 1
    kind: Literal["cost"] = "cost"
    arm: str
    seed: int
    recipe: str = PLAIN
    engine: str
    target: str
    disk_bytes: int
    prompt_tokens: int
    new_tokens: int
    threads: int
    processes: list[Process]  # in rounds: process r of every variant ran in round r
    provenance: Provenance


def recipe_names(study: Study) -> list[str]:
    """Names of the study's variants, the uncompressed student first."""
    names = [PLAIN]
    for recipe in study.recipes:
        path = find_config("recipes", recipe)
        name = read_yaml(path).get("name")
        if not isinstance(name, str):
            raise UserError(f"{path}: name", repr(name), "give the recipe a name")
        names.append(name)
    return names


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
        cores=len(os.sched_getaffinity(0)),
        device=device,
        driver=driver,
    )


def provenance(artifact: str, config: str, device: str = "cpu", driver: str | None = None) -> Provenance:
    return Provenance(
        artifact=artifact,
        config=config,
        machine=machine(device, driver),
        versions={"python": platform.python_version(), **versions()},
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def record_path(run: Path, record: Score | Measured) -> Path:
    """`records/score/<recipe>/<arm>-s<seed>.json`, or the same under `records/cost/<target>/`."""
    top = run / "records" / record.kind
    if isinstance(record, Measured):
        top = top / record.target
    return top / record.recipe / f"{record.arm}-s{record.seed}.json"


def write_record(run: Path, record: Score | Measured) -> Path:
    path = record_path(run, record)
    write_text(path, record.model_dump_json() + "\n")
    return path


def _read(path: Path, kind: type[Score] | type[Measured]) -> Score | Measured:
    try:
        return kind.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"record {path}", f"{place}: {first['msg']}", "delete it and measure again"
        ) from error


def read_scores(run: Path) -> list[Score]:
    """Every score record of a run, in the order of their paths."""
    paths = sorted((run / "records" / "score").glob("*/*.json"))
    return [record for p in paths if isinstance(record := _read(p, Score), Score)]


def read_costs(run: Path) -> list[Measured]:
    """Every cost record of a run, in the order of their paths."""
    paths = sorted((run / "records" / "cost").glob("*/*/*.json"))
    return [record for p in paths if isinstance(record := _read(p, Measured), Measured)]
