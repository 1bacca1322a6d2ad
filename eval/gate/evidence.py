"""What the gate judges: the records of one run as tables, checked against the study and the artifacts."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from eval.core.artifacts import MANIFEST, digest, file_sha256
from eval.core.budget import Budget
from eval.core.checks import (
    CONTROL,
    FALLBACK,
    STUDENT,
    TEACHERS,
    Artifacts,
    artifact_folder,
    check_aligned,
    check_budget,
    check_device,
    check_processes_differ,
    check_seeds_differ,
    find_positions,
    read_unbuilt,
)
from eval.core.errors import UserError, require_one_of
from eval.core.gate_file import Opening
from eval.core.plan import Plan, read_plan
from eval.core.records import (
    PLAIN,
    Bins,
    CostRecord,
    Documents,
    LoadRecord,
    Record,
    Score,
    each_score,
    read_costs,
    read_loads,
    record_path,
)
from eval.core.study import Study, recipe_names
from eval.gate.history import read_openings
from eval.stats.clusters import Clusters, by_cluster
from eval.stats.crossed import linearise

Array = NDArray[np.float64]
C = TypeVar("C", CostRecord, LoadRecord)
Model = tuple[str, str]  # arm, recipe
REFERENCES = (TEACHERS[0], FALLBACK)  # beside the variants: what is replaced, and what is shipped instead
BySeed = defaultdict[Model, dict[int, Any]]


class Contrast(NamedTuple):
    """What `arm` after `recipe` gains over `baseline` after `baseline_recipe`."""

    arm: str
    baseline: str
    recipe: str = PLAIN
    baseline_recipe: str = PLAIN


@dataclass(frozen=True)
class Evidence:
    """Checked records: bits per (arm, recipe) as [S, N] by document, seeds in the order of the study."""

    study: Study
    folder: Path
    recipes: list[str]  # `plain` first, then in the order of the study
    data: str  # hash of the data artifact
    columns: dict[str, NDArray[np.intp]]  # slice -> its columns of the tables
    clusters: dict[str, Clusters]  # slice -> its clusters
    bytes: Array  # [N]
    bits: dict[Model, Array]  # [S, N]
    tokens: dict[Model, Array]  # [S, N] predicted tokens
    correct: dict[Model, Array]  # [S, N] of these, those held to be the likeliest; where every seed has them
    calibration: dict[Model, list[dict[str, Bins]]]  # by seed: slice -> bins; where every seed has them
    engines: dict[str, str]  # recipe -> engine
    weights: dict[str, dict[str, float]]  # recipe -> shares of its weights, as in gate.json, where known
    costs: dict[tuple[str, str], list[CostRecord]]  # (target, recipe) -> records of S1, by seed
    artifacts: dict[str, str]  # arm/s<seed>/recipe -> hash
    machines: list[dict[str, object]]
    versions: dict[str, str]
    records: dict[str, str]  # path below the run folder -> sha256, of all that were there
    early: list[str]  # records dated before their artifact was made
    openings: list[Opening]  # of the test documents
    plan: Plan | None  # what was fixed when training began
    first: str  # time of the earliest record that is judged
    loads: dict[tuple[str, str], list[LoadRecord]]  # (target, recipe) -> records of S1 under load, by seed
    elsewhere: dict[str, list[str]]  # what scored models elsewhere -> arm/s<seed>/recipe
    times: dict[str, list[str]]  # of the first and the last record: of scores, of costs by target
    references: dict[tuple[str, str], list[CostRecord]]  # (target, arm) -> of the fallback and the teacher
    gains: dict[tuple[str, Contrast], Array] = field(default_factory=dict, init=False, repr=False)  # known

    @property
    def arms(self) -> list[str]:
        return [FALLBACK, "T0", "T1", *self.study.student_arms]

    def saved_bits(self, name: str, contrast: Contrast) -> Array:
        """[S, C] bits per cluster of the slice `name` that the contrast saves."""
        arm, baseline, recipe, baseline_recipe = contrast
        return self.clusters[name].sums(self.bits[baseline, baseline_recipe] - self.bits[arm, recipe])

    def gain(self, name: str, contrast: Contrast) -> Array:
        """The same as a linearised table [S, C] in bits per byte: positive is better. One table for all."""
        if (name, contrast) not in self.gains:
            sizes = self.clusters[name].sums(self.bytes)
            self.gains[name, contrast] = linearise(self.saved_bits(name, contrast), sizes)
            self.gains[name, contrast].flags.writeable = False
        return self.gains[name, contrast]

    def scores(self, name: str, arm: str, recipe: str = PLAIN) -> Array:
        """[S, C] linearised bits per byte of one arm: lower is better."""
        clusters = self.clusters[name]
        return linearise(clusters.sums(self.bits[arm, recipe]), clusters.sums(self.bytes))


def collect_evidence(folder: Path, study: Study, budget: Budget) -> Evidence:
    """Reads every record below `folder` and checks that all of them speak of the same things.

    Raises:
        UserError: a record is missing, was made with other data, settings or artifacts, or the budget
            names a slice, variant or target that the run does not know. Both values are named.
    """
    unbuilt, artifacts = read_unbuilt(folder), Artifacts(folder, study)
    recipes = [name for name in recipe_names(study) if name not in unbuilt]
    tables = ScoreTables(artifacts, each_score(folder), wanted_models(study, recipes))
    every_cost = read_costs(folder)
    costs = _costs_of_study(study, budget, recipes, every_cost)
    loads = _of_study(study, budget, recipes, read_loads(folder))
    measured: list[Record] = [*costs, *loads]
    for record in measured:
        artifacts.check(record)
    check_budget(budget, study, list(tables.columns))
    grouped = by_target(folder, study, budget, costs, tables.engines)
    references = costs_of_references(artifacts, budget, every_cost)
    return build_evidence(
        tables, recipes, grouped, by_target(folder, study, budget, loads, tables.engines), references
    )


class ScoreTables:
    """Columns of the scores of some models; each record is let go once its columns are taken.

    Raises:
        UserError: a score is missing, or does not fit the run or the other scores.
    """

    def __init__(self, artifacts: Artifacts, records: Iterable[Score], models: list[Model]) -> None:
        self.artifacts, self.seeds = artifacts, artifacts.study.seeds
        self.scores: list[Score] = []  # all with the documents of the first, whose order is that of all
        self.bits, self.tokens, self.correct, self.bins = (BySeed(dict) for _ in range(4))
        for record in records:
            if (record.arm, record.recipe) in models and record.seed in self.seeds:
                self._add(record)
        if not self.scores:
            fix = f"run {self._next_command(STUDENT, PLAIN, self.seeds[0])}"
            raise UserError(f"run {artifacts.folder}", "no score record", fix)
        check_seeds_differ(self.scores)
        self._check_whole(models)
        artifacts.check_parents(self.scores)
        artifacts.check_recipes(self.scores)
        artifacts.check_versions()

    def _add(self, record: Score) -> None:
        documents, model = record.documents, (record.arm, record.recipe)
        self.artifacts.check(record)
        first = self.documents if self.scores else documents
        self.scores.append(record.model_copy(update={"documents": first}))
        order: slice | list[int] = slice(None)
        same = ("id", "slice", "bytes", "clusters")
        if any(getattr(first, name) != getattr(documents, name) for name in same):
            check_aligned(self.artifacts.folder, self.scores[0], record)
            order = find_positions(first, documents)
        known = documents.tokens == first.tokens  # this takes a tenth of the time that an array does
        tokens = self.first_tokens if known else np.asarray(documents.tokens, float)
        self.tokens[model][record.seed] = tokens[order]
        for columns, values in ((self.bits, documents.bits), (self.correct, documents.correct)):
            if values is not None:
                columns[model][record.seed] = np.asarray(values, float)[order]
        if documents.calibration is not None:
            self.bins[model][record.seed] = documents.calibration

    def _check_whole(self, models: list[Model]) -> None:
        for model in models:
            if missing := [seed for seed in self.seeds if seed not in self.bits[model]]:
                some = f"seeds {missing} are missing, the study has {self.seeds}"
                problem = "no score of any seed" if missing == self.seeds else some
                fix = f"run {self._next_command(*model, missing[0])}"
                raise UserError(f"scores of {model[0]}, recipe {model[1]!r}", problem, fix)

    def _next_command(self, arm: str, recipe: str, seed: int) -> str:
        """The first command that a missing score waits for."""
        run = self.artifacts.folder
        place = artifact_folder(run, arm, seed, recipe)
        if place is not None and (place / MANIFEST).is_file():
            return f"absorb score --study {run}"
        student = artifact_folder(run, arm, seed, PLAIN)
        if recipe != PLAIN and student is not None and (student / MANIFEST).is_file():
            return f"absorb compress --study {run}"
        return f"absorb train --config {run}"

    @property
    def documents(self) -> Documents:
        return self.scores[0].documents

    @cached_property
    def first_tokens(self) -> Array:
        return np.asarray(self.documents.tokens, float)

    @property
    def engines(self) -> dict[str, str]:
        return {s.recipe: s.engine for s in self.scores if s.arm == STUDENT}

    @property
    def columns(self) -> dict[str, NDArray[np.intp]]:
        names = np.asarray(self.documents.slice)
        return {str(name): np.flatnonzero(names == name) for name in dict.fromkeys(self.documents.slice)}

    @property
    def clusters(self) -> dict[str, Clusters]:
        """Slice -> its documents by clusters, in the order in which these come first."""
        names = self.documents.clusters
        return {name: by_cluster([names[i] for i in at], at) for name, at in self.columns.items()}

    def by_seed(self, columns: BySeed) -> dict[Model, list[Any]]:
        """Model -> its columns in the order of the seeds, where each seed has them."""
        return {
            model: [by_seed[seed] for seed in self.seeds]
            for model, by_seed in columns.items()
            if len(by_seed) == len(self.seeds)
        }

    def stacked(self, columns: BySeed) -> dict[Model, Array]:
        return {model: np.stack(rows) for model, rows in self.by_seed(columns).items()}


def build_evidence(
    tables: ScoreTables,
    recipes: list[str],
    costs: dict[tuple[str, str], list[CostRecord]],
    loads: dict[tuple[str, str], list[LoadRecord]] | None = None,
    references: dict[tuple[str, str], list[CostRecord]] | None = None,
) -> Evidence:
    """The tables of a run with what is known of their models."""
    loads, references = loads or {}, references or {}
    scores, artifacts, folder = tables.scores, tables.artifacts, tables.artifacts.folder
    used: list[Record] = [*scores, *(record for group in costs.values() for record in group)]
    used += [record for group in loads.values() for record in group]
    files = sorted((folder / "records").rglob("*.json"))
    if link := next((path for path in files if path.is_symlink()), None):
        raise UserError(f"record {link}", "is a link: what it names may change", "put there what it names")
    return Evidence(
        study=artifacts.study,
        folder=folder,
        recipes=recipes,
        data=artifacts.data.hash,
        columns=tables.columns,
        clusters=tables.clusters,
        bytes=np.asarray(tables.documents.bytes, float),
        bits=tables.stacked(tables.bits),
        tokens=tables.stacked(tables.tokens),
        correct=tables.stacked(tables.correct),
        calibration=tables.by_seed(tables.bins),
        engines=tables.engines,
        weights=weight_shares(artifacts, recipes),
        costs=costs,
        artifacts={f"{s.arm}/s{s.seed}/{s.recipe}": s.provenance.artifact for s in scores},
        machines=_machines(used),
        versions=_versions(used),
        records={path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
        early=sorted(path.relative_to(folder).as_posix() for path in artifacts.early),
        openings=read_openings(folder),
        plan=read_plan(folder),
        first=min((record.provenance.time for record in used), key=datetime.fromisoformat),
        loads=loads,
        elsewhere={
            by: [f"{s.arm}/s{s.seed}/{s.recipe}" for s in scores if s.by == by]
            for by in sorted({s.by for s in scores if s.by})
        },
        times=_times(scores, costs, loads),
        references=references,
    )


def _times(
    scores: list[Score], *measured: Mapping[tuple[str, str], Sequence[Record]]
) -> dict[str, list[str]]:
    """When the first and the last record was made: of `scores`, and of costs on each target."""
    groups = {"scores": [score.provenance.time for score in scores]}
    for (target, _), records in (pair for group in measured for pair in group.items()):
        groups.setdefault(target, []).extend(record.provenance.time for record in records)
    ends, moment = (min, max), datetime.fromisoformat
    return {name: [end(times, key=moment) for end in ends] for name, times in groups.items()}


def costs_of_references(
    artifacts: Artifacts, budget: Budget, costs: Iterable[CostRecord]
) -> dict[tuple[str, str], list[CostRecord]]:
    """(target, arm) -> current records of the fallback and of the teacher; others are not shown."""
    grouped: dict[tuple[str, str], list[CostRecord]] = {}
    wanted = (r for r in costs if r.arm in REFERENCES and r.recipe == PLAIN and r.target in budget.targets)
    for record in sorted(artifacts.current(wanted), key=lambda record: record.seed):
        grouped.setdefault((record.target, record.arm), []).append(record)
    return grouped


def weight_shares(artifacts: Artifacts, recipes: list[str]) -> dict[str, dict[str, float]]:
    """Recipe -> shares of S1's weights after its last pass, `zeros`, `low_bit`, means over seeds; `reached`.

    This is the least of any pass. Variants of earlier versions do not say it.
    """
    shares = {}
    for recipe in recipes[1:]:
        folders = (artifact_folder(artifacts.folder, STUDENT, s, recipe) for s in artifacts.study.seeds)
        every = [artifacts.manifest(folder).facts.get("reports") or [] for folder in folders if folder]
        sizes = [reports[-1]["after"] for reports in every if reports]
        if sizes and all("low_bit" in size for size in sizes):
            zeros = np.mean([1 - size["nonzeros"] / size["parameters"] for size in sizes])
            low_bit = np.mean([size["low_bit"] / size["parameters"] for size in sizes])
            shares[recipe] = {"zeros": float(zeros), "low_bit": float(low_bit)}
            if passes := [one for reports in every for one in reports if one.get("named")]:
                shares[recipe]["reached"] = min(one["reached"] / one["named"] for one in passes)
    return shares


def wanted_models(study: Study, recipes: list[str]) -> list[Model]:
    """(arm, recipe) of the scores that the study asks for; what was left by earlier settings is not read."""
    plain = [(arm, PLAIN) for arm in (FALLBACK, *TEACHERS, *study.student_arms)]
    return plain + [(arm, recipe) for recipe in recipes[1:] for arm in (STUDENT, CONTROL)]


def _costs_of_study(
    study: Study, budget: Budget, recipes: list[str], costs: list[CostRecord]
) -> list[CostRecord]:
    """Costs of S1 on the budget's targets. A required target must not be missing for its mere spelling."""
    measured = {record.target for record in costs}
    if unknown := sorted(measured - set(budget.targets)):
        for name, target in budget.targets.items():
            if target.required and name not in measured:
                require_one_of(f"budget {budget.name!r}: target without any cost record", name, unknown)
    return _of_study(study, budget, recipes, costs)


