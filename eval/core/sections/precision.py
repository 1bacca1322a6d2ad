"""`auto` for a precision or a dtype: what it stands for in a run, chosen once and kept in its folder."""

import json
from pathlib import Path
from typing import Any

from eval.core.errors import UserError

PRECISION = "precision.json"  # lies in a run folder: what `auto` means there, measured at its start
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
Choice = dict[str, str]  # key of a setting -> what `auto` is there


def read_choice(folder: Path) -> Choice | None:
    """What a run folder chose; None if it has not.

    Raises:
        UserError: the file with the choice is damaged.
    """
    file = folder / PRECISION
    if not file.is_file():
        return None
    try:
        precision = json.loads(file.read_text(encoding="utf-8"))["precision"]
        return {"precision": precision, "dtype": DTYPES[precision]}
    except (ValueError, KeyError, TypeError) as error:
        problem, fix = "holds no precision: fp32 or bf16", "delete it: the next training measures again"
        raise UserError(str(file), problem, fix) from error


def has_auto(value: Any) -> bool:
    """True if a precision or a dtype in settings, however deep, is still `auto`."""
    return bool(value != replace_auto(value, {"precision": "", "dtype": ""}))


def replace_auto(value: Any, choice: Choice) -> Any:
    """Settings with every `auto` under a key of `choice` replaced; an architecture is not ours to change."""
    if isinstance(value, list):
        return [replace_auto(one, choice) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inner
        if key == "architecture"
        else choice[key]
        if inner == "auto" and key in choice
        else replace_auto(inner, choice)
        for key, inner in value.items()
    }
