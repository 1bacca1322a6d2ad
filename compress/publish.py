"""Publishes built variants: verified in this process, which did not build them, then made artifacts."""

import json
import shutil
from collections.abc import Callable
from typing import Any

from compress.build import REPORTS, Variant, build_folder
from compress.recipe import Failures
from compress.verify import MODEL, verify_reload
from eval.core.artifacts import build_artifact, digest
from eval.core.errors import UserError, attempt
from eval.core.study import Study


def publish_variants(study: Study, variants: list[Variant], report: Callable[[float], None]) -> Failures:
    """Verifies built variants one after another and moves them into the run folder; name -> why not."""
    failures = Failures()
    for i, variant in enumerate(variants):
        if why := attempt(publish_variant, study, variant, report):
            failures[variant.name] = why
        report((i + 1) / len(variants))
    return failures


def publish_variant(study: Study, variant: Variant, report: Callable[[float], None]) -> None:
    """Verifies a built variant and moves it into the run folder.

    Raises:
        UserError: reloaded, it answers differently from the model that was saved.
    """
    built, student, recipe = build_folder(study, variant), variant.student, variant.recipe
    reports = json.loads((built / REPORTS).read_text())
    try:
        differences = verify_reload(built, recipe.engine)
    except UserError:
        shutil.rmtree(built)  # the next command builds it anew
        raise
    curves = [r["facts"]["loss_curve"] for r in reports if "loss_curve" in r["facts"]]
    facts: dict[str, Any] = {
        "arm": student.arm,
        "seed": student.seed,
        "recipe": recipe.name,
        "recipe_hash": digest([recipe.settings, recipe.code]),
        "recipe_file": recipe.file,
        "target": recipe.target,
        "engine": recipe.engine,
        "reports": reports,
        "reload": differences,
        **({"loss_curve": curves[-1]} if curves else {}),
    }
    parents = {"student": student.hash, "data": student.data}
    with build_artifact(
        study.folder / variant.name,
        kind="variant",
        name=variant.name,
        key=variant.key,
        parents=parents,
        facts=facts,
    ) as temporary:
        for path in (built / MODEL).iterdir():
            shutil.copy(path, temporary / path.name)
    shutil.rmtree(built)
