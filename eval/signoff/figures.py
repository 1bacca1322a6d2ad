"""Figures of gate.json without its sentences, and where two of them differ."""

import math
from typing import Any

from pydantic import BaseModel

ALIKE = 1e-9  # relative: a processor with other vector units may round the last digits of a figure otherwise
COMMANDS = {"how", "folder", "tool"}  # for whoever runs commands: the folder as it was called then
# Sentences and what they are made of; figures of a resampling that decides nothing.
PROSE = COMMANDS | {"title", "reason", "remedy", "notes", "anomalies", "changes", "what"}
RESAMPLED = {"bootstrap_low", "bootstrap_high", "power_low", "power_high"}


def figures_of(value: Any, without: set[str] = PROSE | RESAMPLED) -> Any:
    """Verdicts, figures and hashes of a part of gate.json, as JSON: what a verdict is, however it is told.

    Fields are left out by what they are; a recipe or a slice that is called `how` is a key, and stays.
    """
    if isinstance(value, BaseModel):
        fields = {name: (info, getattr(value, name)) for name, info in type(value).model_fields.items()}
        shown = {n: v for n, (info, v) in fields.items() if not (info.exclude_if and info.exclude_if(v))}
        return {name: figures_of(shown[name], without) for name in sorted(set(shown) - without)}
    if isinstance(value, dict):
        return {str(key): figures_of(inner, without) for key, inner in value.items()}
    return [figures_of(one, without) for one in value] if isinstance(value, list | tuple) else value


def first_difference(
    a: Any, b: Any, place: str = "", words: tuple[str, str] = ("is", "the records give")
) -> str | None:
    """The first place where two JSON values differ; figures within `ALIKE` are the same.

    Args:
        words: before a value of `a`, and before one of `b`.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            below = f"{place}.{key}" if place else key
            if (key in a) != (key in b):
                return f"{below} is {'missing' if key in b else 'new'}"
            if inner := first_difference(a[key], b[key], below, words):
                return inner
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        each = (first_difference(x, y, f"{place}.{i}", words) for i, (x, y) in pairs)
        return next(filter(None, each), None)
    if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=ALIKE, abs_tol=1e-12):
        return None
    return None if a == b else f"{place} {words[0]} {_short(a)}, {words[1]} {_short(b)}"


def without_drawn(value: Any) -> Any:
    """JSON of figures without bounds of percentiles, and p-values of these, which are drawn from a stream.

    Another stream, as another version of numpy might have, changes no verdict, and verdicts stay.
    """
    if isinstance(value, list):
        return [without_drawn(one) for one in value]
    if not isinstance(value, dict):
        return value
    drawn: set[str] = set()
    if value.get("unit") in ("ms", "s"):  # of a percentile; a ratio to a variant is not drawn
        if "p_fail" in value and str(value.get("name")).endswith(("_p50", "_p95", "_p99")):
            drawn = {"low", "high", "p_fail"}
        elif "lower" in value and value["unit"] == "ms":
            drawn = {"lower", "upper"}
    return {key: without_drawn(one) for key, one in value.items() if key not in drawn}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
