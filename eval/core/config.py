"""YAML into frozen models with unknown keys refused, names in it into plug-ins."""

import ast
import copy
import hashlib
import importlib
import inspect
import math
import os
import pkgutil
import re
import sys
from abc import ABCMeta
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic.functional_validators import AfterValidator, field_validator

from eval.core.errors import UserError, expected_text, one_line, require_one_of
from eval.syntax import normalize

ROOT = Path(__file__).resolve().parents[2]
PATH_KEYS = {"budget", "recipes"}  # of a study: paths are taken from the folder of the file that names them
MAX_DEPTH, MAX_COPIED = 50, 100_000  # of YAML: levels inside one another, characters that aliases stand for
PACKAGES = ("package:", "pypi:", "npm:")  # how a path begins that names a package, not a folder or a file
M = TypeVar("M", bound=BaseModel)
OneLine = Annotated[str, AfterValidator(one_line)]  # a name or a reason in what is stored
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class Stored(BaseModel):
    """A part of a file that this project writes: a computed number may be infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Frozen(Stored):
    """A section of a config. Its numbers are finite, and true is no number."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def numbers_are_finite(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _flatten(cls.model_fields[str(info.field_name)].annotation)
        if not {int, float, Any}.intersection(kinds):
            return value
        stack = [value]
        while stack:
            part = stack.pop()
            if isinstance(part, dict | list | tuple):
                stack += part.values() if isinstance(part, dict) else part
            elif isinstance(part, bool) and bool not in kinds and Any not in kinds:
                raise ValueError("expected a number, not true or false")
            elif isinstance(part, float) and not math.isfinite(part):
                raise ValueError("expected a finite number")
        return value


def _flatten(annotation: Any) -> list[Any]:
    """The types that a nested annotation is made of: of `list[int] | None` list, int and None."""
    inner = [kind for part in get_args(annotation) for kind in _flatten(part)]
    return [kind for kind in inner if isinstance(kind, Hashable)] or [annotation]


