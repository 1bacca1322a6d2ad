"""The shape of gate.json, schema version 1. Other programs read it; docs/statistics.md tells every field."""

from typing import Any, Literal

from eval.sections import Frozen
from eval.statistics import Verdict


class Estimate(Frozen):
    """A mean with its two-sided 95 % interval; bounds are null where the error is unknown."""

    point: float
    low: float | None
    high: float | None
    p: float | None = None  # one-sided, of "the mean is at most 0"; null for scores
    unit: str = "bits/byte"


class Kept(Frozen):
    """A ratio of two gains with its two-sided 95 % interval; all null where the ratio is undefined."""

    point: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = "fieller"
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None


class Students(Frozen):
    over_control: Kept  # (S1 - S0) / (T1 - T0)
    over_ce: Kept | None  # (S1 - CE) / (T1 - T0); null without a CE arm
    over_base: Kept  # (S1 - B) / (T1 - B): what a study without a control would claim


class Power(Frozen):
    """Of the held-out retention test of the uncompressed student, with this run as the pilot."""

    documents: int
    seeds: int
    effect: float  # bits/byte by which the kept gain exceeds f times the teacher's
    power_now: float | None
    seeds_for_80: int | None
    documents_for_80: int | None


class Part(Frozen):
    """One of the tests that a variant must pass; `low` and `high` are one-sided bounds at alpha."""

    name: str
    verdict: Verdict
    estimate: float | None
    low: float | None
    high: float | None
    limit: float
    unit: str
    p: float | None = None
    reason: str


class Slice(Frozen):
    kept_share: Kept
    verdict: Verdict | None  # null where the budget does not make the slice mandatory


class Relative(Frozen):
    """Ratio to another variant measured in the same rounds, with one-sided bounds at alpha."""

    point: float
    lower: float
    upper: float
    of: str


class Number(Frozen):
    """A measured cost with one-sided bounds at alpha; `value` is null where it could not be had honestly."""

    value: float | None
    lower: float | None
    upper: float | None
    unit: Literal["ms", "MiB"]
    requests: int  # timed values behind a percentile; processes for memory; 1 for disk
    processes: int
    needs: int | None = None  # timed values without which the percentile has no upper bound
    relative: Relative | None = None


class Hashes(Frozen):
    artifact: dict[str, str]  # seed -> hash of S1 after the recipe
    control: dict[str, str]  # seed -> hash of S0 after the recipe
    records: dict[str, str]  # path -> sha256


class Variant(Frozen):
    """One recipe on one target."""

    recipe: str
    target: str
    engine: str
    verdict: Verdict
    reason: str
    parts: list[Part]
    p: float  # of the quality parts together: the largest
    holm_p: float | None  # adjusted over the variants of the target that meet every limit; null for others
    kept_share: Kept
    kept_of_student: Kept
    guard_share: Kept
    slices: dict[str, Slice]
    scores: dict[str, Estimate]
    cost: dict[str, Number] | None
    measured: bool
    how: str | None
    hashes: Hashes
    recommended: bool


class Provenance(Frozen):
    config: str
    data: str
    machines: list[dict[str, Any]]
    versions: dict[str, str]
    artifacts: dict[str, str]
    records: dict[str, str]


class GateFile(Frozen):
    schema_version: Literal[1] = 1
    study: str
    title: str
    method: str
    verdict: Verdict
    reason: str
    recommended: dict[str, str | None]
    budget: dict[str, Any]
    seeds: list[int]
    documents: dict[str, int]
    teacher_gain: Estimate
    teacher_gain_slices: dict[str, Estimate]
    scores: dict[str, dict[str, Estimate]]
    kept_by_student: Students
    power: Power | None
    variants: list[Variant]
    provenance: Provenance
