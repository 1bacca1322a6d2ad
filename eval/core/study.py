"""The study and the recipes that it names: what every stage reads. Nothing runs here."""

import json
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator

from eval.core.artifacts import VERSIONS, digest, write_text
from eval.core.config import (
    PATH_KEYS,
    ROOT,
    FileName,
    Frozen,
    absolute_paths,
    apply_overrides,
    differences,
    find_config,
    flat_settings,
    laid_over,
    read_yaml,
    validate_config,
)
from eval.core.errors import UserError, require_one_of
from eval.core.records import PLAIN
from eval.core.sections import Base, Cost, Data, MethodChoice, Student, Targets, Train
from eval.core.sections.classification import check_task
from eval.core.sections.models import ACCESS_KEYS, SERVER_ACCESS, Teacher
from eval.core.sections.precision import PRECISION, has_auto, read_choice, replace_auto
from eval.core.sections.recipe import RecipeFile, recipe_at

RUN_FORMAT = 2  # of run folders; 1: before slices were called validation and test
CHANGED = ".changed"  # lies in a run folder while its models are of two settings
# No model depends on these.
WATCHED = {"checkpoint_every", "evaluate_every"}  # of a training
UNHASHED_KEYS = {"runs", "workers", "title", "recipes", "cost", "budget", "trackers", "rivals", "arms"}

ARM_KEYS = ["method", "teacher", "targets", "train", "student"]  # what an arm may have otherwise
PACE = ("epochs", "steps", "rows")  # of `train`, which it may not
ArmName = Annotated[str, Field(pattern="^[a-z0-9_]+$", max_length=100)]


def _known_stage(name: str) -> str:
    if name not in VERSIONS:
        raise ValueError(f"accepted: {', '.join(VERSIONS)}")
    return name


