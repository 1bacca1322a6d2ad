"""The shape of gate.json, schema version 3. Other programs read it; docs/statistics.md has every field."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from eval.core.budget import Budget
from eval.core.config import OneLine, Stored
from eval.core.errors import UserError, first_error
from eval.stats.crossed import Verdict


class Estimate(Stored):
    """A mean with the two-sided interval of `level`; bounds are null where the error is unknown."""

    point: float
    low: float | None
    high: float | None
    p: float | None = None  # one-sided, of "the mean is at most 0"; null for scores
    unit: str = "bits/byte"
    by_seed: list[float] = Field(default_factory=list)  # the same of each seed, in the order of `seeds`


class KeptShare(Stored):
    """A ratio of two gains with the two-sided interval of `level`; all null where it is undefined."""

    point: float | None = None
    low: float | None = None
    high: float | None = None
    method: str = "fieller"
    bootstrap_low: float | None = None
    bootstrap_high: float | None = None
    by_seed: list[float] = Field(default_factory=list)  # of each seed's own two gains; empty where undefined


class Link(Stored):
    """One step from the teacher's gain to the variant's; the product of all links is the kept share."""

    step: str  # `distil`, else the recipe that the step leads to
    over: str  # what the share is of: `teacher`, else the recipe before
    share: KeptShare


class Students(Stored):
    over_control: KeptShare  # (S1 - S0) / (T1 - T0)
    over_ce: KeptShare | None  # (S1 - CE) / (T1 - T0); null without a CE arm
    over_base: KeptShare  # (S1 - B) / (T1 - B): what a study without a control would claim


class Rival(Stored):
    """Something simpler than the student S1, uncompressed, on validation."""

    arm: str
    what: str
    lead: Estimate  # bits/byte by which it is better than S1
    beats: bool  # beyond doubt: the lower bound of `lead` at alpha is above 0
    spoiled: bool = False  # it ended worse than the base it began with: its training, not its idea, lost


class Power(Stored):
    """Of the validation retention test of the uncompressed student, with this run as the pilot."""

    clusters: int  # of documents: see `clusters` of the file
    seeds: int
    effect: float  # bits/byte by which the kept gain exceeds f times the teacher's
    power_now: float | None
    power_low: float | None = None  # 80 % interval of power_now, for the variances themselves are estimates
    power_high: float | None = None
    seeds_for_80: int | None
    clusters_for_80: int | None
    share_for_80: float | None = None  # the least true share that this plan passes with 80 %


class Part(Stored):
    """One of the tests that a variant must pass; `low` and `high` are one-sided bounds at alpha."""

    name: str
    verdict: Verdict
    estimate: float | None
    low: float | None
    high: float | None
    limit: float
    unit: str
    p: float | None = None  # one-sided, of "it does not hold"
    p_fail: float | None = None  # one-sided, of "it holds"; null where it was counted, or could not be tested
    reason: str
    remedy: str | None = None  # what would make it pass, in a few words; null where it does


class Slice(Stored):
    kept_share: KeptShare
    verdict: Verdict | None  # null where the budget does not make the slice mandatory


class Relative(Stored):
    """Ratio to another variant of the same rounds, with one-sided bounds at alpha; none of p95 and p99."""

    point: float
    lower: float
    upper: float
    of: str


class Number(Stored):
    """A measured cost with one-sided bounds at alpha; `value` is null where it could not be measured."""

    value: float | None
    lower: float | None
    upper: float | None
    unit: Literal["ms", "s", "MiB", "J/token", "requests/s", "tokens/s"]
    requests: int  # timed values behind a percentile or a knee; 1 for disk; else the processes
    processes: int
    needs: int | None = None  # timed values without which the percentile has no upper bound
    relative: Relative | None = None


class Rate(Stored):
    """What was measured in real time at one rate of requests; latencies from the intended arrival."""

    rate: float  # asked, requests/s
    offered_rps: Number  # that arrived
    throughput_rps: Number
    throughput_tokens_per_s: Number
    ttft_p95: Number  # until the first token, the wait included
    p50: Number  # until the last token
    p95: Number
    p99: Number
    follows: int  # processes that kept up: as many waited at the end as in a queue with their times


class Comparison(Stored):
    """Two variants on the same seeds and documents, and in the same rounds of measurements."""

    recipe: str
    over: str  # the other recipe
    lead: Estimate  # bits/byte by which `recipe` is better, validation
    decode: dict[str, Relative]  # target -> ratio of its decode p50 to the other's; of classifiers, prefill


class Reference(Stored):
    """What a release replaces or falls back to, measured in the same rounds: it is judged by no limit."""

    arm: str  # T1: the teacher with its method; B: the fallback
    target: str
    cost: dict[str, Number] | None  # null where it was not measured
    pick: dict[str, Relative] = Field(default_factory=dict)  # quantity -> the pick's, as a share of it
    how: str | None  # the command that measures it, or why none can


class Load(Stored):
    """Open-loop load on one server, first come first served, batch 1."""

    knee_rps: Number  # the highest rate whose p95 is within the SLO; without one, what the server can do
    knee_tokens_per_s: Number  # generated
    slo_ms: float | None
    seconds: float  # of arrivals per rate and process
    rates: list[Rate]


class Hashes(Stored):
    artifact: dict[str, str]  # seed -> hash of S1 after the recipe
    control: dict[str, str]  # seed -> hash of S0 after the recipe
    records: dict[str, str]  # path -> sha256


class Variant(Stored):
    """One recipe on one target."""

    recipe: str
    target: str
    engine: str
    verdict: Verdict
    reason: str
    parts: list[Part]
    p: float  # of its own quality parts together: the largest; the teacher's gain is tested once for all
    holm_p: float | None  # adjusted over the variants of the target that meet every limit; null for others
    kept_share: KeptShare
    kept_of_student: KeptShare
    guard_share: KeptShare
    chain: list[Link] = Field(default_factory=list)  # from the teacher's gain to this variant's
    zeros: float | None = None  # share of all its weights, embeddings included, that are zero
    low_bit: float | None = None  # share that is stored in 8 bits or fewer; null for plain, as is `zeros`
    reached: float | None = None  # least share that a pass went through of the weights that it is named after
    slices: dict[str, Slice]
    scores: dict[str, Estimate]
    cost: dict[str, Number] | None
    load: Load | None = None  # null where it was not measured
    measured: bool
    how: str | None
    hashes: Hashes
    recommended: bool


class Difference(Stored):
    """How far a variant is from its student, and from itself run again: below `floor` there is only noise."""

    value: float
    low: float | None
    high: float | None
    floor: float
    unit: str


class Quality(Stored):
    """What a recipe does to the student beside bits per byte; empty or null where it was not measured."""

    accuracy: dict[str, Estimate]  # by slice: share of next tokens predicted correctly
    calibration_error: dict[str, Estimate]  # by slice; the interval is over seeds, documents held fixed
    worst_slice: str | None  # where the smallest share of the gain is kept
    flips: Difference | None
    kl: Difference | None
    tasks: dict[str, dict[str, Estimate | None]]  # task -> arm -> mean score; null where it was not measured
    how: dict[str, str] = Field(default_factory=dict)  # `flips and KL`, `tasks` if not measured -> how to


class Classes(Stored):
    """How a model classifies the texts of a slice, or of one domain in it; seeds and texts are crossed."""

    arm: str
    recipe: str
    slice: str
    domain: str | None  # null: all of the slice
    texts: int
    looked_for: int  # texts of the class that is looked for: the last of `data.labels`, such as spam
    accuracy: Estimate
    f1: Estimate | None  # of that class; null where there is none of it
    false_alarms: Estimate | None  # share of the other texts that are held for it; null where there are none
    brier: float  # mean over seeds and texts, 0 to 2
    calibration_error: float | None  # mean over seeds; of a whole slice


class Opening(Stored):
    """One look at the test documents; `verdict` and what follows are null until they are scored."""

    schema_version: int = 1
    number: int
    previous: str | None = None  # sha256 of the opening before; null for the first
    time: str  # ISO 8601, UTC
    by: OneLine
    reason: OneLine | None  # why they were opened again; null for the first time
    recipe: str
    target: str | None  # for which the gate recommended it
    budget: str  # hash
    config: str  # hash of the study
    data: str
    artifacts: dict[str, str]  # arm/s<seed>/recipe -> hash
    documents: int | None = None
    verdict: Verdict | None = None
    parts: list[Part] = Field(default_factory=list)
    teacher_gain: Estimate | None = None
    kept_share: KeptShare | None = None
    guard_share: KeptShare | None = None
    slices: dict[str, KeptShare] = Field(default_factory=dict, exclude_if=lambda value: not value)


class Look(Stored):
    """What is reported of every opening."""

    number: int
    time: str
    by: OneLine
    reason: OneLine | None
    recipe: str
    verdict: Verdict | None
    same: bool = True  # of the artifacts that this file judges
    seen: list[str] = Field(
        default_factory=list, exclude_if=lambda value: not value
    )  # its recipes: see history


class OnTestSet(Stored):
    """The last look at the test documents: the estimate to quote, for nothing was chosen by it."""

    openings: int  # so far; only the first is free of what was learned from the ones before
    time: str
    by: OneLine
    recipe: str
    target: str | None
    current: bool  # whether it was of the artifacts and the budget of this file
    documents: int | None
    verdict: Verdict | None
    parts: list[Part]
    teacher_gain: Estimate | None
    kept_share: KeptShare | None
    guard_share: KeptShare | None
    slices: dict[str, KeptShare] = Field(default_factory=dict, exclude_if=lambda value: not value)
    history: list[Look]


class Extent(Stored):
    """How much evidence there was; in gate.json the most of all verdicts of this run folder so far."""

    seeds: int
    documents: dict[str, int]  # by slice
    variants: int  # measured, on all targets
    records: int
    rivals: list[str] = Field(default_factory=list, exclude_if=lambda value: not value)  # arms


class GateRun(Stored):
    """One verdict that the gate gave: a line of gate-runs.jsonl. The same one again is not counted twice."""

    number: int
    time: str  # ISO 8601, UTC
    plan: str  # hash of the plan that was fixed then; empty without one
    budget: OneLine  # its name
    budget_hash: str
    evidence: str  # digest of the hashes of every record and artifact
    extent: Extent | None = Field(None, exclude_if=lambda value: value is None)  # null in older lines
    openings: int  # of the test documents so far
    opening: str | None  # sha256 of the last one, if it was scored to its end
    verdict: Verdict
    previous: str | None  # sha256 of the line before; null for the first


class Fixed(Stored):
    """The plan that was fixed when training began, and how this verdict stands to it."""

    time: str
    hash: str
    budget: str  # name of the budget in it
    other: bool  # this file was judged by another budget than that
    late: (
        bool  # it was fixed after the first of the figures that it judges, or after a verdict by another one
    )
    changes: list[str]  # what differs from it by now, in this budget, in the study's file and in the recipes


class Provenance(Stored):
    tool: str = ""  # name and version of what judged
    times: dict[str, list[str]] = Field(default_factory=dict)  # of scores, costs by target: first, last
    config: str
    data: str
    machines: list[dict[str, Any]]
    versions: dict[str, str]
    artifacts: dict[str, str]
    records: dict[str, str]


class GateFile(Stored):
    schema_version: Literal[3] = 3
    study: str
    title: str
    task: str = Field("causal_lm", exclude_if=lambda value: value == "causal_lm")  # of the study
    folder: str  # of the run, as commands named it then
    method: str
    verdict: Verdict
    reason: str
    anomalies: list[str] = Field(default_factory=list)  # what is too good to be true, and what to check
    notes: list[str] = Field(default_factory=list)  # what the verdict is conditional on
    recommended: dict[str, str | None]
    as_good: dict[str, list[str]]  # by target: as fast as far as can be told, and keep no larger share
    level: float  # of every two-sided interval: 1 - 2 alpha, so that its ends are the bounds that decide
    budget: dict[str, Any]
    seeds: list[int]
    documents: dict[str, int]
    clusters: dict[str, int]  # of documents that are not independent; as many as documents where all are
    teacher_gain: Estimate
    teacher_gain_slices: dict[str, Estimate]
    scores: dict[str, dict[str, Estimate]]
    kept_by_student: Students
    rivals: list[Rival]
    below_base: dict[str, dict[str, Estimate]] = Field(default_factory=dict)  # rival -> slice -> by how much
    power: Power | None
    variants: list[Variant]
    references: list[Reference] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    quality: dict[str, Quality] = Field(default_factory=dict)  # by recipe
    classes: list[Classes] = Field(default_factory=list, exclude_if=lambda value: not value)
    test_set: OnTestSet | None = None  # null: never opened
    fixed: Fixed | None  # null: nothing was fixed when the run was trained
    runs: list[GateRun] = Field(default_factory=list)  # every verdict of this run folder, this one included
    extent: Extent
    provenance: Provenance


def read_gate(run: Path) -> GateFile:
    path, fix = run / "gate.json", f"run `absorb gate --study {run}`"
    if not path.is_file():
        raise UserError("gate.json", f"missing in {run}", fix)
    try:
        gate = GateFile.model_validate_json(path.read_bytes())
        Budget.of_gate(gate.budget)
        return gate
    except ValidationError as error:
        raise first_error(path, error, fix) from error
