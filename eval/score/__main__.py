"""`python -m eval.score --study runs/X`: bits per byte of every base, student and variant of a run.

Each model is loaded from its folder by its own engine, in a process that did not make it, and scored on
`data.tasks` too. Models that have a record of the same bytes, data and study are left alone. Teachers with a
method are scored by `distill`, where they are made: only there can they be run. They are not scored on tasks.
"""

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.checks import CONTROL, FALLBACK, STUDENT, artifact_folder, read_unbuilt
from eval.core.commands import new_parser, study_from_command, write_json
from eval.core.errors import entry
from eval.core.jobs import Job, lock_folder, run_jobs
from eval.core.records import PLAIN, VALIDATION, read_scores, read_task_scores
from eval.core.sections.classification import in_words
from eval.core.study import Study, recipe_names
from eval.engines import subject_of
from eval.score.devices import add_device, deal_out, find_devices
from eval.score.samples import check_tasks

Rows = dict[tuple[str, str], dict[str, float]]  # (recipe, arm) -> column -> value


def score_run(study: Study, device: str = "auto") -> int:
    """Scores what has no record yet; returns how many models were scored on documents."""
    from eval.score.scoring import score_folder, unscored_folders  # torch takes a second: not for --help
    from eval.score.task_scores import score_tasks, unscored_tasks

    run = study.folder
    check_tasks(study.data.tasks)
    same: dict[str, list[Path]] = {}  # hash -> folders of those bytes: the base of several seeds may be one
    for folder in (unscored := unscored_folders(run, study)):
        same.setdefault(read_manifest(folder).hash, []).append(folder)
    jobs = [
        Job(_label(folder), partial(score_folder, twins=twins), (run, study, folder))
        for folder, *twins in same.values()
    ]
    jobs += [
        Job(f"{_label(folder)} tasks", score_tasks, (run, study, folder, names))
        for folder, names in unscored_tasks(run, study).items()
    ]
    run_jobs("score", *deal_out(jobs, find_devices(device), study.workers))
    return len(unscored)


def missing_lines(study: Study) -> list[str]:
    """What of the study is not there yet to be scored, with the command that makes it."""
    run, unbuilt = study.folder, read_unbuilt(study.folder)
    recipes = [name for name in recipe_names(study)[1:] if name not in unbuilt]
    models = [(arm, PLAIN) for arm in (FALLBACK, *study.student_arms)]
    models += [(arm, recipe) for recipe in recipes for arm in (STUDENT, CONTROL)]
    missing: dict[str, list[str]] = {}
    for arm, recipe in models:
        for seed in study.seeds:
            place = artifact_folder(run, arm, seed, recipe)
            if place is not None and not (place / MANIFEST).is_file():
                command = "train --config" if recipe == PLAIN else "compress --study"
                missing.setdefault(f"absorb {command} {run}", []).append(str(place.relative_to(run)))
    return [
        f"not there yet: {places[0]} and {len(places) - 1} more; run {command}"
        if len(places) > 1
        else f"not there yet: {places[0]}; run {command}"
        for command, places in missing.items()
    ] + [f"not there: recipe {name} was not built: {why}" for name, why in unbuilt.items()]


def _label(folder: Path) -> str:
    return subject_of(read_manifest(folder)).label


def score_table(title: str, rows: Rows) -> Table:
    names = sorted({name for row in rows.values() for name in row}, key=lambda n: (n != VALIDATION, n))
    shown = Table("recipe", "arm", *names, title=title)
    for (recipe, arm), row in rows.items():
        shown.add_row(recipe, arm, *(f"{row[name]:.4f}" if name in row else "" for name in names))
    return shown


def group_by_recipe(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """recipe -> arm -> slice or task -> value."""
    groups: dict[str, dict[str, dict[str, float]]] = {}
    for (recipe, arm), row in rows.items():
        groups.setdefault(recipe, {})[arm] = row
    return groups


@entry
def main() -> None:
    parser = new_parser(__doc__)
    add_device(parser)
    study, args = study_from_command(parser, measures=True)
    from eval.score.scoring import corpus_bits_per_byte, model_folders
    from eval.score.task_scores import mean_task_scores

    read_manifest(study.folder / "data")  # a run that has none ends here, before anything is written
    with lock_folder(study.folder):
        done = score_run(study, args.device)
    bits = corpus_bits_per_byte(read_scores(study.folder))
    tasks = mean_task_scores(read_task_scores(study.folder)) if study.data.tasks else {}
    if done:
        title = in_words("bits per byte, lower is better", study.task)
        Console().print(score_table(title, bits))
    if study.data.tasks:
        Console().print(score_table("mean task scores, higher is better", tasks))
    print(f"scored {done} models, {len(model_folders(study.folder, study)) - done} were scored before")
    for line in missing_lines(study):
        print(line)
    write_json(args.json, {"bits_per_byte": group_by_recipe(bits), "tasks": group_by_recipe(tasks)})


if __name__ == "__main__":
    main()