class Study(Frozen):
    """One config: everything that it produces lies in `folder`."""

    name: FileName = Field(description="name of the run folder, below `runs`")
    title: str = Field("", description="heading of the report; none: `name`")
    task: Literal["causal_lm", "classification"] = Field(
        "causal_lm",
        exclude_if=lambda value: value == "causal_lm",
        description="what models are made for: the next token, or the class of a text",
    )
    runs: str = Field("runs", description="folder that holds the run folders")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        min_length=1, description="one student of each arm, and its teacher, per seed"
    )
    data: Data
    base: Base
    teacher: Teacher | None = Field(None, description="what teaches in place of the base; none: the base")
    method: MethodChoice
    train: Train = Field(description="how teachers and students are trained")
    targets: Targets = Targets()
    student: Student = Student()
    ce_arm: Literal[True, False, "on_policy"] = Field(
        True,
        description="also train students without a teacher: on the data alone (cross-entropy), or "
        "`on_policy`: on what they write, each token of it with the advantage 1",
    )
    ce_train: Train | None = Field(
        None,
        description="what of `train` is otherwise for the CE arm, such as its learning rate; none: nothing",
    )
    rivals: dict[Literal["T1", "T0"], str] = Field(
        {},
        exclude_if=lambda value: not value,
        description="teachers that are one plain model and could be served as they are: what each is",
    )
    arms: dict[ArmName, dict[str, Any]] = Field(
        {},
        exclude_if=lambda value: not value,
        description="name -> what of `method`, `teacher`, `targets`, `train` or `student` is otherwise: the "
        "study again without a part, or with a rival, trained by `absorb compare`",
    )
    trackers: list[str] = Field(["tensorboard"], description="experiment trackers, by accelerate's names")
    recipes: list[str] = Field([], description="variants: files of configs/recipes, by name or path")
    cost: Cost = Cost()
    budget: str = Field(description="limits of a release: a file of configs/budgets, by name or path")
    workers: int = Field(2, gt=0, description="one-thread processes side by side on a CPU")
    accept_old: tuple[Annotated[str, AfterValidator(_known_stage)], ...] = Field(
        (), exclude=True, description="set by --accept-old; never stored"
    )

    @model_validator(mode="before")
    @classmethod
    def ce_is_trained_as_students_but_for(cls, raw: Any) -> Any:
        train, own = (raw.get(key) if isinstance(raw, dict) else None for key in ("train", "ce_train"))
        if isinstance(train, dict) and isinstance(own, dict):
            return {**raw, "ce_train": laid_over(train, own) if own else None}
        return raw

    @model_validator(mode="after")
    def seeds_differ_and_task_fits(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; give each seed once")
        check_task(self)
        return self

    @model_validator(mode="after")
    def rows_suffice(self) -> Self:
        named = {"train": self.train, "ce_train": self.ce_train, "base.train": self.base.train}
        for name, train in named.items():
            if train is not None and self.data.train_rows != "all" and train.rows > self.data.train_rows:
                raise ValueError(
                    f"{name}.rows is {train.rows}, more than data.train_rows: {self.data.train_rows}; set "
                    f"{name}.rows to at most that"
                )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def student_arms(self) -> list[str]:
        """Student arms in the order in which they are trained."""
        return ["S1", "S0", *(["CE"] if self.ce_arm else [])]

    def training(self, arm: str) -> Train:
        """How the students of an arm are trained."""
        return self.ce_train if arm == "CE" and self.ce_train is not None else self.train

    def own_training(self, arm: str) -> dict[str, Any]:
        """What of `train` is otherwise for an arm, as its section of a study says it."""
        return differences(*(one.model_dump(mode="json") for one in (self.training(arm), self.train)))

    def own_training_text(self, arm: str) -> str:
        """The same as `optimizer.lr 0.01 in place of 0.02`, but for what decides no model."""
        own, train = (flat_settings(one) for one in (self.own_training(arm), self.train.model_dump()))
        names = [name for name in own if name not in WATCHED]
        return ", ".join(f"{name} {own[name]} in place of {train.get(name)}" for name in names)

    def hash(self) -> str:
        """Digest of what decides the models and their scores; recipes and budgets may come and go."""
        beside: dict[str, Any] = {**dict.fromkeys(UNHASHED_KEYS, True), "teacher": {"server": SERVER_ACCESS}}
        beside |= {"train": WATCHED, "ce_train": WATCHED, "base": {"train": WATCHED}, "data": {"tasks"}}
        return digest(self.model_dump(mode="json", exclude=beside))


def find_study(where: str | Path | None) -> Path:
    """A YAML file, a run folder, or the file of a bare name in configs/studies; None: the folder one is in.

    Raises:
        UserError: there is none; the nearest is named.
    """
    fix = "give a YAML file, a run folder or a name of configs/studies"
    if where is None:
        if not is_run(Path()):
            older = sorted(Path("runs").glob("*/study.yaml"), key=lambda path: path.stat().st_mtime)
            hint = f" (the newest here is {older[-1].parent})" if older else ""
            fix = f"give a study's YAML file or a run folder{hint}, or call this inside a run folder"
            raise UserError("--study", "missing", fix)
        return Path().resolve()
    if where == "" or not isinstance(where, str | os.PathLike):
        raise UserError("study", repr(where)[:60], fix)
    path = Path(where)
    try:
        exists = path.exists()
    except OSError as error:  # its name is too long, or a folder may not be entered
        raise UserError("study", f"{str(where)[:60]!r}: {error.strerror}", fix) from error
    studies = ROOT / "configs" / "studies"
    named = studies / f"{where}.yaml"
    if path.is_dir() and not (path / "study.yaml").is_file():
        raise UserError(f"run folder {path}", "no study.yaml", "give a folder that `absorb train` made")
    if exists:
        return path if path.name else path.resolve()  # `.` has no name
    if path.name == str(where) and named.is_file():
        return named
    runs = [str(run.parent) for run in sorted(path.parent.glob("*/study.yaml"))]
    names = [file.stem for file in sorted(studies.glob("*.yaml"))]
    files = [str(file) for file in sorted(path.parent.glob("*.yaml"))]
    near = get_close_matches(str(where), [*runs, *files, *names], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    fix = f"{hint}give a YAML file, a run folder or one of {', '.join(names)}"
    raise UserError("study", f"{str(where)!r}: no such file or folder", fix)


def is_run(folder: Path) -> bool:
    return (folder / "study.yaml").is_file() and (folder / "data").is_dir()


def load_study(where: str | Path | None, words: list[str] | None = None, **overrides: Any) -> Study:
    """The study in a YAML file, or the one that made the run folder `where`, wherever that lies now.

    Args:
        where: see `find_study`.
        words: overrides as on a command line: `--train.steps 50`.
        overrides: the same as keywords, two underscores for a dot: `train__steps=50`; paths may be `Path`s.
    """
    path = find_study(where)
    raw = read_yaml(file := (path / "study.yaml" if path.is_dir() else path))
    if file.name == "study.yaml" and "run_format" in raw and is_run(file.parent):
        path = file.parent
    check_format(path, raw)
    if path.is_dir():
        real = path.resolve()
        path = path if path.name == real.name else real  # behind `.` or a link
        raw["runs"] = str(path.parent)
        if raw.get("name") != path.name:
            raise UserError(
                f"run folder {path}", f"its study.yaml is of {raw.get('name')!r}", "rename the folder to it"
            )
    apply_overrides(raw, [*(words or []), *_override_words(overrides)])
    for key in PATH_KEYS & raw.keys():
        raw[key] = absolute_paths(raw[key], Path.cwd())  # of the overrides: the others are absolute
    return settled(validate_config(Study, raw, str(file)))


def _override_words(overrides: dict[str, Any]) -> list[str]:
    """Keywords as on a command line: `train__steps=50` as `--train.steps=50`."""
    words = []
    for key, value in overrides.items():
        name = key.replace("__", ".")
        try:
            words.append(f"--{name}={json.dumps(value, default=os.fspath, ensure_ascii=False)}")
        except (TypeError, ValueError) as error:
            fix = "give plain values: texts, paths, int, float, bool, lists and dicts of them"
            raise UserError(f"override {name}", repr(value)[:60], fix) from error
    return words


def settled(study: Study) -> Study:
    """The study with `auto` replaced by what its run folder chose, if it has chosen."""
    raw = study.model_dump(mode="json")
    if not has_auto(raw) or (choice := read_choice(study.folder)) is None:
        return study
    settings = validate_config(Study, replace_auto(raw, choice), str(study.folder / PRECISION))
    return settings.model_copy(update={"accept_old": study.accept_old})


def asks_for_auto(study: Study) -> bool:
    """True if a setting of the study, of its method or of its recipes is `auto`."""
    passes = [read_recipe(name)[1].passes for name in study.recipes]
    return has_auto([study.model_dump(mode="json"), passes])


def check_format(path: Path, raw: dict[str, Any]) -> None:
    """Takes the format of its run folder out of a settled study.

    Raises:
        UserError: the folder was made by a version whose files this one does not read.
    """
    made_as = raw.pop("run_format", 1 if path.is_dir() else RUN_FORMAT)
    if made_as != RUN_FORMAT:
        raise UserError(
            f"run folder {path if path.is_dir() else path.parent}",
            f"the format of its study.yaml is {made_as}, this version reads {RUN_FORMAT}",
            "delete the folder and train again, or give the study another --name",
        )


def check_trained(study: Study) -> None:
    """Refuses settings other than those that made the run folder: its models would be misread.

    Raises:
        UserError: there is no such run, or the first setting that differs.
    """
    if not (study.folder / "study.yaml").is_file():
        fix = f"run `absorb train --config ...` for {study.name!r} first"
        raise UserError(f"run folder {study.folder}", "no study.yaml", fix)
    trained = load_study(study.folder)
    if (study.folder / CHANGED).is_file():
        problem = "its settings were changed, and training has not ended since: its models are of both"
        fix = f"run `absorb train --config {study.folder}` to its end"
        raise UserError(f"run folder {study.folder}", problem, fix)
    if trained.hash() == study.hash():
        return
    here, there = flat_settings(study.model_dump(mode="json")), flat_settings(trained.model_dump(mode="json"))
    names = [n for n in sorted({*here, *there}) if n.split(".")[0] not in UNHASHED_KEYS]
    names = [n for n in names if not n.startswith(("data.tasks.", *ACCESS_KEYS))]
    name = next(n for n in names if here.get(n) != there.get(n))
    raise UserError(
        f"{name} of run {study.folder}",
        f"was {there.get(name)!r} when it was trained, here it is {here.get(name)!r}",
        f"give --study {study.folder}, or train again",
    )


def make_run_folder(study: Study) -> Path:
    """The run folder, made if it is not there.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = study.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run folder {folder}", error.strerror, "give another place with --runs") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"run folder {folder}", "not writable", "fix its mode, or give --runs elsewhere")
    return folder


def save_study(study: Study) -> None:
    """Writes the settled study into its run folder; whoever does must hold the folder.

    Where that changes what made the models there, they are of both settings until training has `ended`.
    """
    path = study.folder / "study.yaml"
    if path.is_file():
        check_format(study.folder, read_yaml(path))
    if path.is_file() and _made_by(study.folder) != study.hash():
        write_text(study.folder / CHANGED, "its models are being made anew\n")
    write_text(path, study_text(study))


def study_text(study: Study) -> str:
    """What `study.yaml` of a run folder holds."""
    raw = {"run_format": RUN_FORMAT, **study.model_dump(mode="json")}
    if study.ce_train is not None:
        own = study.own_training("CE")  # and no more, so that a change of `train` reaches it
        raw["ce_train"] = own or raw["ce_train"]
    return yaml.safe_dump(raw, sort_keys=False)


def arm_studies(study: Study) -> list[Study]:
    """The study again for each of its `arms`, called after it: all but what it names is the same, CE too.

    Raises:
        UserError: an arm names another key, takes other steps, or is no study.
    """
    studies = []
    for name, changes in study.arms.items():
        thing = f"study {study.name}: arms.{name}"
        for key in changes:
            require_one_of(f"{thing}: key", key, ARM_KEYS)
        raw = study.model_dump(mode="json", exclude={"arms"}) | {"recipes": [], "name": name}
        arm = validate_config(Study, laid_over(raw, changes), thing)
        if wrong := [key for key in PACE if getattr(arm.train, key) != getattr(study.train, key)]:
            was, is_ = (getattr(one.train, wrong[0]) for one in (study, arm))
            fix = "leave it: arms have the same rows and steps; `absorb compare --row` takes others"
            raise UserError(f"{thing}.train.{wrong[0]}", f"{is_}, not {was} as in the study", fix)
        studies.append(arm.model_copy(update={"ce_train": study.training("CE")}))
    return studies


def mark_trained(study: Study) -> None:
    """Every model of the run is of the settled study."""
    (study.folder / CHANGED).unlink(missing_ok=True)


def _made_by(folder: Path) -> str | None:
    """Hash of the study that a run folder holds; None of one that cannot be read any more."""
    try:
        return load_study(folder).hash()
    except UserError:
        return None


def read_recipe(name: str) -> tuple[Path, RecipeFile]:
    """A recipe of configs/recipes by name, or from the path of a YAML file, and where it lies.

    Raises:
        UserError: names the file, the key and what is accepted.
    """
    path = find_config("recipes", name)
    recipe = recipe_at(path)
    if recipe.name == PLAIN:
        raise UserError(
            f"{path}: name", repr(PLAIN), "this name means the uncompressed student; take another"
        )
    return path, recipe


def recipe_names(study: Study) -> list[str]:
    """Names of the study's variants, the uncompressed student first.

    Raises:
        UserError: one is named twice, two have one name, or a file is not a recipe.
    """
    names, files = [PLAIN], set[Path]()
    for recipe in study.recipes:
        path, recipe_file = read_recipe(recipe)
        if path.resolve() in files:
            raise UserError(f"study {study.name}: recipes", f"{recipe!r} twice", "name each recipe once")
        if recipe_file.name in names:
            raise UserError(f"{path}: name", repr(recipe_file.name), "another recipe has it: rename it")
        names.append(recipe_file.name)
        files.add(path.resolve())
    return names
