"""The study: one YAML file, frozen, with unknown keys refused. Every stage reads it; it runs nothing."""

import argparse
import os
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eval.artifacts import digest, write_text
from eval.errors import UserError, one_of

ROOT = Path(__file__).resolve().parent.parent

BESIDE = {"runs", "workers", "title", "recipes", "cost", "budget"}  # keys that no model depends on
M = TypeVar("M", bound=BaseModel)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Frozen):
    """Where documents come from."""

    kind: Literal["folder", "dataset", "pydoc"]
    path: str = ""  # folder: a directory, `stdlib`, `package:NAME`; dataset: hub id, json, parquet, text
    include: list[str] = ["**/*.py"]
    exclude: list[str] = []  # shell patterns against /the/path/below/the/root
    data_files: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    domain_column: str | None = None
    domain: str | None = None  # a fixed name; folder sources default to the top folder of each file
    documents: int | None = Field(None, gt=0)  # at most so many: by hash; of a data set, the first


class Data(Frozen):
    """Documents: split by the hash of their id into training, held-out and sealed ones."""

    documents: list[Source] = Field(min_length=1)
    shifted: dict[str, list[Source]] = {}  # slice name -> documents that are only ever scored
    heldout: int = Field(64, gt=1)
    sealed: int = Field(64, ge=0)
    scored_bytes: int = Field(4096, gt=0)  # a scored document is cut to so many bytes
    context: int = Field(256, gt=1)  # tokens per row
    train_rows: int = Field(400, gt=0)


class Optimizer(Frozen):
    """Muon for the matrices (Jordan et al. 2024) with AdamW for the rest, or AdamW for all."""

    name: Literal["muon", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0)  # of the matrices
    lr_rest: float | None = Field(None, gt=0)  # of embeddings, norms and biases; default: lr
    momentum: float = Field(0.95, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)


class Loss(Frozen):
    """(1 - weight) CE + weight * divergence(teacher, student)."""

    divergence: Literal["forward_kl", "jsd"] = "forward_kl"
    weight: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)  # of the generalized JSD


class Train(Frozen):
    """How one model is trained."""

    epochs: int = Field(1, gt=0)
    steps: int | None = Field(None, gt=0)  # overrides epochs
    rows: int = Field(4, gt=0)  # per step, over all processes and accumulation steps
    accumulate: int = Field(1, gt=0)
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    targets: Literal["cached", "online"] = "cached"
    warmup: float = Field(0.05, ge=0, le=1)  # share of the steps
    decay: float = Field(0.3, ge=0, le=1)  # share of the steps, linear to zero
    clip: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(100, gt=0)

    @model_validator(mode="after")
    def divides(self) -> Self:
        if self.rows % self.accumulate:
            raise ValueError(f"rows ({self.rows}) must be a multiple of accumulate ({self.accumulate})")
        return self


class Base(Frozen):
    """The plain model: a hub name or folder, or an architecture trained from nothing."""

    path: str | None = None
    revision: str | None = None
    architecture: dict[str, Any] | None = None  # `model_type` and the fields of its transformers config
    vocab_size: int = Field(1024, gt=256)
    train: Train | None = None  # none: the named model is used as it is

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give exactly one of `path` (hub name or folder) and `architecture`")
        if self.architecture is not None and self.train is None:
            raise ValueError("`architecture` needs `train`: an untrained base has nothing to teach")
        return self


class MethodChoice(Frozen):
    name: str  # a file of distill/methods, or `package.module` of your own
    settings: dict[str, Any] = {}


class Cost(Frozen):
    """How latency and memory are measured."""

    processes: int = Field(3, gt=1)
    prompt_tokens: int = Field(128, gt=0)
    new_tokens: int = Field(32, gt=1)
    requests: int = Field(20, gt=0)  # per process, after warm-up
    warmup: int = Field(3, gt=0)
    threads: int = Field(1, gt=0)


