"""Do the records of a run speak of the study, the data and the artifacts that lie there now?

Everything that does not fit is refused by name, with both values: a verdict over records of different
things would look like any other.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from eval.core.artifacts import MANIFEST, Manifest, digest, read_manifest
from eval.core.budget import Budget, load_budget
from eval.core.checks.measured import check_device as check_device
from eval.core.checks.measured import check_processes_differ as check_processes_differ
from eval.core.checks.measured import different_settings
from eval.core.errors import UserError, require_one_of
from eval.core.records import (
    PLAIN,
    VALIDATION,
    Agreement,
    AnyRecord,
    CostRecord,
    Documents,
    LoadRecord,
    Record,
    Score,
    record_path,
)
from eval.core.study import Study, recipe_names

AnyKind = TypeVar("AnyKind", bound=AnyRecord)
FALLBACK, TEACHERS, STUDENT, CONTROL, CE = "B", ("T1", "T0"), "S1", "S0", "CE"
TAUGHT = dict(zip((STUDENT, CONTROL), TEACHERS, strict=True))  # a student's teacher; CE has none
STAGES = {"base": "absorb train", "students": "absorb train", "variants": "absorb compress"}  # what makes it
UNBUILT = "unbuilt.json"  # lies in a run folder: recipe -> why it has no variants
SLACK = timedelta(minutes=5)  # by which the clocks of two machines may differ


def artifact_folder(folder: Path, arm: str, seed: int, recipe: str) -> Path | None:
    """Where a base, student or variant of a run lies; None for teachers, of which no folder is left."""
    if recipe != PLAIN:
        return folder / "variants" / recipe / arm / f"s{seed}"
    if arm == FALLBACK:
        return folder / "base" / f"s{seed}"
    return folder / "students" / arm / f"s{seed}" if arm in (STUDENT, CONTROL, CE) else None


def read_unbuilt(run: Path) -> dict[str, str]:
    """Recipe -> why the last `absorb compress` could not build a variant of it.

    Raises:
        UserError: the file is damaged.
    """
    path = run / UNBUILT
    if not path.is_file():
        return {}
    try:
        return {str(name): str(why) for name, why in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        fix = f"delete it and run absorb compress --study {run}"
        raise UserError(str(path), "holds no recipes with reasons", fix) from error


def teacher_folder(folder: Path, side: str, seed: int) -> Path:
    """Where what a method fitted for a teacher lies; of teachers that seeds share, at the first of them."""
    return folder / "method" / side / f"s{seed}"


def measured_hash(manifest: Manifest) -> str:
    """What a cost is bound to: the bytes of a model; of a teacher also the models that it was made of."""
    return digest([manifest.hash, manifest.parents]) if manifest.kind == "method" else manifest.hash


def measured_bytes(folder: Path, manifest: Manifest) -> int:
    """Bytes that loading needs: of a teacher what its method fitted, and the models that it was made of."""
    if manifest.kind != "method":
        return manifest.bytes
    return manifest.bytes + sum(read_manifest(place).bytes for place in member_folders(folder, manifest))


def member_folders(folder: Path, teacher: Manifest) -> list[Path]:
    """Where the models lie that a teacher was made of."""
    return [folder / role.replace("base-", "base/") for role in teacher.parents if role != "data"]


class Artifacts:
    """The manifests of a run folder, each read once."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder, self.study = folder, study
        self._read: dict[Path, Manifest] = {}
        self.early: list[Path] = []  # records that are older than the artifact they speak of

    @cached_property
    def config(self) -> str:
        return self.study.hash()

    @property
    def data(self) -> Manifest:
        return self.manifest(self.folder / "data")

    def manifest(self, place: Path) -> Manifest:
        if place not in self._read:
            self._read[place] = read_manifest(place)
        return self._read[place]

    def hash_of(self, arm: str, seed: int, recipe: str) -> str | None:
        """That of a base, student or variant; None where none is there yet."""
        place = artifact_folder(self.folder, arm, seed, recipe)
        return self.manifest(place).hash if place and (place / MANIFEST).is_file() else None

    def differences(self, record: AnyRecord) -> dict[str, tuple[Any, Any]]:
        """Name -> (as the record was measured, as it would be now), for all that differs.

        Compared are the study, the bytes of the artifact, where it lies in the run, and what the record holds
        of the data, the student behind a variant, and the settings of cost and load.
        """
        folder, source = self.folder, record.provenance
        pairs: dict[str, tuple[Any, Any]] = {"study": (source.config, self.config)}
        if place := artifact_folder(folder, record.arm, record.seed, record.recipe):
            pairs["artifact"] = source.artifact, self.manifest(place).hash
            if isinstance(record, CostRecord):
                pairs["disk_bytes"] = record.disk_bytes, self.manifest(place).bytes
        elif isinstance(record, CostRecord):
            place = teacher_folder(folder, record.arm, record.seed)
            if (place / MANIFEST).is_file():
                manifest = self.manifest(place)
                pairs["artifact"] = source.artifact, measured_hash(manifest)
                pairs["disk_bytes"] = record.disk_bytes, measured_bytes(folder, manifest)
        if isinstance(record, Score | Agreement):
            pairs["data"] = record.data, self.data.hash
        if isinstance(record, Agreement):
            student = folder / "students" / record.arm / f"s{record.seed}"
            pairs["student"] = record.student, self.manifest(student).hash
        if isinstance(record, CostRecord | LoadRecord):
            pairs |= different_settings(record, self.study.cost)
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def current(self, records: Iterable[AnyKind]) -> Iterator[AnyKind]:
        """The records of what lies in the run now that need not be measured again."""
        for record in records:
            place = artifact_folder(self.folder, record.arm, record.seed, record.recipe)
            if (place is None or (place / MANIFEST).is_file()) and not self.differences(record):
                yield record

    def rounds(
        self,
        records: Iterable[CostRecord | LoadRecord],
        target: str,
        variants: Iterable[tuple[str, str | None]],
    ) -> list[str | None]:
        """When each variant was measured on a target, where its record is current (see `is_measured`).

        Args:
            variants: recipe and hash of each; None: it is not there yet.
        """
        times = {
            (record.recipe, record.provenance.artifact): record.provenance.time
            for record in self.current(records)
            if record.target == target
        }
        return [None if hash is None else times.get((recipe, hash)) for recipe, hash in variants]

    def check(self, record: Record, where: str | None = None) -> None:
        """The record was measured as it would be now (see `differences`), after its artifact was made.

        Args:
            where: the record as an error names it; by default its path in the run.

        Raises:
            UserError: it differs, or its time is yet to come.
        """
        path = record_path(self.folder, record)
        place = artifact_folder(self.folder, record.arm, record.seed, record.recipe)
        for name, (measured, now) in self.differences(record).items():
            problem, fix = f"{name} is {measured}, the study asks {now}", "measure again with it"
            if name == "study":
                problem = f"measured for study hash {measured[:12]}, this study's is {now[:12]}"
                fix = "measure again, or name the study that it was measured for"
            elif name in ("artifact", "data"):
                holder = self.folder / "data" if name == "data" else place
                problem = f"measured on {name} {measured[:12]}, {holder} holds {now[:12]}"
                fix = "delete the record and measure again"
            raise UserError(where or f"record {path}", problem, fix)
        self._check_clock(path, record.provenance.time, self.manifest(place) if place else self.data)

    def _check_clock(self, path: Path, time: str, manifest: Manifest) -> None:
        """Refuses a time in the future, and notes one before the artifact was made.

        The bytes are those that were measured: either they were made again since, or a clock went back.
        """
        measured = datetime.fromisoformat(time)
        if measured > datetime.now(UTC) + SLACK:
            future = f"measured at {time}, which is yet to come"
            raise UserError(f"record {path}", future, "set the clock, then measure again")
        if manifest.time and measured < datetime.fromisoformat(manifest.time) - SLACK:
            self.early.append(path)

    def check_parents(self, scores: list[Score]) -> None:
        """Every model was made from what lies in the run now, so no variant of an old student is judged."""
        teachers = {(s.arm, s.seed): s.provenance.artifact for s in scores if s.arm in TEACHERS}
        for record in scores:
            place = artifact_folder(self.folder, record.arm, record.seed, record.recipe)
            if place is None:
                continue
            parents, stage = self.manifest(place).parents, STAGES[place.relative_to(self.folder).parts[0]]
            for role, now in self._parents(record, teachers).items():
                if (then := parents.get(role, "unknown")) != now:
                    differ = [a != b for a, b in zip(then, now, strict=False)]
                    size = max(12, 1 + [*differ, True].index(True))  # as many digits as tell them apart
                    problem = f"made from {role} {then[:size]} by its {MANIFEST}, the run's is {now[:size]}"
                    fix = f"run {stage} again, then score and measure"
                    raise UserError(f"artifact {place}", problem, fix)

    def check_recipes(self, scores: list[Score]) -> None:
        """Every variant of a name was made by one recipe: its control and all its seeds as itself."""
        seen: dict[str, tuple[Any, Path]] = {}
        for record in scores:
            place = artifact_folder(self.folder, record.arm, record.seed, record.recipe)
            if record.recipe == PLAIN or place is None:
                continue
            origin = self.manifest(place).facts.get("recipe_hash"), record.engine
            other, there = seen.setdefault(record.recipe, (origin, place))
            if origin != other:
                raise UserError(
                    f"artifact {place}",
                    f"made by another recipe {record.recipe!r} than {there}, or for another engine",
                    "run absorb compress again, then score and measure",
                )

    def check_versions(self) -> None:
        """A student and its control, and their teachers, were made by the same code and libraries.

        What only one of them depends on, such as the code of the method, is no difference. Of teachers, those
        of one seed whose manifests lie in the run are compared.
        """
        pairs = [("students", STUDENT, CONTROL), ("method", *TEACHERS)]
        for top, arm, control in pairs:
            for seed in self.study.seeds:
                places = [self.folder / top / one / f"s{seed}" for one in (arm, control)]
                if top == "method" and not all((place / MANIFEST).is_file() for place in places):
                    continue
                one, other = (self.manifest(place) for place in places)
                names = [n for n in one.code if one.code[n] != other.code.get(n, one.code[n])]
                if names:
                    old = [p for p in places if self.manifest(p).accepted] or places
                    raise UserError(
                        f"artifact {places[0]}",
                        f"made by {_list_versions(one, names)}, its control {places[1]} by "
                        f"{_list_versions(other, names)}",
                        f"delete {' and '.join(map(str, old))}, train again, then score and measure",
                    )

    def _parents(self, record: Score, teachers: dict[tuple[str, int], str]) -> dict[str, str]:
        """Role -> hash of what the model of `record` must have been made from."""
        parents = {"data": self.data.hash}
        arm, seed = record.arm, record.seed
        if record.recipe != PLAIN:
            student = artifact_folder(self.folder, arm, seed, PLAIN)
            assert student is not None
            return parents | {"student": self.manifest(student).hash}
        if arm != FALLBACK:
            parents["base"] = self.manifest(self.folder / "base" / f"s{seed}").hash
        if arm in TAUGHT:
            parents["teacher"] = teachers[TAUGHT[arm], seed]
        return parents


