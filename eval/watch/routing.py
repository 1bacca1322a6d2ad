"""Which arm answers a request: the plan of a rollout, and a hash of the request's key."""

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eval.core.artifacts import digest
from eval.core.config import FileName, Frozen

Arm = Literal["release", "fallback"]
ARMS: tuple[Arm, Arm] = ("release", "fallback")
MEASURES = {
    "loss": "bits per byte",
    "reward": "mean reward, 0 to 1",
    "errors": "share of requests",
    **{f"latency_p{p}": "ms" for p in (50, 90, 95, 99)},
}
MeasureName = Literal["loss", "reward", "errors", "latency_p50", "latency_p90", "latency_p95", "latency_p99"]


class Measure(Frozen):
    """What is held against the fallback beside it."""

    worse_by: float = Field(
        description="by so much the release may be worse than the fallback: bits per byte, points of reward, "
        "share of requests, or of a latency its share (0.1 is 10 %); below 0 it must be better by so much"
    )


class Stage(Frozen):
    """One step of the way: whose requests the release answers."""

    share: float = Field(gt=0, lt=1, description="of the keys; the fallback beside it answers the others")
    domain: list[str] = Field([], description="requests of these domains alone; none: of all")
    tenant: list[str] = Field([], description="requests of these tenants alone; none: of all")
    max_prompt_bytes: int | None = Field(None, gt=0, description="requests with so long a prompt at most")

    def takes(self, domain: str, tenant: str, prompt_bytes: int | None) -> bool:
        """Is a request one that the stage is about?"""
        if self.max_prompt_bytes is not None and (
            prompt_bytes is None or prompt_bytes > self.max_prompt_bytes
        ):
            return False
        return (not self.domain or domain in self.domain) and (not self.tenant or tenant in self.tenant)


class Plan(Frozen):
    """The stages of a rollout and what decides, fixed before its first request. After the last stage: all."""

    name: FileName = Field(description="name of the rollout")
    salt: str = Field("", description="dealt anew with each one; none: the name")
    alpha: float = Field(
        0.05,
        gt=0,
        lt=0.5,
        description="chance of any false promotion in all stages, and of a false way back",
    )
    requests: int = Field(
        2000, ge=100, description="requests of the release in a stage at which its bounds are narrowest"
    )
    stages: Annotated[list[Stage], Field(min_length=1, max_length=20)]
    measures: dict[MeasureName, Measure] = Field(min_length=1, description="name -> limit")

    @model_validator(mode="after")
    def shares_grow(self) -> Self:
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            same = before.model_copy(update={"share": after.share}) == after
            if same and after.share <= before.share:
                problem = f"a share of {after.share:g} after {before.share:g} of the same requests"
                raise ValueError(f"{problem}; let shares grow")
        return self

    @property
    def hash(self) -> str:
        return digest(self.model_dump(mode="json"))

    def stage(self, number: int) -> Stage:
        return self.stages[number - 1]


class Request(BaseModel):
    """One line of a log of requests; what else a line holds is not looked at."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    key: str = Field(min_length=1)  # of what is independent: a user or a session, or of the request alone
    id: str = ""  # of the request, by which a later line may reward it
    stage: int = Field(ge=1)  # of the rollout when it was dealt
    arm: Literal["release", "fallback", "outside"]
    time: datetime
    error: bool = False
    latency_ms: float | None = Field(None, ge=0)
    bits: float | None = Field(None, ge=0)  # of a text of so many bytes, by the model of its arm
    bytes: int | None = Field(None, gt=0)
    reward: float | None = Field(None, ge=0, le=1)
    domain: str = ""
    tenant: str = ""
    prompt_bytes: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def both_or_neither(self) -> Self:
        if (self.bits is None) != (self.bytes is None):
            raise ValueError("give `bits` and `bytes`, or neither")
        return self


class Reward(BaseModel):
    """A line that says what an answer was worth, once a user or a label told."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    reward_of: str = Field(min_length=1, max_length=100)  # the id that came with the answer
    reward: float = Field(ge=0, le=1)


def place_of(salt: str, key: str) -> float:
    """Where a key lies between 0 and 1: the same whenever it is asked, and evenly spread over keys."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{key}".encode()).digest()[:8], "big") / 2**64


def arm_of(
    plan: Plan, number: int, key: str, domain: str = "", tenant: str = "", prompt_bytes: int | None = None
) -> Literal["release", "fallback", "outside"]:
    """Who answers in a stage; "outside" is answered by the fallback and says nothing of either.

    A key that the release has answered stays with it while shares grow.
    """
    stage = plan.stage(number)
    if not stage.takes(domain, tenant, prompt_bytes):
        return "outside"
    return "release" if place_of(plan.salt or plan.name, key) < stage.share else "fallback"


def key_hash(plan: Plan, key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(f"{plan.salt or plan.name}\0{key}".encode()).hexdigest()[:16]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
