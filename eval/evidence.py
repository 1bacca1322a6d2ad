"""What the gate judges: the records of one run, checked against each other, the study and the artifacts."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eval.artifacts import digest, file_sha256, read_manifest
from eval.budget import Budget
from eval.errors import UserError, one_of
from eval.records import (
    HELDOUT,
    PLAIN,
    Documents,
    Measured,
    Score,
    read_costs,
    read_scores,
    recipe_names,
    record_path,
)
from eval.statistics import linearised
from eval.study import Study

Array = NDArray[np.float64]
FALLBACK, TEACHERS, STUDENT, CONTROL, CE = "B", ("T1", "T0"), "S1", "S0", "CE"
TAUGHT = dict(zip((STUDENT, CONTROL), TEACHERS, strict=True))  # a student's teacher; CE has none
STAGES = {"base": "distill/base.py", "students": "distill/train.py", "variants": "compress/run.py"}


class Contrast(NamedTuple):
    """What `arm` after `recipe` gains over `minus` after `of`."""

    arm: str
    minus: str
    recipe: str = PLAIN
    of: str = PLAIN


@dataclass(frozen=True)
class Evidence:
    """Checked records: bits per (arm, recipe) as [S, C], seeds in the order of the study."""

    study: Study
    folder: Path
    recipes: list[str]  # `plain` first, then in the order of the study
    data: str  # hash of the data artifact
    columns: dict[str, NDArray[np.intp]]  # slice -> its columns of the tables
    bytes: Array  # [C]
    bits: dict[tuple[str, str], Array]  # (arm, recipe) -> [S, C]
    engines: dict[str, str]  # recipe -> engine
    costs: dict[tuple[str, str], list[Measured]]  # (target, recipe) -> records of S1, by seed
    artifacts: dict[str, str]  # arm/s<seed>/recipe -> hash
    machines: list[dict[str, object]]
    versions: dict[str, str]
    records: dict[str, str]  # path below the run folder -> sha256, of all that were there

    @property
    def arms(self) -> list[str]:
        return [FALLBACK, "T0", "T1", *self.study.arms]

    def raw(self, name: str, contrast: Contrast) -> Array:
        """[S, C] bits per document of the slice `name` that the contrast saves."""
        gained = self.bits[contrast.minus, contrast.of] - self.bits[contrast.arm, contrast.recipe]
        return gained[:, self.columns[name]]

    def gain(self, name: str, contrast: Contrast) -> Array:
        """The same as a linearised table [S, C] in bits per byte: positive is better."""
        return linearised(self.raw(name, contrast), self.bytes[self.columns[name]])

    def scores(self, name: str, arm: str, recipe: str = PLAIN) -> Array:
        """[S, C] linearised bits per byte of one arm: lower is better."""
        return linearised(self.bits[arm, recipe][:, self.columns[name]], self.bytes[self.columns[name]])


def collect(folder: Path, study: Study, budget: Budget) -> Evidence:
    """Reads every record below `folder` and checks that all of them speak of the same things.

    Raises:
        UserError: a record is missing, was made with other data, settings or artifacts, or the budget
            names a slice, variant or target that the run does not know. Both values are named.
    """
    recipes = recipe_names(study)
    every_score, every_cost = read_scores(folder), read_costs(folder)
    _check_paths(folder, [*every_score, *every_cost])
    wanted = _wanted(study, recipes)
    scores = [s for s in every_score if (s.arm, s.recipe) in wanted and s.seed in study.seeds]
    if not scores:
        raise UserError(f"run {folder}", "no score record", f"run python -m eval.score --study {folder}")
    costs = _asked_costs(study, budget, recipes, every_cost)
    used: list[Score | Measured] = [*scores, *costs]
    for record in used:
        _check_provenance(folder, study, record)
    _check_data(folder, scores)
    documents = scores[0].documents
    columns = _columns(documents)
    _check_budget(budget, recipes, columns)
    _check_seeds_differ(scores)
    engines = {s.recipe: s.engine for s in scores if s.arm == STUDENT}
    bits = _tables(folder, study, wanted, scores)
    _check_parents(folder, scores)
    return Evidence(
        study=study,
        folder=folder,
        recipes=recipes,
        data=scores[0].data,
        columns=columns,
        bytes=np.asarray(documents.bytes, float),
        bits=bits,
        engines=engines,
        costs=_costs(folder, study, budget, costs, engines),
        artifacts={f"{s.arm}/s{s.seed}/{s.recipe}": s.provenance.artifact for s in scores},
        machines=_machines(used),
        versions=_versions(used),
        records={
            p.relative_to(folder).as_posix(): file_sha256(p)
            for p in sorted((folder / "records").rglob("*.json"))
        },
    )


def _wanted(study: Study, recipes: list[str]) -> list[tuple[str, str]]:
    """(arm, recipe) of the scores that the study asks for; what was left by earlier settings is not read."""
    plain = [(arm, PLAIN) for arm in (FALLBACK, *TEACHERS, *study.arms)]
    return plain + [(arm, recipe) for recipe in recipes[1:] for arm in (STUDENT, CONTROL)]


def _asked_costs(study: Study, budget: Budget, recipes: list[str], costs: list[Measured]) -> list[Measured]:
    """Costs of S1 on the budget's targets. A required target must not be missing for its mere spelling."""
    measured = {record.target for record in costs}
    if unknown := sorted(measured - set(budget.targets)):
        for name, target in budget.targets.items():
            if target.required and name not in measured:
                one_of(f"budget {budget.name!r}: target without any cost record", name, unknown)
    return [
        record
        for record in costs
        if record.target in budget.targets
        and record.arm == STUDENT
        and record.recipe in recipes
        and record.seed in study.seeds
    ]


