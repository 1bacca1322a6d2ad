"""What gate.json tells of variants beside bits per byte: accuracy, calibration, tasks, flips and divergence.

All of it is reported and none of it is a test: the gate judges the gain.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.core.checks import STUDENT
from eval.core.gate_file import Estimate, Quality, Variant
from eval.core.records import VALIDATION, Agreement, TaskScore, read_agreements, read_task_scores
from eval.core.sections import Task
from eval.gate.evidence import Evidence
from eval.gate.quality import LEVEL, estimate
from eval.metrics.functions import calibration_error
from eval.score.divergence import document_tokens, estimate_agreement
from eval.score.samples import task_digest_or_none
from eval.stats.crossed import cluster_bounds, linearise

Array = NDArray[np.float64]
TAIL = (1 - LEVEL) / 2


def collect_qualities(e: Evidence, rows: Sequence[Variant]) -> dict[str, Quality]:
    """Recipe -> its quality; `rows` are the variants on some target, for the gain that slices keep.

    Records of other artifacts, data or settings are not shown: what they tell was not measured here.
    """
    agreements = [r for r in read_agreements(e.folder) if _fits(e, r)]
    task_scores = [r for r in read_task_scores(e.folder) if _is_of_run(e, r)]
    worst = {row.recipe: worst_slice(row) for row in rows}
    return {recipe: _quality(e, recipe, worst.get(recipe), agreements, task_scores) for recipe in e.recipes}


def _quality(
    e: Evidence, recipe: str, worst: str | None, agreements: list[Agreement], task_scores: list[TaskScore]
) -> Quality:
    flips, kl = estimate_agreement([r for r in agreements if r.recipe == recipe], e.study.seeds)
    return Quality(
        accuracy=estimate_accuracy(e, recipe),
        calibration_error=estimate_calibration(e, recipe),
        worst_slice=worst,
        flips=flips,
        kl=kl,
        tasks=estimate_tasks(
            [r for r in task_scores if r.recipe == recipe], e.study.seeds, e.study.data.tasks
        ),
    )


def _is_of_run(e: Evidence, record: Agreement | TaskScore) -> bool:
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
    points = {VALIDATION: row.kept_share.point, **{n: of.kept_share.point for n, of in row.slices.items()}}
    known = {name: point for name, point in points.items() if point is not None}
    return min(known, key=lambda name: known[name]) if known else None


def estimate_accuracy(e: Evidence, recipe: str) -> dict[str, Estimate]:
    """Correct over predicted tokens of S1, a ratio of sums; seeds and documents are crossed."""
    model = STUDENT, recipe
    if model not in e.correct:
        return {}
    return {
        name: _share(linearise(e.correct[model][:, columns], document_tokens(e.tokens[model][:, columns])))
        for name, columns in e.columns.items()
    }


def _share(z: Array) -> Estimate:
    return estimate(z, tested=False).model_copy(update={"unit": "share"})


def estimate_calibration(e: Evidence, recipe: str) -> dict[str, Estimate]:
    """Expected calibration error of S1: the mean over seeds, with their t interval."""
    by_seed = e.calibration.get((STUDENT, recipe))
    if by_seed is None:
        return {}
    found = {}
    for name in e.columns:
        errors = [
            calibration_error(bins[name].confidence, bins[name].correct, bins[name].tokens)
            for bins in by_seed
        ]
        low, high = cluster_bounds(errors, TAIL) or (None, None)
        found[name] = Estimate(point=float(np.mean(errors)), low=low, high=high, unit="share")
    return found


def estimate_tasks(
    records: list[TaskScore], seeds: Sequence[int], asked: dict[str, Task]
) -> dict[str, dict[str, Estimate]]:
    """Task -> arm -> mean score, seeds and samples crossed, where every seed has scores of the same samples.

    Scores of samples that are not those of the task file, where that is here, are not shown.
    """
    found: dict[str, dict[str, Estimate]] = {name: {} for name in asked}
    for name, task in asked.items():
        here = task_digest_or_none(task)
        of_task = [r for r in records if r.task == name and r.source == (here or r.source)]
        for arm in dict.fromkeys(r.arm for r in of_task):
            by_seed = {r.seed: r for r in of_task if r.arm == arm}
            rows = [by_seed[seed] for seed in seeds if seed in by_seed]
            if len(rows) == len(seeds) and len({(r.source, *r.samples.id) for r in rows}) == 1:
                found[name][arm] = _share(np.array([r.samples.value for r in rows], float))
    return {name: arms for name, arms in found.items() if arms}
