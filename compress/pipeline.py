"""The variants of a study: which are missing, and the jobs that build, verify and publish them."""

import shutil
from collections.abc import Iterable

from compress.build import TrainedStudent, Variant, build_variants, is_built, scratch_folder
from compress.publish import publish_variant
from compress.recipe import load_recipes
from distill.models.precision import settle_precision
from distill.trainer.loop import accelerator
from eval.core.artifacts import is_done, verify_artifact
from eval.core.checks import CONTROL, STUDENT
from eval.core.documents import free_bytes
from eval.core.jobs import Job, run_jobs
from eval.core.study import Study
from eval.engines.torch import stored_dtype

ARMS = (STUDENT, CONTROL)
# What a process holds that builds variants: its libraries, and so many times the student in float32.
LIBRARIES, HELD = 2**30, 8


def find_students(study: Study) -> list[TrainedStudent]:
    """S1 and S0 of every seed, each checked against its manifest.

    Raises:
        UserError: one is missing or damaged.
    """
    data = verify_artifact(study.folder / "data").hash
    rows = study.data.context, study.data.train_rows
    students = []
    for seed in study.seeds:
        for arm in ARMS:
            folder = study.folder / "students" / arm / f"s{seed}"
            students.append(TrainedStudent(arm, seed, folder, verify_artifact(folder).hash, data, rows))
    return students


def pending_variants(study: Study) -> list[Variant]:
    """The variants that are missing, or were made with another recipe or of another student."""
    recipes = load_recipes(study)
    wanted = [Variant(student, recipe) for student in find_students(study) for recipe in recipes]
    return [v for v in wanted if not is_done(study.folder / v.name, v.key, study.accept_old)]


def affordable_workers(study: Study, students: Iterable[TrainedStudent]) -> int:
    """How many processes build side by side: at most `study.workers`, and as many as free memory allows."""
    weights = [0.0]
    for student in students:
        stored = sum(path.stat().st_size for path in student.folder.glob("*.safetensors"))
        weights.append(stored * 4 / stored_dtype(student.folder).itemsize)
    workers = max(1, min(study.workers, free_bytes() // int(LIBRARIES + HELD * max(weights))))
    if workers < study.workers:
        print(f"build variants: {workers} at a time, not {study.workers}: more would not fit into memory")
    return workers


def make_variants(study: Study) -> int:
    """Builds, verifies and publishes the variants that are pending; returns how many."""
    settle_precision(study, accelerator())  # of a recipe that came after the training
    variants = pending_variants(study)
    groups: dict[TrainedStudent, list[Variant]] = {}
    for variant in variants:
        if not is_built(study, variant):
            groups.setdefault(variant.student, []).append(variant)
    jobs = [
        Job(f"{student.arm}/s{student.seed}", build_variants, (study, group), weight=len(group))
        for student, group in groups.items()
    ]
    run_jobs("build variants", jobs, affordable_workers(study, groups) if groups else study.workers)
    jobs = [Job(v.name.removeprefix("variants/"), publish_variant, (study, v)) for v in variants]
    run_jobs("verify variants", jobs, study.workers)
    shutil.rmtree(scratch_folder(study), ignore_errors=True)
    return len(variants)
