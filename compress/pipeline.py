"""The variants of a study: which are missing, and the jobs that build, verify and publish them."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from compress.build import TrainedStudent, Variant, build_variants, is_built, scratch_folder
from compress.publish import publish_variants
from compress.recipe import Failures, Pass, Recipe, load_recipe, load_recipes
from distill.models.precision import settle_precision
from distill.teachers.target_source import check_target_source, targets_identity
from distill.trainer.loop import accelerator
from eval.core.artifacts import is_done, verify_artifact, write_text
from eval.core.checks import CONTROL, STUDENT, UNBUILT, read_unbuilt
from eval.core.documents import free_bytes
from eval.core.errors import UserError
from eval.core.jobs import Job, run_jobs
from eval.core.sections import Train
from eval.core.sections.precision import read_choice
from eval.core.study import Study, recipe_names
from eval.engines.torch import classifies, model_class, stored_dtype

ARMS = (STUDENT, CONTROL)
CLASSIFYING = ("openvino", "drop_layers")  # passes that go over classifiers too
# What a process holds that builds variants: its libraries, and so many times the student in float32.
LIBRARIES, HELD = 2**30, 8


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a folder on the meta device: its shapes alone."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return model_class(config).from_config(config)


def find_students(study: Study) -> list[TrainedStudent]:
    """S1 and S0 of every seed, each checked against its manifest.

    Raises:
        UserError: one is missing or damaged.
    """
    data = verify_artifact(study.folder / "data", remembered=True).hash
    rows = study.data.context, study.data.train_rows
    students = []
    for seed in study.seeds:
        for arm in ARMS:
            folder = study.folder / "students" / arm / f"s{seed}"
            content = verify_artifact(folder, remembered=True).hash
            students.append(TrainedStudent(arm, seed, folder, content, data, rows))
    return students


def pending_variants(study: Study, recipes: list[Recipe] | None = None) -> list[Variant]:
    """The variants that are missing, or were made with another recipe or of another student.

    Args:
        recipes: by default those of the study, all of which must be good.
    """
    recipes = load_recipes(study) if recipes is None else recipes
    wanted = list[Variant]()
    for student in find_students(study):
        learns = any(recipe.learns_from_method for recipe in recipes)
        targets = targets_identity(study, student.arm, student.seed) if learns else None
        wanted += [Variant(student, r, targets if r.learns_from_method else None) for r in recipes]
    return [v for v in wanted if not is_done(study.folder / v.name, v.key, study.accept_old)]


def good_recipes(study: Study) -> tuple[list[Recipe], Failures]:
    """The recipes of a study that are in order, and why the others are not."""
    good, failures, choice = [], Failures(), read_choice(study.folder)
    for place, name in zip(study.recipes, recipe_names(study)[1:], strict=True):
        try:
            good.append(load_recipe(place, choice))
        except UserError as error:
            failures[name] = str(error)
    return good, failures


def unfit_recipes(variants: list[Variant]) -> Failures:
    """Recipes with a pass that cannot be applied to the students, by their shapes alone, and why."""
    failures = Failures()
    for recipe in {variant.recipe.name: variant.recipe for variant in variants}.values():
        try:
            model = empty_model(variants[0].student.folder)
            for step in recipe.passes:
                if classifies(model.config) and step.name not in CLASSIFYING:
                    problem = "is made for models of the next token, and the students classify"
                    fix = f"take recipes of {' and '.join(CLASSIFYING)}"
                    raise UserError(f"pass {step.name}", problem, fix)
                model = step.preview(model)
        except UserError as error:
            failures[recipe.name] = str(error)
    return failures


def unteachable_recipes(study: Study, recipes: list[Recipe]) -> Failures:
    """Recipes that would learn from the method as this run cannot teach it, and why."""
    failures = Failures()
    for recipe in recipes:
        try:
            for i, step in enumerate(recipe.passes):
                if (config := step.method_training) is not None:
                    check_method_training(study, config, recipe.passes[:i])
        except UserError as error:
            thing = f"recover.teacher: method, {error.thing}"
            failures[recipe.name] = str(UserError(thing, error.problem, error.fix))
    return failures


def check_method_training(study: Study, config: Train, before: Sequence[Pass]) -> None:
    """Refuses a training from the teacher of the method that its targets are not made for.

    Args:
        before: the passes before it.

    Raises:
        UserError: loss and targets do not fit, the tokens are others, or the run does not have the targets.
    """
    for step in before:
        if type(step).next_context is not Pass.next_context:
            problem = "gives the model other tokens than the teacher has"
            raise UserError(f"pass {step.name}", problem, "leave it out, or take teacher: student")
    check_target_source(study.model_copy(update={"train": config}))
    sampled = study.targets.source == "cached" and study.targets.form == "sampled"
    if sampled and config.loss.temperature != (own := study.train.loss.temperature):
        problem = f"{config.loss.temperature}, but the targets were sampled at {own}"
        raise UserError("train.loss.temperature", problem, f"set it to {own}")
    for seed in study.seeds:
        for arm in ARMS:
            try:
                targets_identity(study, arm, seed)
            except UserError as error:
                fix = "train the study here first, or take teacher: student"
                raise UserError(error.thing, error.problem, fix) from error


def save_failures(study: Study, failures: Failures) -> None:
    """Writes down what could not be built; what is known of recipes that are not asked for now is kept."""
    others = {
        name: why for name, why in read_unbuilt(study.folder).items() if name not in recipe_names(study)
    }
    if unbuilt := {**others, **failures}:
        write_text(study.folder / UNBUILT, json.dumps(unbuilt, indent=1))
    else:
        (study.folder / UNBUILT).unlink(missing_ok=True)


def group_by_student(variants: Iterable[Variant]) -> dict[TrainedStudent, list[Variant]]:
    groups: dict[TrainedStudent, list[Variant]] = {}
    for variant in variants:
        groups.setdefault(variant.student, []).append(variant)
    return groups


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


def make_variants(study: Study) -> tuple[int, Failures]:
    """Builds, verifies and publishes the variants that are pending; a recipe that fails stops no other.

    Returns:
        how many were made, and why recipes failed.
    """
    settle_precision(study, accelerator())  # of a recipe that came after the training
    recipes, failures = good_recipes(study)
    failures |= unteachable_recipes(study, recipes)
    recipes = [recipe for recipe in recipes if recipe.name not in failures]
    variants = pending_variants(study, recipes)
    failures |= unfit_recipes(variants)
    variants = [variant for variant in variants if variant.recipe.name not in failures]
    if variants:
        for name, why in failures.items():
            print(f"recipe {name} is left out: {why}")
    groups = group_by_student(variant for variant in variants if not is_built(study, variant))
    jobs = [
        Job(f"{student.arm}/s{student.seed}", build_variants, (study, group), weight=len(group))
        for student, group in groups.items()
    ]
    workers = affordable_workers(study, groups) if groups else study.workers
    results = run_jobs("build variants", jobs, workers)
    for job in jobs:  # of a recipe that failed for several students, the first tells why
        failures = {**results[job.name], **failures}
    built = {v.name: v for v in variants if is_built(study, v)}
    jobs = [
        Job(f"{student.arm}/s{student.seed}", publish_variants, (study, group), weight=len(group))
        for student, group in group_by_student(built.values()).items()
    ]
    refused = {
        name: why
        for some in run_jobs("verify variants", jobs, study.workers).values()
        for name, why in some.items()
    }
    failures |= {built[name].recipe.name: why for name, why in refused.items()}
    failures = {name: failures[name] for name in recipe_names(study) if name in failures}
    save_failures(study, failures)
    shutil.rmtree(scratch_folder(study), ignore_errors=True)
    return len(built) - len(refused), failures
