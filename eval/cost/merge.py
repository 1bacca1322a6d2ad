"""Joins records of other machines into a run folder: `python -m eval.cost.merge --study runs/X RECORD ...`

A RECORD is a file of records, one in a line (what `eval.cost` and `eval.cost.load` write without a run
folder), or a copy of the run folder, of which all records are taken. All are checked before one is written:
a record of another artifact, data, study, setting or device is refused, and so is one of a model that the
run has a record of already, unless it is the very same.
"""

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from eval.core.budget import Budget
from eval.core.checks import (
    CE,
    CONTROL,
    FALLBACK,
    STUDENT,
    TEACHERS,
    Artifacts,
    check_device,
)
from eval.core.commands import add_json, add_study, new_parser, start_log, write_json
from eval.core.documents import text_lines
from eval.core.errors import UserError, entry, first_error, require_one_of
from eval.core.jobs import lock_folder
from eval.core.plan import budget_of_run
from eval.core.records import (
    PLAIN,
    TRAINING,
    CostRecord,
    LoadRecord,
    Record,
    Score,
    read_costs,
    read_loads,
    read_scores,
    record_path,
    write_record,
)
from eval.core.study import Study, check_trained, load_study, recipe_names

NAME = re.compile(r"[^/\\\0.][^/\\\0]*")
RECORD: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def read_lines(path: Path) -> list[Record]:
    """The records in the lines of a file.

    Raises:
        UserError: there is no such file, or a line is no record.
    """
    records: list[Record] = []
    for where, _, line in text_lines(path, "records", "name a file of records, or a copy of the run folder"):
        try:
            record = RECORD.validate_json(line)
        except ValidationError as error:
            raise first_error(where, error, "measure again") from error
        for name in ("arm", "recipe", "target"):  # a path is made of each
            if not NAME.fullmatch(value := getattr(record, name, PLAIN)):
                raise UserError(f"{where}: {name}", repr(value)[:60], "give a name, not a path")
        records.append(record)
    return records


def read_copy(folder: Path) -> list[Record]:
    """Every record of a copied run folder."""
    return [*read_scores(folder), *read_costs(folder), *read_loads(folder)]


def bind_to_study(record: Record, study: Study) -> Record:
    """Gives a record that was measured without a study the hash of this one; its artifact is checked next."""
    if record.provenance.config or isinstance(record, Score):
        return record
    source = record.provenance.model_copy(update={"config": study.hash()})
    return record.model_copy(update={"provenance": source})


def check_target(record: CostRecord | LoadRecord, budget: Budget, place: str) -> None:
    """Refuses a target that the budget does not name, and a record of another kind of device."""
    require_one_of(f"{place}: target", record.target, list(budget.targets))
    check_device(record, budget.targets[record.target], place)


def is_present(run: Path, record: Record, place: str) -> bool:
    """True if the run holds this very record. Another one of the same model is refused."""
    path = record_path(run, record)
    if not path.is_file():
        return False
    try:
        old = type(record).model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise first_error(f"record {path}", error, "delete it, then merge again") from error
    if old == record:
        return True
    ours, theirs = (f"{r.provenance.machine.host} at {r.provenance.time}" for r in (old, record))
    raise UserError(place, f"from {theirs}, {path} is from {ours}", "delete the one that is not meant")


def check_duplicates(run: Path, records: list[tuple[str, Record]]) -> None:
    """Refuses two different records of one model on one target."""
    seen: dict[Path, tuple[str, Record]] = {}
    for place, record in records:
        path = record_path(run, record)
        if path in seen and seen[path][1] != record:
            raise UserError(
                place, f"{path.relative_to(run)} comes from {seen[path][0]} too", "give one of them"
            )
        seen[path] = (place, record)


def merge_records(run: Path, study: Study, sources: list[str]) -> list[Record]:
    """Checks every record of the sources and writes those that are new.

    Raises:
        UserError: one does not belong here; then nothing is written.
    """
    budget, artifacts = budget_of_run(study), Artifacts(run, study)
    every: list[tuple[str, Record]] = []
    for name in sources:
        path = Path(name)
        records = read_copy(path) if path.is_dir() else read_lines(path)
        every += [
            (f"{name}: {record_path(run, record).relative_to(run)}", bind_to_study(record, study))
            for record in records
        ]
    recipes = recipe_names(study)
    for place, record in every:
        require_one_of(
            f"{place}: arm",
            record.arm,
            [FALLBACK, STUDENT, CONTROL, CE, *(() if isinstance(record, LoadRecord) else TEACHERS)],
        )
        require_one_of(f"{place}: recipe", record.recipe, recipes)
        if record.seed not in study.seeds:
            raise UserError(f"{place}: seed", record.seed, f"the study has {study.seeds}")
        if isinstance(record, Score):
            if record.kind == "test":
                fix = "open them where the run lies: absorb test-set"
                raise UserError(place, "a score of test documents", fix)
        else:
            check_target(record, budget, place)
        artifacts.check(record, place)
    check_duplicates(run, every)
    new = [record for place, record in every if not is_present(run, record, place)]
    for record in new:
        write_record(run, record)
    return new


@entry
def main() -> None:
    parser = new_parser(__doc__)
    add_study(parser)
    parser.add_argument("records", nargs="+", help="files of records, or copies of the run folder")
    add_json(parser)
    args = parser.parse_args()
    study = load_study(args.study)
    check_trained(study)
    start_log(study.folder)
    with lock_folder(study.folder):
        new = merge_records(study.folder, study, args.records)
    for record in new:
        note = "" if isinstance(record, Score) or record.prompts == TRAINING else f" ({record.prompts})"
        print(f"{record_path(study.folder, record)}{note}")
    print(f"{len(new)} new record(s) in {study.folder}; run absorb gate --study {study.folder}")
    write_json(args.json, [str(record_path(study.folder, record)) for record in new])


if __name__ == "__main__":
    main()
