"""The samples of a task: prompts with known answers, from a JSONL file.

    {"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}     multiple_choice; or the choice itself
    {"prompt": "2 + 2 =", "answer": "4"}                            exact_match, f1; or a list of answers

An `id` may be given; without one, the number of its line is the id of a sample.
"""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from eval.core.artifacts import digest, file_sha256
from eval.core.documents import json_objects
from eval.core.errors import UserError, require_installed, require_one_of
from eval.core.sections import Task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FIELDS = ["id", "prompt", "choices", "answer"]


@dataclass(frozen=True)
class Sample:
    id: str
    prompt: str
    answers: list[str]  # the accepted ones
    choices: list[str]  # of multiple choice; empty for the other kinds


def task_digest(task: Task) -> str:
    """Digest of what decides the scores of a task beside the model: its settings and its file."""
    file_hash = [file_sha256(_task_file(task))] if is_file(task) else []
    return digest([task.model_dump(mode="json"), *file_hash])


def task_digest_or_none(task: Task) -> str | None:
    """The same, or None where the task file is missing: a run folder may be judged on another machine."""
    return task_digest(task) if not is_file(task) or Path(task.path).is_file() else None


def is_file(task: Task) -> bool:
    """False for a task that lm-evaluation-harness knows by its name."""
    return task.kind != "lm_eval" or task.path.endswith((".yaml", ".yml"))


def check_tasks(tasks: dict[str, Task]) -> None:
    """Checks every task of a study before any model is loaded.

    Raises:
        UserError: a name, a file or a missing library on which scoring would fail.
    """
    for name, task in tasks.items():
        if not NAME.fullmatch(name):
            raise UserError(
                f"data.tasks: {name!r}",
                "not a name that a file can have",
                "start with a letter or a digit, then letters, digits, dots, dashes and underscores",
            )
        if task.kind == "lm_eval":
            check_lm_eval_installed(task)
        else:
            read_samples(task)


def lm_eval_name(task: Task) -> str:
    """The name or the YAML file of a task of lm-evaluation-harness; the prefix `lm_eval:` may be left out."""
    return task.path.removeprefix("lm_eval:")


def check_lm_eval_installed(task: Task) -> None:
    require_installed("lm_eval", f"task lm_eval:{lm_eval_name(task)}", "run `pip install lm-eval`")


def _task_file(task: Task) -> Path:
    path = Path(lm_eval_name(task))
    if not path.is_file():
        raise UserError(f"task {task.path}", "no such file", "correct `path` of this task in data.tasks")
    return path


def read_samples(task: Task) -> list[Sample]:
    """The samples of a task, in the order of its file.

    Raises:
        UserError: the file is missing or empty, or a line is not a sample: the first such line is named.
    """
    rows = json_objects(_task_file(task), "task", "write one JSON object a line")
    samples = [
        _parse_sample(where, row, str(number), task) for where, number, row in islice(rows, task.limit)
    ]
    ids = [sample.id for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"task {task.path}", f"two samples have the id {twice!r}", "give each its own id")
    return samples


def _parse_sample(where: str, raw: dict[str, Any], number: str, task: Task) -> Sample:
    for field in raw:
        require_one_of(f"{where}: unknown field", field, FIELDS)
    prompt, choices, answer = raw.get("prompt"), raw.get("choices", []), raw.get("answer")
    answers: list[Any] = answer if isinstance(answer, list) else [answer]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: prompt", repr(prompt), "give a text that is not empty")
    if task.kind == "multiple_choice":
        answers = [_right_choice(where, choices, answer)]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise UserError(
            f"{where}: answer", repr(raw.get("answer")), "give a text, or a list of texts; none may be empty"
        )
    return Sample(str(raw.get("id", number)), prompt, answers, choices)


def _right_choice(where: str, choices: Any, answer: Any) -> str:
    """The choice that `answer` names, by its index or by its text."""
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(c, str) and c for c in choices):
        raise UserError(f"{where}: choices", repr(choices)[:80], "give a list of at least two texts")
    if len(set(choices)) < len(choices):
        raise UserError(
            f"{where}: choices",
            repr(choices)[:80],
            "choices must differ: leave out the second of two equal ones",
        )
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    if isinstance(answer, str) and answer in choices:
        return answer
    fix = f"give one of the choices, or an index below {len(choices)}"
    raise UserError(f"{where}: answer", repr(answer), fix)