def _list_versions(manifest: Manifest, names: list[str]) -> str:
    return ", ".join(f"{name} {manifest.code[name][:16]}" for name in names)


def check_seeds_differ(scores: list[Score]) -> None:
    """Copies of one student would count as seeds and make the interval too narrow."""
    seen: dict[tuple[str, str], int] = {}
    for record in scores:
        if record.arm not in TAUGHT or record.recipe != PLAIN:
            continue
        other = seen.setdefault((record.arm, record.provenance.artifact), record.seed)
        if other != record.seed:
            raise UserError(
                f"students {record.arm}",
                f"seeds {other} and {record.seed} are the same artifact {record.provenance.artifact[:12]}",
                "seeds must be trained apart; copies are no evidence about seeds",
            )


def check_aligned(folder: Path, first: Score, record: Score) -> None:
    """Two scores speak of the same documents, in whatever order."""
    a, b = first.documents, record.documents
    sizes = {(s, i): size for s, i, size in zip(b.slice, b.id, b.bytes, strict=True)}
    place = f"record {record_path(folder, record)}"
    fix = f"differs from {record_path(folder, first)}: score both again"
    for name, key, size in zip(a.slice, a.id, a.bytes, strict=True):
        if sizes.get((name, key)) != size:
            other = f"{sizes[name, key]} bytes" if (name, key) in sizes else "is missing"
            raise UserError(
                place, f"document {key!r} of slice {name!r}: {other}, elsewhere {size} bytes", fix
            )
    if len(b.id) != len(a.id):
        raise UserError(place, f"{len(b.id)} documents, elsewhere {len(a.id)}", fix)
    at = find_positions(a, b)
    for place_in_a, place_in_b in enumerate(at):
        cluster, other = a.clusters[place_in_a], b.clusters[place_in_b]
        if cluster != other:
            document = f"document {a.id[place_in_a]!r} of slice {a.slice[place_in_a]!r}"
            raise UserError(place, f"{document} is of cluster {other!r}, elsewhere of {cluster!r}", fix)


