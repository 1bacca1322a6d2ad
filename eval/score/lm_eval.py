"""Tasks of lm-evaluation-harness by name, through its own Python interface: an extra, `pip install lm-eval`.

A task runs with the harness's own prompts, shots and marks. It loads a model itself: a checkpoint by its `hf`
class, an OpenVINO one by its `openvino` class, which needs optimum-intel.
"""

import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from eval.core.errors import UserError
from eval.core.records import Items
from eval.core.sections import Task
from eval.score.items import check_installed, harness_name, is_file

CLASSES = {"torch": "hf", "openvino": "openvino"}  # engine -> the harness's name for it
PREFERRED = ("acc_norm", "acc", "exact_match", "f1")


def run_harness(task: Task, engine: str, folder: Path, batch_size: int = 8) -> tuple[Items, str]:
    """Marks of the model in `folder`, one per item, and the metric that they are.

    Raises:
        UserError: the harness is not installed, knows no such task, or marks beyond 0 to 1.
    """
    check_installed(task)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    where = Path(harness_name(task))
    own = is_file(task)  # a task of the user's, in the harness's format
    manager = TaskManager(include_path=str(where.parent) if own else None)
    name = yaml.safe_load(where.read_text(encoding="utf-8"))["task"] if own else str(where)
    if name not in manager.all_tasks:  # thousands: the nearest ones do
        near = ", ".join(get_close_matches(name, manager.all_tasks)) or "see `lm-eval ls tasks`"
        raise UserError(f"task lm_eval:{where}", "the harness knows no such task", f"take another: {near}")
    found = simple_evaluate(
        model=CLASSES[engine],
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=[name],
        task_manager=manager,
        device="cpu",
        batch_size=batch_size,
        limit=task.limit,
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found is not None, "one process gets the results"
    return marks(found["samples"])


def marks(samples: dict[str, list[dict[str, Any]]]) -> tuple[Items, str]:
    """The harness's log of samples as items: the first filter's, by the metric that is preferred."""
    first = next(iter(samples.values()))[0]
    known = [name for name in PREFERRED if name in first["metrics"]]
    metric = known[0] if known else first["metrics"][0]
    ids, values = [], []
    for name, rows in samples.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            if row["filter"] == rows[0]["filter"]:
                ids.append(f"{name}:{row['doc_id']}")
                values.append(row[metric])
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise UserError(
            f"task {ids[0]}", f"its metric {metric!r} is not between 0 and 1", "take another task"
        )
    return Items(id=ids, value=[float(value) for value in values]), metric
