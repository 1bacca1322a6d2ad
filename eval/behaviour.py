"""What gate.json tells of variants beside bits per byte: accuracy, calibration, tasks, flips and divergence.

All of it is reported and none of it is a test: the gate judges the gain.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.checks import STUDENT
from eval.errors import UserError
from eval.evidence import Evidence
from eval.items import source_here
from eval.quality import LEVEL, estimate
from eval.records import HELDOUT, Agreement, Bins, Marked, read_agreements, read_marks
from eval.sections import Task
from eval.statistics import cluster_bounds, crossed_mean, linearised
from eval.verdict import Difference, Estimate, Quality, Variant

Array = NDArray[np.float64]
TAIL = (1 - LEVEL) / 2


def qualities(e: Evidence, rows: Sequence[Variant]) -> dict[str, Quality]:
    """Recipe -> its quality; `rows` are the variants on some target, for the gain that slices keep.

    Records of other artifacts, data or settings are not shown: what they tell was not measured here.
    """
    agreements = [r for r in read_agreements(e.folder) if _fits(e, r)]
    marks = [r for r in read_marks(e.folder) if _is_of_run(e, r)]
    worst = {row.recipe: worst_slice(row) for row in rows}
    return {recipe: _quality(e, recipe, worst.get(recipe), agreements, marks) for recipe in e.recipes}


def _quality(
    e: Evidence, recipe: str, worst: str | None, agreements: list[Agreement], marks: list[Marked]
) -> Quality:
    flips, kl = agreement([r for r in agreements if r.recipe == recipe], e.study.seeds)
    return Quality(
        accuracy=accuracy(e, recipe),
        calibration_error=calibration(e, recipe),
        worst_slice=worst,
        flips=flips,
        kl=kl,
        tasks=tasks([r for r in marks if r.recipe == recipe], e.study.seeds, e.study.data.tasks),
    )


def _is_of_run(e: Evidence, record: Agreement | Marked) -> bool:
    """True if the record is of an artifact that was scored, and of this study."""
    artifact = e.artifacts.get(f"{record.arm}/s{record.seed}/{record.recipe}")
    return (artifact, e.study.hash()) == (record.provenance.artifact, record.provenance.config)


def _fits(e: Evidence, record: Agreement) -> bool:
    student = e.artifacts.get(f"{record.arm}/s{record.seed}/plain")
    return (
        record.arm == STUDENT and _is_of_run(e, record) and (student, e.data) == (record.student, record.data)
    )


def worst_slice(row: Variant) -> str | None:
    """The slice on which the smallest share of the gain is kept, among those that have a share."""
    points = {HELDOUT: row.kept_share.point, **{n: of.kept_share.point for n, of in row.slices.items()}}
    known = {name: point for name, point in points.items() if point is not None}
    return min(known, key=lambda name: known[name]) if known else None


def accuracy(e: Evidence, recipe: str) -> dict[str, Estimate]:
    """Correct over predicted tokens of S1, a ratio of sums; seeds and documents are crossed."""
    model = STUDENT, recipe
    if model not in e.correct:
        return {}
    return {
        name: _share(linearised(e.correct[model][:, columns], sizes(e.tokens[model][:, columns])))
        for name, columns in e.columns.items()
    }


def sizes(tokens: Array) -> Array:
    """[C] tokens of each document, from [S, C]: a study has one tokenizer.

    Raises:
        UserError: seeds differ.
    """
    if (tokens != tokens[0]).any():
        raise UserError(
            "records of one recipe", "seeds count different tokens", "delete and measure them again"
        )
    return tokens[0]


def _share(z: Array) -> Estimate:
    return estimate(z, tested=False).model_copy(update={"unit": "share"})


def calibration(e: Evidence, recipe: str) -> dict[str, Estimate]:
    """Expected calibration error of S1: the mean over seeds, with their t interval."""
    by_seed = e.calibration.get((STUDENT, recipe))
    if by_seed is None:
        return {}
    found = {}
    for name in e.columns:
        errors = [calibration_error(bins[name]) for bins in by_seed]
        low, high = cluster_bounds(errors, TAIL) or (None, None)
        found[name] = Estimate(point=float(np.mean(errors)), low=low, high=high, unit="share")
    return found


def calibration_error(bins: Bins) -> float:
    """Sum over bins of |confidence - correct| over all tokens (Guo et al. 2017); see eval/metrics."""
    off = np.abs(np.subtract(bins.confidence, bins.correct))
    return float(off.sum() / np.sum(bins.tokens))


def agreement(
    records: list[Agreement], seeds: Sequence[int]
) -> tuple[Difference, Difference] | tuple[None, None]:
    """Flips (share of tokens) and KL (bits per token) of one recipe, where every seed was compared."""
    by_seed = {r.seed: r for r in records if r.seed in seeds}
    found = [by_seed[seed] for seed in seeds if seed in by_seed]
    if len(found) < len(seeds) or any(r.id != found[0].id for r in found):
        return None, None
    tokens = np.array([r.tokens for r in found], float)
    size = sizes(tokens)
    flips, kl = (np.array([getattr(r, name) for r in found], float) for name in ("flips", "kl_bits"))
    again = [rerun for r in found for rerun in r.reruns.values()]
    return (
        _difference(linearised(flips, size), max(r.flips / r.tokens for r in again), "share"),
        _difference(linearised(kl, size), max(r.kl_bits / r.tokens for r in again), "bits/token"),
    )


def _difference(z: Array, floor: float, unit: str) -> Difference:
    mean = crossed_mean(z)
    low, high = mean.bounds(TAIL)
    return Difference(value=mean.point, low=low, high=high, floor=floor, unit=unit)


def tasks(
    records: list[Marked], seeds: Sequence[int], asked: dict[str, Task]
) -> dict[str, dict[str, Estimate]]:
    """Task -> arm -> mean mark, seeds and items crossed, where every seed has marks on the same items.

    Marks on items that are not those of the task's file, where it is here, are not shown.
    """
    found: dict[str, dict[str, Estimate]] = {name: {} for name in asked}
    for name, task in asked.items():
        here = source_here(task)
        of_task = [r for r in records if r.task == name and r.source == (here or r.source)]
        for arm in dict.fromkeys(r.arm for r in of_task):
            by_seed = {r.seed: r for r in of_task if r.arm == arm}
            rows = [by_seed[seed] for seed in seeds if seed in by_seed]
            if len(rows) == len(seeds) and len({(r.source, *r.items.id) for r in rows}) == 1:
                found[name][arm] = _share(np.array([r.items.value for r in rows], float))
    return {name: arms for name, arms in found.items() if arms}