def find_positions(first: Documents, other: Documents) -> list[int]:
    """Where the documents of `first` lie in `other`."""
    place = {key: i for i, key in enumerate(zip(other.slice, other.id, strict=True))}
    return [place[key] for key in zip(first.slice, first.id, strict=True)]


def check_budget(budget: Budget, study: Study, slices: list[str]) -> None:
    """Every slice, variant and arm that the budget names is there."""
    recipes = recipe_names(study)
    if budget.over_ce is not None and not study.ce_arm:
        fix = "set ce_arm: true and train again, or take over_ce out"
        raise UserError(f"budget {budget.name!r}: over_ce", "the study has no arm CE", fix)
    for target, limits in ((name, one.limits) for name, one in budget.targets.items()):
        if study.task == "classification" and (named := [q for q in limits if q.startswith("decode")]):
            fix = "limit prefill in its place: all of a request of a classifier"
            problem = "a classifier decodes nothing"
            raise UserError(f"budget {budget.name!r}: targets.{target}.{named[0]}", problem, fix)
    for name in [VALIDATION, *budget.slices]:
        require_one_of(f"budget {budget.name!r}: slice without any scored document", name, slices)
    for target, of in [(t, limit.of) for t in budget.targets for limit in budget.targets[t].limits.values()]:
        if of is not None:
            require_one_of(f"budget {budget.name!r}: targets.{target}: variant", of, recipes)


def check_plan(study: Study) -> None:
    """Refuses before anything is trained what the last stages would refuse; reads configs alone.

    Raises:
        UserError: the budget or a recipe cannot be read, names what the study has not, or lengths do not fit.
    """
    slices = [VALIDATION, *study.data.shifted, *(c.slice for c in study.data.corruptions)]
    check_budget(load_budget(study), study, slices)
    written, context = study.targets.generation.prompt_tokens, study.data.context
    if study.targets.source in ("on_policy", "sequence") and written >= context:
        problem = f"{written}, and rows have {context} tokens (data.context)"
        raise UserError("targets.generation.prompt_tokens", problem, f"set it to less than {context}")


def is_measured(rounds: Sequence[str | None]) -> bool:
    """True if every variant has a current record, all of them of the same rounds; see `Artifacts.rounds`."""
    return len({*rounds}) == 1 and None not in rounds