def artifact_folder(folder: Path, arm: str, seed: int, recipe: str) -> Path | None:
    """Where a base, student or variant of a run lies; None for teachers, of which no folder is left."""
    if recipe != PLAIN:
        return folder / "variants" / recipe / arm / f"s{seed}"
    if arm == FALLBACK:
        return folder / "base" / f"s{seed}"
    return folder / "students" / arm / f"s{seed}" if arm in (STUDENT, CONTROL, CE) else None


def _check_provenance(folder: Path, study: Study, record: Score | Measured) -> None:
    path, found = record_path(folder, record), record.provenance
    if found.config != study.hash():
        raise UserError(
            f"record {path}",
            f"measured for study hash {found.config[:12]}, this study's is {study.hash()[:12]}",
            "measure again, or name the study that it was measured for",
        )
    place = artifact_folder(folder, record.arm, record.seed, record.recipe)
    if place and (there := read_manifest(place).hash) != found.artifact:
        raise UserError(
            f"record {path}",
            f"measured on artifact {found.artifact[:12]}, {place} holds {there[:12]}",
            "delete the record and measure again",
        )


def _check_data(folder: Path, scores: list[Score]) -> None:
    made = read_manifest(folder / "data").hash
    for record in scores:
        if record.data != made:
            raise UserError(
                f"record {record_path(folder, record)}",
                f"scored on data {record.data[:12]}, {folder / 'data'} holds {made[:12]}",
                "delete the record and score again",
            )


def _check_parents(folder: Path, scores: list[Score]) -> None:
    """Every model was made from what lies in the run now, so no variant of a lost student is judged."""
    teachers = {(s.arm, s.seed): s.provenance.artifact for s in scores if s.arm in TEACHERS}
    for record in scores:
        place = artifact_folder(folder, record.arm, record.seed, record.recipe)
        if place is None:
            continue
        made = read_manifest(place).parents
        for role, now in _parents(folder, record, teachers).items():
            if made.get(role) != now:
                raise UserError(
                    f"artifact {place}",
                    f"made from {role} {made.get(role, 'unknown')[:12]}, the run's is {now[:12]}",
                    f"run {STAGES[place.relative_to(folder).parts[0]]} again, then score and measure",
                )


def _parents(folder: Path, record: Score, teachers: dict[tuple[str, int], str]) -> dict[str, str]:
    """Role -> hash of what the model of `record` must have been made from."""
    found = {"data": read_manifest(folder / "data").hash}
    arm, seed = record.arm, record.seed
    if record.recipe != PLAIN:
        student = artifact_folder(folder, arm, seed, PLAIN)
        assert student is not None
        return found | {"student": read_manifest(student).hash}
    if arm != FALLBACK:
        found["base"] = read_manifest(folder / "base" / f"s{seed}").hash
    if arm in TAUGHT:
        found["teacher"] = teachers[TAUGHT[arm], seed]
    return found


def _columns(documents: Documents) -> dict[str, NDArray[np.intp]]:
    names = np.asarray(documents.slice)
    return {str(name): np.flatnonzero(names == name) for name in dict.fromkeys(documents.slice)}


def _check_budget(budget: Budget, recipes: list[str], columns: dict[str, NDArray[np.intp]]) -> None:
    for name in [HELDOUT, *budget.slices]:
        one_of(f"budget {budget.name!r}: slice without any scored document", name, list(columns))
    for target, of in [(t, limit.of) for t in budget.targets for limit in budget.targets[t].limits.values()]:
        if of is not None:
            one_of(f"budget {budget.name!r}: targets.{target}: variant", of, recipes)
    if not any(target.required for target in budget.targets.values()):
        raise UserError(f"budget {budget.name!r}", "no required target", "set required: true on one")


