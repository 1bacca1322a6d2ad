"""What gate.json says of variants beside bits per byte: accuracy, calibration, tasks, flips and divergence.

All of it is reported and none of it is a test: the gate judges the gain.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.core.checks import STUDENT, Artifacts
from eval.core.gate_file import Estimate, Quality, Variant
from eval.core.records import VALIDATION, Agreement, TaskScore, read_agreements, read_task_scores
from eval.core.study import Study
from eval.gate.evidence import Evidence
from eval.metrics.functions import calibration_error
from eval.score.agreement_records import document_tokens, estimate_agreement
from eval.score.samples import task_digest_or_none
from eval.stats.crossed import cluster_bounds, linearise
from eval.stats.ratios import share_bounds

Array = NDArray[np.float64]


def collect_qualities(evidence: Evidence, rows: Sequence[Variant], alpha: float) -> dict[str, Quality]:
    """Recipe -> its quality; `rows` are the variants on some target, for the gain that slices keep.

    Records of other artifacts, data or settings are not shown.
    """
    artifacts = Artifacts(evidence.folder, evidence.study)
    agreements = [r for r in artifacts.current(read_agreements(evidence.folder)) if r.arm == STUDENT]
    task_scores = list(artifacts.current(read_task_scores(evidence.folder)))
    worst = {row.recipe: worst_slice(row) for row in rows}
    return {
        recipe: _quality(evidence, recipe, worst.get(recipe), agreements, task_scores, alpha)
        for recipe in evidence.recipes
    }


def _quality(
    evidence: Evidence,
    recipe: str,
    worst: str | None,
    agreements: list[Agreement],
    task_scores: list[TaskScore],
    alpha: float,
) -> Quality:
    compared = [r for r in agreements if r.recipe == recipe]
    flips, kl = estimate_agreement(compared, evidence.study.seeds, alpha)
    return Quality(
        accuracy=estimate_accuracy(evidence, recipe, alpha),
        calibration_error=estimate_calibration(evidence, recipe, alpha),
        worst_slice=worst,
        flips=flips,
        kl=kl,
        tasks=estimate_tasks([r for r in task_scores if r.recipe == recipe], evidence.study, alpha),
    )


def worst_slice(row: Variant) -> str | None:
    """The slice on which the smallest share of the gain is kept, among those that have a share."""
    points = {
        VALIDATION: row.kept_share.point,
        **{name: result.kept_share.point for name, result in row.slices.items()},
    }
    known = {name: point for name, point in points.items() if point is not None}
    return min(known, key=lambda name: known[name]) if known else None


def estimate_accuracy(evidence: Evidence, recipe: str, alpha: float) -> dict[str, Estimate]:
    """Correct over predicted tokens of S1, a ratio of sums; seeds and documents are crossed."""
    model = STUDENT, recipe
    if model not in evidence.correct:
        return {}
    tokens, correct = document_tokens(evidence.tokens[model]), evidence.correct[model]
    return {
        name: _share_estimate(linearise(clusters.sums(correct), clusters.sums(tokens)), alpha)
        for name, clusters in evidence.clusters.items()
    }


def _share_estimate(z: Array, alpha: float) -> Estimate:
    low, high = share_bounds(z, alpha) or (None, None)
    return Estimate(point=float(z.mean()), low=low, high=high, unit="share")


def estimate_calibration(evidence: Evidence, recipe: str, alpha: float) -> dict[str, Estimate]:
    """Expected calibration error of S1: the mean over seeds, with their t interval."""
    by_seed = evidence.calibration.get((STUDENT, recipe))
    if by_seed is None:
        return {}
    estimates = {}
    for name in evidence.columns:
        errors = [
            calibration_error(bins[name].confidence, bins[name].correct, bins[name].tokens)
            for bins in by_seed
        ]
        bounds = cluster_bounds(errors, alpha)
        low, high = (max(bounds[0], 0.0), min(bounds[1], 1.0)) if bounds else (None, None)
        estimates[name] = Estimate(point=float(np.mean(errors)), low=low, high=high, unit="share")
    return estimates


def estimate_tasks(records: list[TaskScore], study: Study, alpha: float) -> dict[str, dict[str, Estimate]]:
    """Task -> arm -> mean score, seeds and samples crossed, where every seed has scores of the same samples.

    Scores of samples that are not those of the task file, where that is here, are not shown.
    """
    seeds, tasks = study.seeds, study.data.tasks
    scores: dict[str, dict[str, Estimate]] = {name: {} for name in tasks}
    for name, task in tasks.items():
        source = task_digest_or_none(task)
        of_task = [r for r in records if r.task == name and r.source == (source or r.source)]
        for arm in dict.fromkeys(r.arm for r in of_task):
            by_seed = {r.seed: r for r in of_task if r.arm == arm}
            rows = [by_seed[seed] for seed in seeds if seed in by_seed]
            if len(rows) == len(seeds) and len({(r.source, *r.samples.id) for r in rows}) == 1:
                scores[name][arm] = _share_estimate(np.array([r.samples.value for r in rows], float), alpha)
    return {name: arms for name, arms in scores.items() if arms}
