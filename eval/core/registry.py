"""Plug-ins: a folder of modules is a registry, and a `package.module` path reaches one outside of it."""

import importlib
import inspect
import pkgutil
from abc import ABCMeta
from types import ModuleType
from typing import Any

from eval.core.errors import UserError, require_one_of


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
