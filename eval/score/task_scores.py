"""Scores of the models of a run on the tasks of its study."""

from pathlib import Path
from statistics import fmean

from eval.core.artifacts import verify_artifact
from eval.core.checks import Artifacts
from eval.core.errors import UserError
from eval.core.jobs import Report
from eval.core.records import TaskScore, provenance, read_task_scores, write_record
from eval.core.study import Study
from eval.engines import Engine, load_engine, subject_of, subject_of_record
from eval.score.devices import CPU, device_name, settle_device
from eval.score.lm_eval import run_lm_eval
from eval.score.samples import task_digest
from eval.score.scoring import model_folders
from eval.score.tasks import run_task


def score_tasks(
    run: Path,
    study: Study,
    folder: Path,
    names: list[str],
    report: Report = lambda share: None,
    device: str = CPU,
) -> None:
    """Scores the artifact `folder` on the tasks `names` of a study, and writes a record of each.

    Raises:
        UserError: the artifact is damaged or cannot be loaded, or a sample does not fit.
    """
    manifest = verify_artifact(folder)
    subject = subject_of(manifest)
    device = settle_device([subject.engine], device, f"{subject.label} tasks")
    engine: Engine | None = None
    for done, name in enumerate(names, start=1):
        task = study.data.tasks[name]
        metric: str = task.kind
        try:
            if task.kind == "lm_eval":
                samples, metric = run_lm_eval(task, subject.engine, folder, device)
            else:
                engine = engine or load_engine(subject.engine, folder, device=device)
                samples = run_task(task, engine, study.data.context, engine.scoring_tokens)
        except UserError as error:
            raise UserError(f"task {name!r} of {folder}: {error.thing}", error.problem, error.fix) from error
        record = TaskScore(
            **subject.model_dump(),
            task=name,
            source=task_digest(task),
            metric=metric,
            samples=samples,
            provenance=provenance(manifest.hash, study.hash(), device_name(device)),
        )
        write_record(run, record)
        report(done / len(names))


def unscored_tasks(run: Path, study: Study) -> dict[Path, list[str]]:
    """Model folders of a run -> the tasks without a record of these bytes, this task and this study."""
    if not study.data.tasks:
        return {}
    artifacts = Artifacts(run, study)
    records = artifacts.current(read_task_scores(run))
    scored = {(record.task, record.source, subject_of_record(record)) for record in records}
    digests = {name: task_digest(task) for name, task in study.data.tasks.items()}
    missing = {}
    for folder in model_folders(run, study):
        subject = subject_of(artifacts.manifest(folder))
        missing[folder] = [name for name, digest in digests.items() if (name, digest, subject) not in scored]
    return {folder: names for folder, names in missing.items() if names}


def mean_task_scores(records: list[TaskScore]) -> dict[tuple[str, str], dict[str, float]]:
    """(recipe, arm) -> task -> mean score, the samples of all seeds pooled."""
    pooled: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in records:
        by_task = pooled.setdefault((record.recipe, record.arm), {})
        by_task.setdefault(record.task, []).extend(record.samples.value)
    return {
        model: {name: fmean(values) for name, values in by_task.items()} for model, by_task in pooled.items()
    }
