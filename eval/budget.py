"""The budget: what a release must keep and what it may cost, fixed before the run."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from eval.sections import Frozen
from eval.study import Study, find_config, read_yaml, validated

Quantity = Literal[
    "prefill_p50",
    "prefill_p95",
    "prefill_p99",
    "decode_p50",
    "decode_p95",
    "decode_p99",
    "peak_memory",
    "disk",
]
UNITS = {"ms": 1.0, "s": 1e3, "B": 1.0, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3}


class Limit(Frozen):
    """An upper limit: `at_most: 20, unit: ms`, or `at_most: 0.5, of: plain` (a variant of the same run)."""

    at_most: float = Field(gt=0)
    unit: Literal["ms", "s", "B", "KiB", "MiB", "GiB"] | None = None
    of: str | None = None

    @model_validator(mode="after")
    def one_measure(self) -> Self:
        if (self.unit is None) == (self.of is None):
            raise ValueError("give exactly one of `unit` (absolute) and `of` (relative to a variant)")
        return self


class Target(Frozen):
    device: Literal["cpu", "cuda"]
    required: bool = True
    limits: dict[Quantity, Limit] = Field(default_factory=dict)

    @model_validator(mode="after")
    def units_fit(self) -> Self:
        for name, limit in self.limits.items():
            accepted = ["B", "KiB", "MiB", "GiB"] if name in ("peak_memory", "disk") else ["ms", "s"]
            if limit.unit is not None and limit.unit not in accepted:
                raise ValueError(f"{name} cannot be in {limit.unit}; accepted: {', '.join(accepted)}")
        return self


class Budget(Frozen):
    """f, g and alpha of the gate, the mandatory slices with their own f, and limits per target."""

    name: str
    alpha: float = Field(0.05, gt=0, lt=0.5)
    f: float = Field(gt=0, le=1)
    g: float = Field(gt=0, le=1)
    # mandatory slices beside the held-out one -> their own f
    slices: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    targets: dict[str, Target] = Field(min_length=1)


def load_budget(study: Study, name: str | None = None) -> Budget:
    """The study's budget, or the one named."""
    path = find_config("budgets", name or study.budget)
    return validated(Budget, read_yaml(path), str(path))