class Study(Frozen):
    """One config: everything that it produces lies in `folder`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    runs: str = "runs"
    seeds: list[int] = Field(min_length=1)
    data: Data
    base: Base
    method: MethodChoice
    train: Train
    ce_arm: bool = True
    recipes: list[str] = []  # files of configs/recipes, by name or path
    cost: Cost = Cost()
    budget: str  # a file of configs/budgets, by name or path
    workers: int = Field(2, gt=0)  # one-thread processes side by side on a CPU

    @model_validator(mode="after")
    def seeds_differ(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be distinct and not negative, found {self.seeds}")
        return self

    @model_validator(mode="after")
    def rows_suffice(self) -> Self:
        for name, train in (("train", self.train), ("base.train", self.base.train)):
            if train is not None and train.rows > self.data.train_rows:
                raise ValueError(
                    f"{name}.rows is {train.rows}, more than data.train_rows: {self.data.train_rows}"
                )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def arms(self) -> list[str]:
        """Student arms in the order in which they are trained."""
        return ["S1", "S0", *(["CE"] if self.ce_arm else [])]

    def hash(self) -> str:
        """Digest of what decides the models and their scores; recipes and budgets may come and go."""
        beside: dict[str, Any] = dict.fromkeys(BESIDE, True)
        beside |= {"train": {"checkpoint_every"}, "base": {"train": {"checkpoint_every"}}}
        return digest(self.model_dump(mode="json", exclude=beside))


def find_config(kind: str, name: str) -> Path:
    """`configs/<kind>/<name>.yaml` for a bare name, else the path itself."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "configs" / kind / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in (ROOT / "configs" / kind).glob("*.yaml"))
        raise UserError(f"{kind} config", repr(name), f"no such file; known by name: {', '.join(known)}")
    return path


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError("config", str(path), "no such file; give the path of a YAML file")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}", " ".join(str(error).split()), "mend the YAML") from error
    if not isinstance(raw, dict):
        raise UserError(f"config {path}", type(raw).__name__, "the file must hold a mapping")
    return _unshared(raw)


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are values of their own: an override of one must not reach the other."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def validated(model: type[M], raw: dict[str, Any], where: str) -> M:
    """`model` built from `raw`; the first error is told with its path, value and what is accepted.

    Raises:
        UserError: an unknown key, a missing key or a value that is not accepted.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    thing = f"{where}: {'.'.join(loc) or 'top level'}"
    if first["type"] == "extra_forbidden":
        one_of(f"{where}: unknown key {'.'.join(loc)}", loc[-1], _accepted(model, loc[:-1]))
    if first["type"] == "missing":
        raise UserError(thing, "missing", "add this key")
    raise UserError(thing, repr(first["input"])[:200], first["msg"])


def _accepted(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields that are accepted at `path` below `model`."""
    fields = model.model_fields
    for part in path:
        if part not in fields:
            continue
        kinds = [fields[part].annotation, *getattr(fields[part].annotation, "__args__", ())]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        fields = inner[0].model_fields if inner else fields
    return list(fields)


def override(raw: dict[str, Any], words: list[str]) -> None:
    """Lays `--train.steps 50` or `--train.steps=50` over `raw`, in place."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError("command line", repr(word), "overrides look like --train.steps 50")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError("command line", word, "give a value after it")
            value = rest.pop(0)
        *path, last = name.split(".")
        place = raw
        for part in path:
            if not isinstance(place.setdefault(part, {}), dict):
                raise UserError("command line", word, f"{part!r} holds no keys")
            place = place[part]
        try:
            place[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError("command line", f"{word} {value}", "mend the YAML of its value") from error


def load_study(where: str | Path, words: list[str] | None = None) -> Study:
    """The study in a YAML file, or the one that made the run folder `where`, wherever that lies now."""
    path = Path(where) if Path(where).name else Path(where).resolve()  # `.` has no name
    raw = read_yaml(path / "study.yaml" if path.is_dir() else path)
    if path.is_dir():
        raw["runs"] = str(path.parent)
        if raw.get("name") != path.resolve().name:
            raise UserError(
                f"run folder {path}", f"holds the study {raw.get('name')!r}", "rename the folder to it"
            )
    override(raw, words or [])
    return validated(Study, raw, str(path))


def check_settled(study: Study) -> None:
    """Refuses settings other than those that made the run folder: its models would be misread.

    Raises:
        UserError: there is no such run, or the first setting that differs.
    """
    if not (study.folder / "study.yaml").is_file():
        mend = f"run `accelerate launch distill/train.py --config ...` for {study.name!r} first"
        raise UserError(f"run folder {study.folder}", "no study.yaml", mend)
    made = load_study(study.folder)
    if made.hash() == study.hash():
        return
    here, there = _flat(study.model_dump(mode="json")), _flat(made.model_dump(mode="json"))
    names = [n for n in sorted({*here, *there}) if n.split(".")[0] not in BESIDE]
    name = next(n for n in names if here.get(n) != there.get(n))
    raise UserError(
        f"{name} of run {study.folder}",
        f"was {there.get(name)!r} when it was trained, here it is {here.get(name)!r}",
        f"give --study {study.folder}, or train again",
    )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{path}.{key}" if path else key)
    return flat


def make_folder(study: Study) -> Path:
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
        raise UserError(f"run folder {folder}", "not writable", "mend its mode, or give --runs elsewhere")
    return folder


def settle(study: Study) -> None:
    """Writes the settled study into its run folder; whoever does must hold the folder."""
    text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)
    write_text(study.folder / "study.yaml", text)


def study_from_command(
    parser: argparse.ArgumentParser, trained: bool = True
) -> tuple[Study, argparse.Namespace]:
    """Parses `--config`/`--study` (a YAML file or a run folder), the parser's own flags and overrides.

    With `trained`, the settings must be those that made the run folder.
    """
    parser.add_argument(
        "--config", "--study", dest="study", required=True, help="a study's YAML file, or a run folder"
    )
    known, words = parser.parse_known_args()
    study = load_study(known.study, words)
    if trained:
        check_settled(study)
    return study, known
