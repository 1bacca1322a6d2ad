"""The budget: what a release must keep and what it may cost, fixed before the run."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from eval.core.config import FileName, Frozen, OneLine, find_config, read_yaml, validate_config
from eval.core.study import Study

Quantity = Literal[
    "prefill_p50",
    "prefill_p95",
    "prefill_p99",
    "decode_p50",
    "decode_p95",
    "decode_p99",
    "peak_memory",
    "device_memory",
    "disk",
    "load_time",
    "energy",
    "knee",
    "throughput",
]
Unit = Literal["ms", "s", "B", "KiB", "MiB", "GiB", "J/token", "requests/s", "tokens/s"]
UNITS: dict[str, float] = {
    **{"ms": 1.0, "s": 1e3, "B": 1.0, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3},
    **dict.fromkeys(["J/token", "requests/s", "tokens/s"], 1.0),
}
OTHER_NAMES = {
    f"{alias}_{percentile}": f"{phase}_{percentile}"
    for alias, phase in (("ttft", "prefill"), ("tpot", "decode"))
    for percentile in ("p50", "p95", "p99")
}
NO_RATIO = ("_p95", "_p99")  # percentiles far out: no bound of their ratio to another variant's is known
AT_LOAD = ("knee", "throughput")  # measured by eval.cost.load; more is better
ACCEPTED: dict[str, list[str]] = {
    **{name: ["B", "KiB", "MiB", "GiB"] for name in ("peak_memory", "device_memory", "disk")},
    "energy": ["J/token"],
    "knee": ["requests/s"],
    "throughput": ["tokens/s"],
}


class Limit(Frozen):
    """`at_most: 20, unit: ms`, or `at_most: 0.5, of: plain` (a variant of the same run); or `at_least`."""

    at_most: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="upper limit, in `unit`, or as a share of `of`"
    )
    at_least: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="lower limit, for knee and throughput"
    )
    unit: Unit | None = Field(None, description="unit of an absolute limit")
    of: str | None = Field(
        None,
        description="variant of the same run that a relative limit is a share of; none for p95 and p99, of "
        "which no ratio has a bound",
    )

    @model_validator(mode="after")
    def one_measure(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give exactly one of `at_most` and `at_least`")
        if (self.unit is None) == (self.of is None):
            raise ValueError("give exactly one of `unit` (absolute) and `of` (relative to a variant)")
        return self

    @property
    def value(self) -> float:
        limit = self.at_most if self.at_least is None else self.at_least
        assert limit is not None
        return limit


class Target(Frozen):
    """A kind of machine that the release runs on."""

    device: Literal["cpu", "cuda"] = Field(description="where its costs are measured")
    required: bool = Field(True, description="whether something must ship on it for the verdict PASS")
    limits: dict[Quantity, Limit] = Field({}, description="quantity -> limit")

    @field_validator("limits", mode="before")
    @classmethod
    def under_one_name(cls, limits: Any) -> Any:
        """Time to first token and time per output token are kept as prefill and decode."""
        if not isinstance(limits, dict):
            return limits
        renamed: dict[Any, Any] = {}
        for given, limit in limits.items():
            name = OTHER_NAMES.get(given, given)
            if name in renamed:
                names = [alias for alias in limits if OTHER_NAMES.get(alias, alias) == name]
                raise ValueError(f"{' and '.join(names)} are the same quantity: give one of them")
            renamed[name] = limit
        return renamed

    @model_validator(mode="after")
    def units_fit(self) -> Self:
        for name, limit in self.limits.items():
            accepted = ACCEPTED.get(name, ["ms", "s"])
            if limit.unit is not None and limit.unit not in accepted:
                raise ValueError(f"{name} cannot be in {limit.unit}; accepted: {', '.join(accepted)}")
            if limit.of is not None and name.endswith(NO_RATIO):
                raise ValueError(f"{name}: no bound for that ratio; give an absolute limit, in ms or s")
            side = "at_least" if name in AT_LOAD else "at_most"
            if getattr(limit, side) is None:
                raise ValueError(f"{name} takes `{side}`")
        return self


class Waivers(Frozen):
    """What may be signed that did not pass."""

    signatures: int = Field(1, ge=1, description="keys that must have signed the same waiver")
    days: int = Field(90, ge=1, le=3650, description="days from a signature to the last day that it may name")


class Budget(Frozen):
    """f, g and alpha of the gate, the mandatory slices with their own f, and limits per target."""

    name: OneLine = Field(description="name in the report and in gate.json")
    alpha: float = Field(0.05, ge=1e-6, lt=0.5, description="chance that a variant passes which should not")
    f: float = Field(
        gt=0, le=1, description="share of the teacher's gain that a variant must retain on validation"
    )
    g: float | None = Field(
        None,
        gt=0,
        le=1,
        description="guard: share of the student's gain over the base that a variant must keep",
    )
    delta_min: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="guard: gain over the base that a variant must have, in bits per byte",
    )
    over_ce: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of the teacher's gain by which the student must beat plain training (arm CE)",
    )
    slices: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        {}, description="mandatory slice beside validation -> its own `f`"
    )
    waivers: Waivers = Waivers()
    targets: dict[FileName, Target] = Field(min_length=1, description="name -> machine and its limits")

    @model_validator(mode="after")
    def one_guard(self) -> Self:
        if (self.g is None) == (self.delta_min is None):
            raise ValueError("give exactly one of `g` (a share) and `delta_min` (bits per byte)")
        return self

    @model_validator(mode="after")
    def a_target_is_required(self) -> Self:
        if not any(target.required for target in self.targets.values()):
            raise ValueError("targets: no required target; set required: true on one")
        return self

    @classmethod
    def of_gate(cls, values: dict[str, Any]) -> Self:
        """What gate.json was judged by, of the entry `budget` in it, which has more beside it."""
        return cls.model_validate({key: value for key, value in values.items() if key in cls.model_fields})


def load_budget(study: Study, name: str | None = None) -> Budget:
    """The study's budget, or the one named."""
    path = find_config("budgets", study.budget if name is None else name)
    return validate_config(Budget, read_yaml(path, "budgets"), str(path))
