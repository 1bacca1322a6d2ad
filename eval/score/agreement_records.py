"""Which variants are compared with their student, and what the records of it say."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.checks import STUDENT, Artifacts, artifact_folder
from eval.core.errors import UserError
from eval.core.gate_file import Difference
from eval.core.records import PLAIN, Agreement, read_agreements
from eval.core.study import Study, recipe_names
from eval.engines import Subject, has_own_vocabulary, subject_of, subject_of_record
from eval.stats.crossed import crossed_mean, linearise

ALPHA = 0.05  # of each end of an interval, where no budget says another
Array = NDArray[np.float64]


def student_folder(run: Path, subject: Subject) -> Path:
    """The uncompressed student that a variant was made of."""
    folder = artifact_folder(run, subject.arm, subject.seed, PLAIN)
    assert folder is not None, "variants are made of students"
    return folder


def variant_folders(run: Path, study: Study) -> list[Path]:
    """Variants of S1 that exist and can be compared with their student, token by token.

    S0 is a control and never shipped. A variant with a vocabulary of its own has other tokens.
    """
    places = [
        artifact_folder(run, STUDENT, seed, name) for name in recipe_names(study)[1:] for seed in study.seeds
    ]
    present = [place for place in places if place is not None and (place / MANIFEST).is_file()]
    return [place for place in present if not has_own_vocabulary(read_manifest(place))]


def uncompared_variants(run: Path, study: Study, documents: int) -> list[Path]:
    """Variants without a record of so many documents, of these bytes, student, data and study."""
    artifacts = Artifacts(run, study)
    records = artifacts.current(read_agreements(run))
    compared = {subject_of_record(record) for record in records if len(record.id) >= documents}
    return [f for f in variant_folders(run, study) if subject_of(artifacts.manifest(f)) not in compared]


def document_tokens(tokens: Array) -> Array:
    """[C] tokens of each document, from [S, C]: a study has one tokenizer.

    Raises:
        UserError: seeds differ.
    """
    if (tokens != tokens[0]).any():
        raise UserError(
            "records of one recipe",
            "seeds with different numbers of tokens in one document, so with different tokenizers",
            "delete the records of the recipe and measure again",
        )
    return tokens[0]


def estimate_agreement(
    records: list[Agreement], seeds: Sequence[int], clusters: Mapping[str, str], alpha: float = ALPHA
) -> tuple[Difference, Difference] | tuple[None, None]:
    """Flips (share of tokens) and KL (bits per token) of one recipe, where every seed was compared.

    Args:
        clusters: document -> its cluster; those of one cluster are summed, as by the gate.
    """
    by_seed = {r.seed: r for r in records if r.seed in seeds}
    chosen = [by_seed[seed] for seed in seeds if seed in by_seed]
    if len(chosen) < len(seeds) or any(r.id != chosen[0].id for r in chosen):
        return None, None
    if unknown := [name for name in chosen[0].id if name not in clusters]:
        problem = f"document {unknown[0]!r} is none of the validation documents"
        raise UserError(f"agreement of {chosen[0].recipe}", problem, "delete its records, compare again")
    _, place = np.unique([clusters[name] for name in chosen[0].id], return_inverse=True)
    tokens = document_tokens(np.array([r.tokens for r in chosen], float))
    size = np.bincount(place, tokens)
    flips, kl = (
        np.array([np.bincount(place, getattr(r, name)) for r in chosen]) for name in ("flips", "kl_bits")
    )
    reruns = [rerun for r in chosen for rerun in r.reruns.values()]
    return (
        _difference(linearise(flips, size), max(r.flips / r.tokens for r in reruns), "share", alpha),
        _difference(linearise(kl, size), max(r.kl_bits / r.tokens for r in reruns), "bits/token", alpha),
    )


def _difference(z: Array, floor: float, unit: str, alpha: float) -> Difference:
    mean = crossed_mean(z)
    low, high = mean.bounds(alpha)
    return Difference(value=mean.point, low=low, high=high, floor=floor, unit=unit)
