"""Makes the variants of a study: every recipe applied to S1 and to its control S0, for every seed.

python -m compress.run --study runs/default
"""

import shutil

from compress.build import TrainedStudent, Variant, build_variants, is_built, scratch_folder
from compress.publish import publish_variant
from compress.recipe import load_recipes
from eval.core.artifacts import is_done, verify_artifact
from eval.core.checks import CONTROL, STUDENT
from eval.core.commands import new_parser, study_from_command
from eval.core.errors import EXIT_PASS, UserError, entry
from eval.core.jobs import Job, lock_folder, run_jobs
from eval.core.study import Study

ARMS = (STUDENT, CONTROL)


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


def make_variants(study: Study) -> int:
    """Builds, verifies and publishes the variants that are pending; returns how many."""
    variants = pending_variants(study)
    groups: dict[TrainedStudent, list[Variant]] = {}
    for variant in variants:
        if not is_built(study, variant):
            groups.setdefault(variant.student, []).append(variant)
    jobs = [
        Job(f"{student.arm}/s{student.seed}", build_variants, (study, group), weight=len(group))
        for student, group in groups.items()
    ]
    run_jobs("build variants", jobs, study.workers)
    jobs = [Job(v.name.removeprefix("variants/"), publish_variant, (study, v)) for v in variants]
    run_jobs("verify variants", jobs, study.workers)
    shutil.rmtree(scratch_folder(study), ignore_errors=True)
    return len(variants)


@entry
def main() -> int:
    parser = new_parser(__doc__)
    study, _ = study_from_command(parser, stages=("variant",))
    if not study.folder.is_dir():
        raise UserError(
            f"run folder {study.folder}",
            "missing",
            "train the students first: python distill/train.py --config STUDY",
        )
    with lock_folder(study.folder):
        count = make_variants(study)
    total = len(study.recipes) * len(ARMS) * len(study.seeds)
    print(f"variants: {total} in {study.folder / 'variants'}, {count} made now")
    return EXIT_PASS


if __name__ == "__main__":
    main()
