"""Marks of the models of a run on the tasks of its study."""

from pathlib import Path
from statistics import fmean

from eval.core.artifacts import read_manifest, verify_artifact
from eval.core.errors import UserError
from eval.core.jobs import Report
from eval.core.records import Marked, provenance, read_marks, write_record
from eval.core.study import Study
from eval.engines import Engine, Subject, load_engine, subject_of
from eval.score.items import source
from eval.score.lm_eval import run_harness
from eval.score.scoring import model_folders, scoring_tokens
from eval.score.tasks import run_task


def mark_folder(
    run: Path, study: Study, folder: Path, names: list[str], report: Report = lambda share: None
) -> None:
    """Marks the artifact `folder` on the tasks `names` of a study, and writes a record of each.

    Raises:
        UserError: the artifact is damaged or cannot be loaded, or an item does not fit.
    """
    manifest = verify_artifact(folder)
    subject, loaded = subject_of(manifest), list[Engine]()
    for done, name in enumerate(names, start=1):
        task = study.data.tasks[name]
        metric: str = task.kind
        try:
            if task.kind == "lm_eval":
                items, metric = run_harness(task, subject.engine, folder)
            else:
                loaded = loaded or [load_engine(subject.engine, folder)]
                items = run_task(task, loaded[0], study.data.context, scoring_tokens(loaded[0]))
        except UserError as error:
            raise UserError(f"task {name!r} of {folder}: {error.thing}", error.found, error.fix) from error
        record = Marked(
            **subject.model_dump(),
            task=name,
            source=source(task),
            metric=metric,
            items=items,
            provenance=provenance(manifest.hash, study.hash()),
        )
        write_record(run, record)
        report(done / len(names))


def unmarked(run: Path, study: Study) -> dict[Path, list[str]]:
    """Model folders of a run -> the tasks without a record of these bytes, this task and this study."""
    have = {
        (r.task, r.source, Subject.model_validate(r, from_attributes=True), r.provenance.artifact)
        for r in read_marks(run)
        if r.provenance.config == study.hash()
    }
    sources = {name: source(task) for name, task in study.data.tasks.items()}
    found: dict[Path, list[str]] = {}
    for folder in model_folders(run, study) if sources else []:
        made = read_manifest(folder)
        for name, of in sources.items():
            if (name, of, subject_of(made), made.hash) not in have:
                found.setdefault(folder, []).append(name)
    return found


def mean_marks(records: list[Marked]) -> dict[tuple[str, str], dict[str, float]]:
    """(recipe, arm) -> task -> mean mark, the items of all seeds pooled."""
    pooled: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in records:
        pooled.setdefault((record.recipe, record.arm), {}).setdefault(record.task, []).extend(
            record.items.value
        )
    return {model: {name: fmean(values) for name, values in of.items()} for model, of in pooled.items()}
