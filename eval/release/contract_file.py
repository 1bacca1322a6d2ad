"""What a release must hold: the shape of contract.yaml, and the figures behind it.

The study asks for a share of the teacher's gain. No teacher is in a release, so that is restated in
bits per byte against what is there: the control with the same recipe, and the fallback. The floor is the
share that the budget asks times the gain that the study measured, so holding it means what the gate meant.
"""

from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from scipy.special import stdtr

from eval.core.config import OneLine, Stored
from eval.core.errors import UserError, expected_text
from eval.core.gate_file import Estimate, KeptShare, Number
from eval.signoff.statement import Waiver
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict, cluster_bounds, linearise

Array = NDArray[np.float64]
CONTRACT = "contract.yaml"


class Saving(Stored):
    """Bits per byte that the release saves against another model on the same documents."""

    floor: float | None  # at least this must be saved; null where the study asked nothing
    measured: Estimate  # of the released artifact alone, over the documents of the study
    verdict: Verdict | None = None  # whether it keeps its floor, one-sided at alpha; null without one


class Gain(Stored):
    """One slice of documents."""

    asked_share: float  # of the teacher's gain
    kept_share: KeptShare  # as measured over all seeds
    on_test: KeptShare | None = (
        None  # the same on the test documents, where they were opened: the one to quote
    )
    level: Estimate  # bits per byte of the released artifact
    teacher_gain: Estimate
    over_control: Saving
    over_fallback: Saving


class Cost(Stored):
    """One limit of the budget and what was measured, with one-sided bounds at alpha."""

    quantity: str
    measured: float | None
    low: float | None
    high: float | None
    limit: float
    unit: str
    verdict: Verdict
    reason: str


class SeedChance(Stored):
    """How likely a single student of this study keeps a floor; null where one seed alone was trained.

    The next seed lies from the mean of S seeds as Student's t with S - 1 degrees of freedom, times the spread
    of the seeds and sqrt(1 + 1 / S): a prediction on these documents (Hahn and Meeker 1991, section 4.7).
    """

    over_control: float | None
    over_fallback: float | None


class LoaderCost(Stored):
    """Measured through the loader in fresh processes, when the release was built."""

    prefill: Number  # median of the requests, batch 1
    decode: Number | None  # median by token; null where a request is one token
    load: Number  # until what is served was checked, loaded and tried out
    peak_memory: Number  # of a process: VmHWM, on CUDA what torch reserved
    limits: list[Cost]  # absolute limits of the budget on what is seen through the loader, held against it
    processes: int
    requests: int  # of each process
    prompt_tokens: int
    machine: str  # its processor


class Signature(Stored):
    by: OneLine
    time: str
    key: str  # id of the public key
    file: str  # path in the release


class Target(Stored):
    """What is shipped to one target."""

    recipe: str
    engine: str
    device: Literal["cpu", "cuda"]
    artifact: str  # hash
    verdict: Verdict
    reason: str
    waiver: Waiver | None
    budget_note: str | None  # why its budget is not the one that was fixed before the first figure; else null
    signature: Signature
    gain: dict[str, Gain]  # by slice
    cost: list[Cost]  # by the engine, as the verdict has it
    fallback_cost: list[Cost]  # of the base, by its engine, held against the same limits
    one_seed: dict[str, SeedChance]  # by slice
    loader_cost: LoaderCost | None  # null where its device is not on the machine that built it


class Inputs(Stored):
    """What the contract holds for."""

    context_tokens: int  # the boundary token included
    scored_bytes: int  # a scored document is cut to so many
    vocabulary: int  # tokens of the tokenizer
    boundary_token: int  # every text starts with it; in a variant with a vocabulary of its own, with its own
    domains: dict[str, int]  # of the training documents, with their number
    sources: list[str]


class Contract(Stored):
    """contract.yaml."""

    schema_version: Literal[5] = 5
    name: str
    study: str
    method: str
    owner: OneLine
    released: date  # the day on which the folder was built
    expires: date | None  # the first waiver that ends; after it the fallback is served
    recheck_days: int | None = None  # it is rechecked at least so often; null where nobody promised that
    seed: int  # of the artifacts: the first of the study, named before any was measured
    alpha: float  # of every one-sided test
    level: float  # of every two-sided interval: 1 - 2 alpha, so that its ends are the bounds that decide
    data: str  # hash of the data artifact
    config: str  # hash of the study
    fallback: str  # hash of the base
    targets: dict[str, Target]
    inputs: Inputs

    def recheck_by(self, last: date) -> date | None:
        """Until when it is promised to be rechecked, where it was last on that day; None: nobody promised."""
        return None if self.recheck_days is None else last + timedelta(self.recheck_days)


def contract_text(contract: Contract) -> str:
    return yaml.safe_dump(contract.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def read_contract(folder: Path) -> Contract:
    """The contract of a release.

    Raises:
        UserError: it is missing, or no contract of this version.
    """
    path = folder / CONTRACT
    if not path.is_file():
        raise UserError(f"release {folder}", f"no {CONTRACT}", "name a folder that `eval.release` made")
    try:
        return Contract.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = expected_text(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise UserError(f"contract {path}", str(problem), "make the release again") from error


def saved(minus: ArrayLike, bits: ArrayLike, size: ArrayLike) -> np.ndarray:
    """[C] linearised bits per byte that a model saves against another on the same C documents."""
    return linearise(np.subtract(minus, bits)[None, :], size)[0]


def over_documents(z: ArrayLike, alpha: float) -> Estimate:
    """Mean of per-document values between its one-sided bounds at alpha: the document is the cluster."""
    values = np.asarray(z, float)
    low, high = cluster_bounds(values, alpha) or (None, None)
    return Estimate(point=float(values.mean()), low=low, high=high)


def floor_verdict(z: Array, floor: float | None, alpha: float) -> Verdict | None:
    """PASS where the lower one-sided bound of the mean is not below the floor, FAIL where the upper is."""
    if floor is None:
        return None
    low, high = cluster_bounds(z, alpha) or (-np.inf, np.inf)
    return PASS if low >= floor else FAIL if high < floor else INCONCLUSIVE


def chance_of_one_seed(by_seed: Array, floor: float | None) -> float | None:
    """The chance that a further seed is at the floor or above, from the means of [S] seeds."""
    if floor is None or len(by_seed) < 2:
        return None
    spread = float(by_seed.std(ddof=1)) * (1 + 1 / len(by_seed)) ** 0.5
    if spread == 0:
        return float(by_seed.mean() >= floor)
    return float(stdtr(len(by_seed) - 1, (by_seed.mean() - floor) / spread))


Of = Literal["release", "control", "fallback"]


@dataclass(frozen=True)
class Bits:
    """Bits of three models on the same C documents of so many bytes, [C] each."""

    release: Array
    control: Array
    fallback: Array
    bytes: Array

    def by_cluster(self, names: list[str]) -> "Bits":
        """Sums over the documents of each cluster, which has the name of its documents."""
        _, place = np.unique(names, return_inverse=True)
        columns = self.release, self.control, self.fallback, self.bytes
        ours, control, base, size = (np.bincount(place, column).astype(float) for column in columns)
        return Bits(ours, control, base, size)

    def since(self, start: int) -> "Bits":
        """The documents from one on."""
        return Bits(*(column[start:] for column in vars(self).values()))

    def level(self, of: Of) -> Array:
        """[C] linearised bits per byte of one model."""
        return linearise(getattr(self, of)[None, :], self.bytes)[0]

    def over(self, of: Of) -> Array:
        """[C] linearised bits per byte that the release saves over another."""
        return saved(getattr(self, of), self.release, self.bytes)