def find_config(kind: str, name: str, inside: Path | None = None) -> Path:
    """The file of a bare name in `configs/<kind>`, or of a path.

    Args:
        inside: the config that names it: a path is taken from its folder, and a bare name may lie beside it.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_path else ROOT / "configs" / kind / f"{name}.yaml"
    if inside is not None:
        beside = inside.parent / (name if is_path else f"{name}.yaml")
        path = beside if is_path or beside.is_file() else path
    if not path.is_file():
        known = sorted(p.stem for p in (ROOT / "configs" / kind).glob("*.yaml"))
        thing = f"configs/{kind}" if inside is None else f"config {inside}: a file of configs/{kind}"
        raise UserError(thing, repr(name), f"no such file; known by name: {', '.join(known)}")
    return path


class OneKeyLoader(yaml.SafeLoader):
    """Reads `1e-6` as a number, an alias as a copy. Refuses repeated keys and what has no end or bound."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.around: list[str | None] = []  # anchors of the nodes around the present one
        self.copied = 0  # characters that aliases stand for

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, is_alias = self.peek_event(), self.check_event(yaml.AliasEvent)
        anchor = getattr(event, "anchor", None)
        endless = is_alias and anchor in self.around
        if endless or len(self.around) == MAX_DEPTH or self.copied > MAX_COPIED:
            limits = f"more than {MAX_DEPTH} levels, or {MAX_COPIED:,} characters of aliases"
            problem = f"alias *{anchor} stands inside what it names" if endless else limits
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.around.append(anchor)
        node = super().compose_node(parent, index)
        self.around.pop()
        if not is_alias:
            return node
        self.copied += len(yaml.serialize(node))
        return copy.deepcopy(node)  # an override of one must not reach the other

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError("the integer has more than 64 bits")
        except ValueError as error:  # a date that is none, an integer of thousands of digits
            problem = f"{node.value[:40]!r} cannot be read: {error}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((i for i, key in enumerate(keys) if key in keys[:i] and key != "<<"), None):
            key, _ = node.value[twice]
            raise yaml.MarkedYAMLError(problem=f"key {keys[twice]!r} twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 asks for a dot and a sign: PyYAML reads `1e-6` and `1.5e3` as strings
OneKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


@lru_cache(maxsize=256)
def _parse_yaml(text: str) -> Any:
    """What the text holds; a recipe is asked for by several checks of one command."""
    return yaml.load(text, Loader=OneKeyLoader)


def read_yaml(path: Path, kind: str = "studies", chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over those that it `extends`: mappings merge, the rest replaces.

    Later files win over earlier ones, and the file itself over all. A null takes an inherited key away.
    `name` and `title` are not inherited.

    Args:
        kind: folder of `configs` that bare names in `extends` are looked up in.
        chain: files that extend one another down to this one.

    Raises:
        UserError: no such file, no YAML, no mapping, or files that extend each other in a circle.
    """
    if not path.is_file():
        raise UserError("config", str(path), "no such file; give the path of a YAML file")
    try:
        raw = copy.deepcopy(_parse_yaml(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}", " ".join(str(error).split()), "fix the YAML") from error
    if not isinstance(raw, dict):
        raise UserError(f"config {path}", type(raw).__name__, "the file must hold a mapping")
    for key in PATH_KEYS & raw.keys():
        raw[key] = absolute_paths(raw[key], path.parent)
    if "extends" not in raw:
        return raw
    extends = raw.pop("extends")
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"config {path}: extends", repr(extends), "give a name, a path or a list of them")
    merged: dict[str, Any] = {}
    for name in names:
        parent = find_config(kind, name, path)
        check_circle(path, parent, chain, "extends")
        inherited = read_yaml(parent, kind, (*chain, path))
        merged = laid_over(merged, {k: v for k, v in inherited.items() if k not in ("name", "title")})
    return laid_over(merged, raw)


def absolute_paths(names: Any, folder: Path) -> Any:
    """Names of YAML files below `folder` as absolute paths; bare names of configs as they are."""
    if isinstance(names, list):
        return [absolute_paths(name, folder) for name in names]
    is_path = isinstance(names, str) and names.endswith((".yaml", ".yml"))
    return os.path.abspath(folder / names) if is_path else names


def check_circle(path: Path, parent: Path, chain: tuple[Path, ...], key: str) -> None:
    """Refuses a config that names, by way of others, itself."""
    files = [*chain, path]
    if parent.resolve() in [file.resolve() for file in files]:
        circle = " -> ".join(file.name for file in [*files, parent])
        raise UserError(f"config {path}: {key}", circle, "files name each other in a circle: remove one")


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge, everything else replaces, and a null takes a key away."""
    merged = dict(below)
    for key, value in above.items():
        if value is None and key in below:
            del merged[key]
        elif isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = laid_over(below[key], value)
        else:
            merged[key] = value
    return merged


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What must be laid over `other` so that it is `one`; a null takes away what only `other` has."""
    changed = {
        key: differences(value, other[key])
        if isinstance(value, dict) and isinstance(other.get(key), dict)
        else value
        for key, value in one.items()
        if value != other.get(key)
    }
    return changed | {key: None for key in other if key not in one}


def flat_settings(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    if not isinstance(value, dict):
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= flat_settings(inner, f"{path}.{key}" if path else key)
    return flat


def apply_overrides(raw: dict[str, Any], words: list[str]) -> None:
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
        *path, last = name.split(".", MAX_DEPTH)
        place = raw
        for part in path:
            if place.get(part) is None:
                place[part] = {}
            if not isinstance(place[part], dict):
                raise UserError("command line", word, f"{part!r} holds no keys")
            place = place[part]
        try:
            place[last] = yaml.load(value, Loader=OneKeyLoader)
        except yaml.YAMLError as error:
            problem = f"{word} {value[:60]} ({' '.join(str(error).split())})"
            raise UserError("command line", problem, "fix the YAML of its value") from error


def validate_config(model: type[M], raw: dict[str, Any], where: str) -> M:
    """`model` built from `raw`; the first error is reported with its path, value and what is accepted.

    Raises:
        UserError: an unknown key, a missing key or a value that is not accepted.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        errors = error.errors()
    first = errors[0]
    loc = _written_keys(first["loc"], raw)
    thing = ": ".join([where, *([".".join(loc)] if loc else [])])
    if first["type"] == "extra_forbidden":
        require_one_of(f"{where}: unknown key {'.'.join(loc)}", loc[-1], _accepted(model, loc[:-1]))
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):  # of a list of so many
        absent = [one for one in errors if one["loc"][:-1] == first["loc"][:-1]]
        fix = f"expected {len(first['input']) + len(absent)} of them"
        raise UserError(thing.rpartition(".")[0], repr(first["input"])[:200], fix)
    if first["type"] == "missing":
        raise UserError(thing, "missing", "add this key")
    problem, fix = repr(first["input"])[:200], expected_text(first)
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of several keys together
        problem, separator, rest = fix.partition("; ")
        problem, fix = (problem, rest) if separator else ("its keys do not fit", fix)
    raise UserError(thing, problem, fix)


def _written_keys(loc: tuple[int | str, ...], raw: Any) -> list[str]:
    """A place that pydantic names, without its names of kinds, which stand behind a key or a value."""
    keys, value = list[str](), raw
    for part in loc:
        if part == "[key]" or not isinstance(value, dict if isinstance(part, str) else dict | list | tuple):
            continue
        keys.append(str(part))
        inside = part in value if isinstance(value, dict) else int(part) < len(value)
        value = value[part] if inside else {}
    return keys


def _accepted(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the fields that are accepted at `path` below `model`."""
    fields = model.model_fields
    for part in path:
        if part not in fields:
            continue
        kinds = [fields[part].annotation, *getattr(fields[part].annotation, "__args__", ())]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        fields = inner[0].model_fields if inner else fields
    return [name for name, field in fields.items() if not field.exclude]  # set by a flag of its own


def plugin_names(package: str) -> list[str]:
    """The modules of `package`, sorted: the file name is the name in a config."""
    return sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))


def plugin_module(package: str, name: str, thing: str) -> ModuleType:
    """The module `name` of `package`, or the module at the path `name` where that holds a dot.

    Args:
        thing: what an error calls the plug-in, e.g. `method.name`.

    Raises:
        UserError: there is no such module, or it cannot be imported; the cause is named.
    """
    path = name if "." in name else f"{package}.{require_one_of(thing, name, plugin_names(package))}"
    return _imported(path, name, thing)


def plugin_function(path: str, thing: str) -> Callable[..., Any]:
    """The function at `package.module.function`, from a file anywhere on PYTHONPATH; see `plugin_module`.

    Raises:
        UserError: there is no such module or function, or it cannot be imported; the cause is named.
    """
    module, _, name = path.rpartition(".")
    function = getattr(_imported(module, path, thing), name, None) if module else None
    if not inspect.isfunction(function):
        raise UserError(thing, repr(path), "give a function of a module: package.module.function")
    return function


def _imported(path: str, name: str, thing: str) -> ModuleType:
    """The module at `path`, which a config calls `name`."""
    try:
        return importlib.import_module(path)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        absent = error.name is not None and f"{path}.".startswith(f"{error.name}.")
        fix = "is it on PYTHONPATH?" if absent else f"install what {path} imports"
        raise UserError(thing, repr(name), f"{error}; {fix}") from error
    except (Exception, SystemExit, GeneratorExit) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(thing, f"{name!r} cannot be imported ({cause})", f"correct {path}") from error


def plugin_class(
    package: str, name: str, thing: str, base: ABCMeta, attributes: dict[str, type]
) -> type[Any]:
    """The one subclass of `base` that the module `name` defines; see `plugin_module`.

    Args:
        attributes: name -> type of the class attributes that it must define beside its abstract methods.

    Raises:
        UserError: no such module, no or several subclasses in it, or one that is not complete.
    """
    module = plugin_module(package, name, thing)
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and issubclass(kind, base)]
    own = [kind for kind in dict.fromkeys(kinds) if kind.__module__ == module.__name__]
    if len(own) != 1:
        fix = f"define one subclass of {base.__name__} there; the module has {len(own)}"
        raise UserError(thing, repr(name), fix)
    kind = own[0]
    complete = all(isinstance(getattr(kind, field, None), wanted) for field, wanted in attributes.items())
    if inspect.isabstract(kind) or not complete:
        listed = " and ".join(f"`{field}`" for field in [*attributes, *sorted(base.__abstractmethods__)])
        raise UserError(thing, repr(name), f"{kind.__name__} must define {listed}")
    return kind


def plugin_code(kind: type, base: type) -> dict[str, str]:
    """Class -> digest of its code: of a plug-in and of what it inherits from, up to `base`.

    Inside this project that is the module of the class; what it imports is covered by the version of its
    stage. Of a class that lies outside, every module of its package counts.
    """
    code = {}
    for one in kind.__mro__:
        if one not in base.__mro__:
            path = Path(inspect.getfile(one)).resolve()
            is_packaged = sys.modules[one.__module__].__package__ and not path.is_relative_to(ROOT)
            paths = path.parent.rglob("*.py") if is_packaged else [path]
            trees = sorted(normalize(ast.parse(path.read_text(encoding="utf-8"))) for path in paths)
            code[one.__qualname__] = hashlib.sha256("\n\n".join(trees).encode()).hexdigest()[:16]
    return code
