"""The budget and the recipes as they were when training began: the copy that the gate judges by.

It lies in the run folder as `plan.json`, with its time and a hash of its content. A hash shows an edit, not
who made it: whoever may write the folder may write all of it anew. docs/statistics.md says what is noticed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from eval.core.artifacts import digest, write_text
from eval.core.budget import Budget, load_budget
from eval.core.config import Stored, flat_settings
from eval.core.errors import UserError, first_error
from eval.core.sections.recipe import RecipeFile
from eval.core.study import CHANGED, Study, read_recipe

PLAN = "plan.json"
RUNS = "gate-runs.jsonl"  # every verdict that the gate gave


class EarlierPlan(Stored):
    """A plan that another one took the place of, because the models were trained anew."""

    time: str
    hash: str
    budget: str = Field("", exclude_if=lambda value: not value)  # hash of it; empty in older runs


class Plan(Stored):
    """What was fixed beforehand."""

    schema_version: Literal[1] = 1
    time: str  # ISO 8601, UTC
    study: str  # hash of the study that was trained
    budget_name: str  # as the study names it
    budget: Budget
    recipes: dict[str, RecipeFile]  # by the name of the variant
    earlier: list[EarlierPlan]
    hash: str  # of all the above

    def content_hash(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"hash"}))

    def budget_hash(self) -> str:
        return digest(self.budget.model_dump(mode="json"))


def current_recipes(study: Study) -> dict[str, RecipeFile]:
    """The study's recipes as their files are now."""
    return {file.name: file for _, file in map(read_recipe, study.recipes)}


def read_plan(run: Path) -> Plan | None:
    """The plan of a run; None where an older version trained it.

    Raises:
        UserError: it cannot be read, or its content is not that of its hash.
    """
    path, fix = run / PLAN, "put the file back as it was; another budget is given with --budget"
    if not path.is_file():
        return None
    try:
        plan = Plan.model_validate_json(path.read_bytes())
    except ValidationError as error:
        other = "where another version of this project trained the run, judge it with that, or train it again"
        raise first_error(path, error, f"{fix}; {other}") from error
    if (computed := plan.content_hash()) != plan.hash:
        problem = f"its hash says {plan.hash[:12]}, its content gives {computed[:12]}: it was edited"
        raise UserError(f"plan {path}", problem, fix)
    return plan


def fix_plan(study: Study, now: datetime | None = None) -> Plan:
    """Copies the budget and the recipes into the run folder, and returns what is fixed there.

    A plan is kept once anything was measured or judged, whatever the files say by then. Another one takes its
    place only where the settings that decide the models changed, or where nothing was measured yet.
    """
    old, run = read_plan(study.folder), study.folder
    measured = any((run / "records").rglob("*.json")) or (run / RUNS).is_file()
    if old is not None and measured and old.study == study.hash():
        return old
    budget, recipes = load_budget(study), current_recipes(study)
    if old is not None and (old.study, old.budget, old.recipes) == (study.hash(), budget, recipes):
        return old
    plan = Plan(
        time=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
        study=study.hash(),
        budget_name=study.budget,
        budget=budget,
        recipes=recipes,
        earlier=[*old.earlier, _earlier(old)] if old else [],
        hash="",
    )
    plan = plan.model_copy(update={"hash": plan.content_hash()})
    write_text(study.folder / PLAN, plan.model_dump_json(indent=1) + "\n")
    return plan


def _earlier(plan: Plan) -> EarlierPlan:
    return EarlierPlan(time=plan.time, hash=plan.hash, budget=plan.budget_hash())


@contextmanager
def put_back_if_refused(run: Path) -> Iterator[None]:
    """Settings whose data cannot be made leave a run as it was: its models are still of its own."""
    places = [run / name for name in ("study.yaml", CHANGED, PLAN)]
    texts = [place.read_text(encoding="utf-8") if place.is_file() else None for place in places]
    try:
        yield
    except UserError:
        for place, text in zip(places, texts, strict=True):
            if texts[0] is not None and text is None:
                place.unlink(missing_ok=True)
            elif text is not None:
                write_text(place, text)
        raise


def budget_of_run(study: Study, name: str | None = None) -> Budget:
    """What a run is judged by: the budget that was fixed in it, or another one, by its name or file."""
    plan = read_plan(study.folder)
    return plan.budget if plan is not None and name is None else load_budget(study, name)


def list_changes(before: Budget, now: Budget) -> list[str]:
    """Each setting that differs between two budgets, in a few words."""
    was, is_ = (flat_settings(budget.model_dump(mode="json")) for budget in (before, now))
    names = [name for name in sorted({*was, *is_}) if was.get(name) != is_.get(name) and name != "name"]
    return [f"{name} was {_shown(was, name)}, is {_shown(is_, name)}" for name in names]


def list_recipe_changes(before: dict[str, RecipeFile], now: dict[str, RecipeFile]) -> list[str]:
    """Each recipe that came, went or was changed."""
    how = {name: "added" if name not in before else "taken out" for name in {*before, *now}}
    how |= {name: "changed" for name in {*before} & {*now}}
    return [f"{name} was {how[name]}" for name in sorted(how) if before.get(name) != now.get(name)]


def _shown(settings: dict[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "not there"