def _tables(
    folder: Path, study: Study, wanted: list[tuple[str, str]], scores: list[Score]
) -> dict[tuple[str, str], Array]:
    """[S, C] bits for every arm and recipe that the study asks for."""
    found: dict[tuple[str, str], dict[int, Score]] = defaultdict(dict)
    for record in scores:
        found[record.arm, record.recipe][record.seed] = record
    for arm, recipe in wanted:
        if missing := [seed for seed in study.seeds if seed not in found[arm, recipe]]:
            raise UserError(
                f"scores of {arm}, recipe {recipe!r}",
                f"seeds {missing} are missing, the study has {study.seeds}",
                f"run python -m eval.score --study {folder}",
            )
    first = scores[0]
    return {
        key: np.stack([_aligned(folder, first, found[key][seed]) for seed in study.seeds]) for key in wanted
    }


def _aligned(folder: Path, first: Score, record: Score) -> Array:
    """[C] bits of `record` in the order of the documents of `first`."""
    a, b = first.documents, record.documents
    if (a.id, a.slice, a.bytes) == (b.id, b.slice, b.bytes):
        return np.asarray(b.bits, float)
    sizes = {(s, i): size for s, i, size in zip(b.slice, b.id, b.bytes, strict=True)}
    place = f"record {record_path(folder, record)}"
    mend = f"differs from {record_path(folder, first)}: score both again"
    for name, key, size in zip(a.slice, a.id, a.bytes, strict=True):
        if sizes.get((name, key)) != size:
            other = f"{sizes[name, key]} bytes" if (name, key) in sizes else "is missing"
            raise UserError(
                place, f"document {key!r} of slice {name!r}: {other}, elsewhere {size} bytes", mend
            )
    if len(b.id) != len(a.id):
        raise UserError(place, f"{len(b.id)} documents, elsewhere {len(a.id)}", mend)
    bits = dict(zip(zip(b.slice, b.id, strict=True), b.bits, strict=True))
    return np.asarray([bits[key] for key in zip(a.slice, a.id, strict=True)], float)


def _check_seeds_differ(scores: list[Score]) -> None:
    """Copies of one student would count as seeds and make the interval a lie."""
    seen: dict[str, int] = {}
    for record in scores:
        if record.arm != STUDENT or record.recipe != PLAIN:
            continue
        other = seen.setdefault(record.provenance.artifact, record.seed)
        if other != record.seed:
            raise UserError(
                f"students {STUDENT}",
                f"seeds {other} and {record.seed} are the same artifact {record.provenance.artifact[:12]}",
                "seeds must be trained apart; copies are no evidence about seeds",
            )


def _costs(
    folder: Path, study: Study, budget: Budget, costs: list[Measured], engines: dict[str, str]
) -> dict[tuple[str, str], list[Measured]]:
    grouped: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for record in costs:
        path = record_path(folder, record)
        wanted, device = budget.targets[record.target].device, record.provenance.machine.device
        if (wanted == "cpu") != (device == "cpu"):
            mend = "measure again on such a device"
            raise UserError(f"record {path}", f"measured on {device!r}, the target is {wanted!r}", mend)
        if record.engine != engines[record.recipe]:
            found = f"measured with engine {record.engine!r}, scored with {engines[record.recipe]!r}"
            raise UserError(f"record {path}", found, "measure again with the engine that was scored")
        asked, had = (
            {name: getattr(of, name) for name in ("prompt_tokens", "new_tokens", "threads")}
            for of in (study.cost, record)
        )
        if asked != had:
            raise UserError(f"record {path}", f"measured with {had}, the study asks {asked}", "measure again")
        grouped[record.target, record.recipe].append(record)
    for records in grouped.values():
        records.sort(key=lambda r: study.seeds.index(r.seed))
    return dict(grouped)


def _machines(records: list[Score | Measured]) -> list[dict[str, object]]:
    found = {digest(m): m for m in (r.provenance.machine.model_dump(mode="json") for r in records)}
    return [found[key] for key in sorted(found)]


def _versions(records: list[Score | Measured]) -> dict[str, str]:
    """Library -> version; several where records of several machines were merged."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, version in record.provenance.versions.items():
            found[name].add(version)
    return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


def _paths(folder: Path, records: list[Score | Measured]) -> list[Path]:
    return sorted(record_path(folder, record) for record in records)


def _check_paths(folder: Path, records: list[Score | Measured]) -> None:
    """A record lies where its content says: else two may speak of one model."""
    files = {p for kind in ("score/*", "cost/*/*") for p in (folder / "records").glob(f"{kind}/*.json")}
    if odd := sorted(files.symmetric_difference(_paths(folder, records))):
        raise UserError("record", odd[0], "its path and its content name different models; delete it")
