"""The items of a task: prompts with known answers, from a JSONL file.

    {"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}     multiple_choice; or the choice itself
    {"prompt": "2 + 2 =", "answer": "4"}                            exact_match, f1; or a list of answers

An `id` may be given; without one an item is known by its line.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from eval.core.artifacts import digest, file_sha256
from eval.core.errors import UserError, require_one_of
from eval.core.jsonl import objects
from eval.core.sections import Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FIELDS = ["id", "prompt", "choices", "answer"]


@dataclass(frozen=True)
class Item:
    id: str
    prompt: str
    answers: list[str]  # any of them is right
    choices: list[str]  # of multiple choice


def source(task: Task) -> str:
    """Digest of what decides a task's marks beside the model: its settings and its file."""
    of_file = [file_sha256(_file(task))] if is_file(task) else []
    return digest([task.model_dump(mode="json"), *of_file])


def source_here(task: Task) -> str | None:
    """The same, or None where its file is not: a run folder may be judged away from its tasks."""
    return source(task) if not is_file(task) or Path(task.path).is_file() else None


def is_file(task: Task) -> bool:
    """False for a task that lm-evaluation-harness knows by its name."""
    return task.kind != "lm_eval" or task.path.endswith((".yaml", ".yml"))


def check_tasks(tasks: dict[str, Task]) -> None:
    """Refuses what no model could be scored on, before any is loaded."""
    for name, task in tasks.items():
        if not NAME.fullmatch(name):
            raise UserError(f"data.tasks: {name!r}", "not a name", "use letters, digits, dots and dashes")
        if task.kind == "lm_eval":
            check_installed(task)
        else:
            read_items(task)


def harness_name(task: Task) -> str:
    """The name of a task of lm-evaluation-harness, with or without `lm_eval:` before it; or a YAML file."""
    return task.path.removeprefix("lm_eval:")


def check_installed(task: Task) -> None:
    if find_spec("lm_eval") is None:
        thing = f"task lm_eval:{harness_name(task)}"
        raise UserError(thing, "lm_eval is not installed", "install the extra: pip install lm-eval")


def _file(task: Task) -> Path:
    path = Path(harness_name(task))
    if not path.is_file():
        raise UserError(f"task {task.path}", "no such file", "give the path of a file")
    return path


def read_items(task: Task) -> list[Item]:
    """The items of a task, in the order of its file.

    Raises:
        UserError: there is no such file or it holds no items, or the first line that is not an item.
    """
    rows = objects(_file(task), "task", "write one JSON object a line")
    found = [_item(where, row, str(number), task) for where, number, row in islice(rows, task.limit)]
    ids = [item.id for item in found]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"task {task.path}", f"two items are named {twice!r}", "give each its own id")
    return found


def _item(where: str, raw: dict[str, Any], number: str, task: Task) -> Item:
    for field in raw:
        require_one_of(f"{where}: unknown field", field, FIELDS)
    prompt, choices, answer = raw.get("prompt"), raw.get("choices", []), raw.get("answer")
    answers: list[Any] = answer if isinstance(answer, list) else [answer]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: prompt", repr(prompt), "give a text")
    if task.kind == "multiple_choice":
        answers = [_right_choice(where, choices, answer)]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UserError(f"{where}: answer", repr(raw.get("answer")), "give a text, or a list of texts")
    return Item(str(raw.get("id", number)), prompt, answers, choices)


def _right_choice(where: str, choices: Any, answer: Any) -> str:
    """The choice that `answer` names, by its index or by its text."""
    several = isinstance(choices, list) and len(choices) > 1
    if not several or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: choices", repr(choices)[:80], "give a list of at least two texts")
    if len(set(choices)) < len(choices):
        raise UserError(f"{where}: choices", repr(choices)[:80], "they must differ")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    if isinstance(answer, str) and answer in choices:
        return answer
    fix = f"give one of the choices, or an index below {len(choices)}"
    raise UserError(f"{where}: answer", repr(answer), fix)
