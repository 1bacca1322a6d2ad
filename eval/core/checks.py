"""Do the records of a run speak of the study, the data and the artifacts that lie there now?

Everything that does not fit is refused by name, with both values: a verdict over records of different
things would look like any other.
"""

from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from eval.core.artifacts import MANIFEST, Manifest, read_manifest
from eval.core.budget import Budget, Target, load_budget
from eval.core.errors import UserError, require_one_of
from eval.core.records import (
    PLAIN,
    VALIDATION,
    Batched,
    Documents,
    Loaded,
    Measured,
    Process,
    Record,
    Score,
    record_path,
)
from eval.core.sections import Cost, Load
from eval.core.study import Study, recipe_names

FALLBACK, TEACHERS, STUDENT, CONTROL, CE = "B", ("T1", "T0"), "S1", "S0", "CE"
TAUGHT = dict(zip((STUDENT, CONTROL), TEACHERS, strict=True))  # a student's teacher; CE has none
STAGES = {"base": "distill/train.py", "students": "distill/train.py", "variants": "compress/run.py"}
SLACK = timedelta(minutes=5)  # by which the clocks of two machines may differ


def artifact_folder(folder: Path, arm: str, seed: int, recipe: str) -> Path | None:
    """Where a base, student or variant of a run lies; None for teachers, of which no folder is left."""
    if recipe != PLAIN:
        return folder / "variants" / recipe / arm / f"s{seed}"
    if arm == FALLBACK:
        return folder / "base" / f"s{seed}"
    return folder / "students" / arm / f"s{seed}" if arm in (STUDENT, CONTROL, CE) else None


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

    def check(self, record: Record) -> None:
        """The record was measured for this study, on the bytes that lie there now, after they were made."""
        path, source = record_path(self.folder, record), record.provenance
        if source.config != self.config:
            raise UserError(
                f"record {path}",
                f"measured for study hash {source.config[:12]}, this study's is {self.config[:12]}",
                "measure again, or name the study that it was measured for",
            )
        place = artifact_folder(self.folder, record.arm, record.seed, record.recipe)
        manifest = self.manifest(place) if place else self.data
        if place and manifest.hash != source.artifact:
            raise UserError(
                f"record {path}",
                f"measured on artifact {source.artifact[:12]}, {place} holds {manifest.hash[:12]}",
                "delete the record and measure again",
            )
        self._check_clock(path, source.time, manifest)

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

    def check_data(self, record: Score) -> None:
        if record.data != self.data.hash:
            raise UserError(
                f"record {record_path(self.folder, record)}",
                f"scored on data {record.data[:12]}, {self.folder / 'data'} holds {self.data.hash[:12]}",
                "delete the record and score again",
            )

    def check_parents(self, scores: list[Score]) -> None:
        """Every model was made from what lies in the run now, so no variant of an old student is judged."""
        teachers = {(s.arm, s.seed): s.provenance.artifact for s in scores if s.arm in TEACHERS}
        for record in scores:
            place = artifact_folder(self.folder, record.arm, record.seed, record.recipe)
            if place is None:
                continue
            parents, stage = self.manifest(place).parents, STAGES[place.relative_to(self.folder).parts[0]]
            for role, now in self._parents(record, teachers).items():
                if parents.get(role) != now:
                    raise UserError(
                        f"artifact {place}",
                        f"made from {role} {parents.get(role, 'unknown')[:12]}, the run's is {now[:12]}",
                        f"run {stage} again, then score and measure",
                    )

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
                    "run python -m compress.run again, then score and measure",
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


def find_positions(first: Documents, other: Documents) -> list[int]:
    """Where the documents of `first` lie in `other`."""
    place = {key: i for i, key in enumerate(zip(other.slice, other.id, strict=True))}
    return [place[key] for key in zip(first.slice, first.id, strict=True)]


def check_budget(budget: Budget, recipes: list[str], slices: list[str]) -> None:
    """Every slice and variant that the budget names is there, and some target is required."""
    for name in [VALIDATION, *budget.slices]:
        require_one_of(f"budget {budget.name!r}: slice without any scored document", name, slices)
    for target, of in [(t, limit.of) for t in budget.targets for limit in budget.targets[t].limits.values()]:
        if of is not None:
            require_one_of(f"budget {budget.name!r}: targets.{target}: variant", of, recipes)
    if not any(target.required for target in budget.targets.values()):
        raise UserError(f"budget {budget.name!r}", "no required target", "set required: true on one")


def different_settings(record: Measured | Loaded, cost: Cost) -> dict[str, tuple[Any, Any]]:
    """Setting -> (as the record was measured, as the study asks), for those that differ in any process."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(record, name), getattr(cost, name))
        for name in ("prompt_tokens", "new_tokens", "threads")
    }
    pairs["warmup"] = "unknown" if record.warmup is None else record.warmup, cost.warmup
    pairs["processes"] = len(record.processes), cost.processes
    if isinstance(record, Measured):
        processes = record.processes
        timed: list[Process | Batched] = [*processes]
        timed += [batched for process in processes for batched in process.batches]
        sizes = [[1, *(batched.batch_size for batched in process.batches)] for process in processes]
        pairs["batch_sizes"] = _first_different(sizes, cost.batch_sizes)
        pairs["requests"] = _first_different([len(t.prefill_ms) for t in timed], cost.requests)
        steps = cost.requests * (cost.new_tokens - 1)
        pairs["number of decode steps"] = _first_different([len(t.decode_ms) for t in timed], steps)
    else:
        load = cost.load or Load()
        pairs |= {"seconds": (record.seconds, load.seconds), "slo_ms": (record.slo_ms, load.slo_ms)}
        if load.rates is not None:
            rates = [[arrivals.rate for arrivals in server.rates] for server in record.processes]
            pairs["rates"] = _first_different(rates, load.rates)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _first_different(measured: list[Any], expected: Any) -> tuple[Any, Any]:
    """The first of the values that is not the expected one, or that itself; and the expected one."""
    return next((value for value in measured if value != expected), expected), expected


def check_settings(record: Measured | Loaded, study: Study, place: str) -> None:
    """The record was measured in the way that the study asks for."""
    for name, (measured, expected) in different_settings(record, study.cost).items():
        raise UserError(place, f"{name} is {measured}, the study asks {expected}", "measure again with it")


def check_device(record: Measured | Loaded, target: Target, place: str) -> None:
    """The record was measured on such a device as the target is."""
    device = record.provenance.machine.device
    if (target.device == "cpu") != (device == "cpu"):
        problem = f"measured on {device!r}, the target {record.target!r} is {target.device!r}"
        raise UserError(place, problem, "measure again on such a device")


def check_plan(study: Study) -> None:
    """Refuses before anything is trained what the last stages would refuse; reads configs alone.

    Raises:
        UserError: the budget or a recipe cannot be read, names what the study has not, or lengths do not fit.
    """
    slices = [VALIDATION, *study.data.shifted, *(c.slice for c in study.data.corruptions)]
    check_budget(load_budget(study), recipe_names(study), slices)
    written, context = study.targets.generation.prompt_tokens, study.data.context
    if study.targets.source in ("on_policy", "sequence") and written >= context:
        problem = f"{written}, and rows have {context} tokens (data.context)"
        raise UserError("targets.generation.prompt_tokens", problem, f"set it to less than {context}")