def _of_study(study: Study, budget: Budget, recipes: list[str], records: list[C]) -> list[C]:
    return [
        record
        for record in records
        if record.target in budget.targets
        and record.arm == STUDENT
        and record.recipe in recipes
        and record.seed in study.seeds
    ]


def by_target(
    folder: Path, study: Study, budget: Budget, costs: list[C], engines: dict[str, str]
) -> dict[tuple[str, str], list[C]]:
    """(target, recipe) -> its records by seed, each made as the study, the target and the scores ask.

    Raises:
        UserError: one was made on another device, with another engine, or of copies of a process.
    """
    grouped: dict[tuple[str, str], list[C]] = defaultdict(list)
    for record in costs:
        place = f"record {record_path(folder, record)}"
        check_device(record, budget.targets[record.target], place)
        if record.engine != engines[record.recipe]:
            problem = f"measured with engine {record.engine!r}, scored with {engines[record.recipe]!r}"
            raise UserError(place, problem, "measure again with the engine that was scored")
        grouped[record.target, record.recipe].append(record)
    for records in grouped.values():
        records.sort(key=lambda r: study.seeds.index(r.seed))
        check_processes_differ(folder, records)
    return dict(grouped)


def _machines(records: list[Record]) -> list[dict[str, object]]:
    machines = {digest(m): m for m in (r.provenance.machine.model_dump(mode="json") for r in records)}
    return [machines[key] for key in sorted(machines)]


def _versions(records: list[Record]) -> dict[str, str]:
    """Library -> version; several where records of several machines were merged."""
    pairs = sorted({pair for record in records for pair in record.provenance.versions.items()})
    return {name: ", ".join(version for _, version in same) for name, same in groupby(pairs, itemgetter(0))}
