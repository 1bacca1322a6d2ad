"""What gate.json says of variants beside bits per byte: accuracy, calibration, tasks, flips and divergence.

All of it is reported and none of it is a test: the gate judges the gain.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.core.checks import CONTROL, STUDENT, TEACHERS, Artifacts
from eval.core.documents import cluster_names
from eval.core.gate_file import Classes, Estimate, Quality, Variant
from eval.core.records import (
    PLAIN,
    VALIDATION,
    Agreement,
    Score,
    TaskScore,
    each_score,
    read_agreements,
    read_task_scores,
)
from eval.gate.evidence import Evidence
from eval.metrics.functions import calibration_error, f1_parts
from eval.score.agreement_records import document_tokens, estimate_agreement, variant_folders
from eval.score.corruptions import slice_documents
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
    clusters = _validation_clusters(artifacts) if agreements else {}
    task_scores = list(artifacts.current(read_task_scores(evidence.folder)))
    worst = {row.recipe: worst_slice(row) for row in rows}
    comparable = {folder.parts[-3] for folder in variant_folders(evidence.folder, evidence.study)}
    qualities = {
        recipe: _quality(evidence, recipe, worst.get(recipe), agreements, clusters, task_scores, alpha)
        for recipe in evidence.recipes
    }
    return {
        recipe: quality.model_copy(update={"how": _how(evidence, quality, recipe in comparable)})
        for recipe, quality in qualities.items()
    }


def _how(evidence: Evidence, quality: Quality, comparable: bool) -> dict[str, str]:
    """What can be measured of a recipe and was not -> the command; its student it may have to be like."""
    study, missing = shlex.quote(str(evidence.folder)), dict[str, str]()
    if comparable and quality.flips is None:
        missing["flips and KL"] = f"absorb agreement --study {study}"
    if any(score is None for arms in quality.tasks.values() for score in arms.values()):
        missing["tasks"] = f"absorb score --study {study}"
    return missing


def _quality(
    evidence: Evidence,
    recipe: str,
    worst: str | None,
    agreements: list[Agreement],
    clusters: dict[str, str],
    task_scores: list[TaskScore],
    alpha: float,
) -> Quality:
    compared = [r for r in agreements if r.recipe == recipe]
    flips, kl = estimate_agreement(compared, evidence.study.seeds, clusters, alpha)
    return Quality(
        accuracy=estimate_accuracy(evidence, recipe, alpha),
        calibration_error=estimate_calibration(evidence, recipe, alpha),
        worst_slice=worst,
        flips=flips,
        kl=kl,
        tasks=estimate_tasks([r for r in task_scores if r.recipe == recipe], evidence, recipe, alpha),
    )


def _validation_clusters(artifacts: Artifacts) -> dict[str, str]:
    """Validation document -> its cluster, of a score that is judged: all of these agree."""
    columns = next(iter(artifacts.current(each_score(artifacts.folder)))).documents
    names = zip(columns.id, columns.slice, columns.clusters, strict=True)
    return {document: cluster for document, name, cluster in names if name == VALIDATION}


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


def estimate_tasks(
    records: list[TaskScore], evidence: Evidence, recipe: str, alpha: float
) -> dict[str, dict[str, Estimate | None]]:
    """Task -> arm -> mean score, seeds and samples crossed, where every seed has scores of the same samples.

    Scores of samples that are not those of the task file, where that is here, are not shown. A teacher with
    a method can only be run where it is made, and has none.
    """
    seeds, tasks = evidence.study.seeds, evidence.study.data.tasks
    arms = [arm for arm in evidence.arms if arm not in TEACHERS] if recipe == PLAIN else [STUDENT, CONTROL]
    scores: dict[str, dict[str, Estimate | None]] = {name: dict.fromkeys(arms) for name in tasks}
    for name, task in tasks.items():
        source = task_digest_or_none(task)
        of_task = [r for r in records if r.task == name and r.source == (source or r.source)]
        for arm in arms:
            by_seed = {r.seed: r for r in of_task if r.arm == arm}
            rows = [by_seed[seed] for seed in seeds if seed in by_seed]
            if len(rows) == len(seeds) and len({(r.source, *r.samples.id) for r in rows}) == 1:
                scores[name][arm] = _share_estimate(np.array([r.samples.value for r in rows], float), alpha)
    return scores


def collect_classes(evidence: Evidence, alpha: float) -> list[Classes]:
    """How every model classifies each slice, and each domain in it; nothing where texts have no labels."""
    study = evidence.study
    if study.task != "classification":
        return []
    names = [(arm, PLAIN) for arm in evidence.arms] + [(STUDENT, recipe) for recipe in evidence.recipes[1:]]
    records: dict[tuple[str, str], list[Score]] = {name: [] for name in names}
    for record in each_score(evidence.folder):
        if (model := (record.arm, record.recipe)) in records and record.seed in study.seeds:
            records[model].append(record)
    rows = []
    for name in evidence.columns:
        of_slice = slice_documents(evidence.folder / "data", name, study.data.corruptions)
        documents = {document.id: document for document in of_slice}
        domains = sorted({document.domain for document in documents.values()})
        for model, of_model in records.items():
            tables = [_classified(record, name) for record in of_model]
            for domain in [None, *(domains if len(domains) > 1 else [])]:
                chosen = [documents[i] for i in tables[0] if domain in (None, documents[i].domain)]
                labels = np.array([document.label for document in chosen])
                columns = np.array([[table[d.id] for d in chosen] for table in tables], float)  # [S, N, 2]
                clusters = cluster_names(chosen, study.data.cluster_of(name))
                errors = evidence.calibration.get(model, []) if domain is None else []
                bins = [one[name] for one in errors]
                wrong = [calibration_error(one.confidence, one.correct, one.tokens) for one in bins]
                rows.append(
                    Classes(
                        arm=model[0],
                        recipe=model[1],
                        slice=name,
                        domain=domain,
                        **_rates(columns[..., 0], labels, clusters, len(study.data.labels) - 1, alpha),
                        brier=float(columns[..., 1].mean()),
                        calibration_error=float(np.mean(wrong)) if wrong else None,
                    )
                )
    return rows


def _classified(record: Score, name: str) -> dict[str, tuple[int, float]]:
    """Document of a slice -> the class that it was held to be of, and its Brier score."""
    columns = record.documents
    assert columns.predicted is not None
    assert columns.brier is not None
    pairs = zip(columns.slice, columns.id, columns.predicted, columns.brier, strict=True)
    return {document: (predicted, brier) for one, document, predicted, brier in pairs if one == name}


def _rates(
    predicted: Array, labels: NDArray[np.intp], clusters: list[str], wanted: int, alpha: float
) -> dict[str, Any]:
    """Counts of texts, and rates with their bounds.

    Args:
        predicted: [S, N] numbers of classes; labels: [N]; clusters: [N] names.
        wanted: number of the class that is looked for.
    """
    right = (predicted == labels).astype(float)
    other = (labels != wanted).astype(float)
    alarms = (predicted == wanted) * other
    twice, size = f1_parts(predicted, labels, wanted)
    ones, others = np.ones_like(right), np.broadcast_to(other, right.shape)
    return {
        "texts": len(labels),
        "looked_for": int((labels == wanted).sum()),
        "accuracy": _rate(right, ones, clusters, alpha),
        "f1": _rate(twice, size, clusters, alpha) if (labels == wanted).any() else None,
        "false_alarms": _rate(alarms, others, clusters, alpha) if other.any() else None,
    }


def _rate(parts: Array, sizes: Array, clusters: list[str], alpha: float) -> Estimate:
    """A ratio of sums of [S, N] over the N texts, the mean over seeds; clusters of texts are independent.

    Clusters that have none of what is divided by are left out. To first order (Cochran 1977, section 6.3) a
    seed's ratio R is the mean over clusters of R + (part - R size) / mean(size).
    """
    names, place = np.unique(clusters, return_inverse=True)
    both = np.zeros((2, len(parts), len(names)))
    for table, values in zip(both, (parts, sizes), strict=True):
        np.add.at(table.T, place, values.T)
    part, size = both[:, :, both[1].sum(0) > 0]
    ratio = part.sum(1, keepdims=True) / size.sum(1, keepdims=True)
    z = ratio + (part - ratio * size) / size.mean(1, keepdims=True)
    return _share_estimate(z, alpha)
