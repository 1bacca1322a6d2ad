"""YAML into frozen models with unknown keys refused, and the names in it into plug-ins."""

import importlib
import inspect
import pkgutil
import re
from abc import ABCMeta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from eval.core.errors import UserError, require_one_of

ROOT = Path(__file__).resolve().parents[2]
M = TypeVar("M", bound=BaseModel)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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
        thing = f"{kind} config" if inside is None else f"config {inside}: names the {kind} config"
        raise UserError(thing, repr(name), f"no such file; known by name: {', '.join(known)}")
    return path


class OneKeyLoader(yaml.SafeLoader):
    """Refuses a second key of one name, which would replace the first; reads `1e-6` as a number."""

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
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=OneKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}", " ".join(str(error).split()), "fix the YAML") from error
    if not isinstance(raw, dict):
        raise UserError(f"config {path}", type(raw).__name__, "the file must hold a mapping")
    raw = _unshared(raw)
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
        merged = _laid_over(merged, {k: v for k, v in inherited.items() if k not in ("name", "title")})
    return _laid_over(merged, raw)


def check_circle(path: Path, parent: Path, chain: tuple[Path, ...], key: str) -> None:
    """Refuses a config that names, by way of others, itself."""
    files = [*chain, path]
    if parent.resolve() in [file.resolve() for file in files]:
        circle = " -> ".join(file.name for file in [*files, parent])
        raise UserError(f"config {path}: {key}", circle, "files name each other in a circle: remove one")


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if value is None and key in below:
            del merged[key]
        elif isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = _laid_over(below[key], value)
        else:
            merged[key] = value
    return merged


def _unshared(value: Any) -> Any:
    """A copy in which YAML's aliases are values of their own: an override of one must not reach the other."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def validate_config(model: type[M], raw: dict[str, Any], where: str) -> M:
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
        require_one_of(f"{where}: unknown key {'.'.join(loc)}", loc[-1], _accepted(model, loc[:-1]))
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
        *path, last = name.split(".")
        place = raw
        for part in path:
            if not isinstance(place.setdefault(part, {}), dict):
                raise UserError("command line", word, f"{part!r} holds no keys")
            place = place[part]
        try:
            place[last] = yaml.load(value, Loader=OneKeyLoader)
        except yaml.YAMLError as error:
            raise UserError("command line", f"{word} {value}", "fix the YAML of its value") from error


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
    try:
        return importlib.import_module(path)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        absent = error.name is not None and f"{path}.".startswith(f"{error.name}.")
        fix = "is it on PYTHONPATH?" if absent else f"install what {path} imports"
        raise UserError(thing, repr(name), f"{error}; {fix}") from error
    except Exception as error:
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
        fields = [*attributes, *sorted(base.__abstractmethods__)]
        listed = " and ".join(f"`{field}`" for field in fields)
        raise UserError(thing, repr(name), f"{kind.__name__} must define {listed}")
    return kind
