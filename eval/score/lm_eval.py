"""Tasks of lm-evaluation-harness by name, through its own Python interface: an extra, `pip install lm-eval`.

A task runs with the prompts, shots and metrics of the harness, which loads the model itself: a checkpoint by
its `hf` class, an OpenVINO one by its `openvino` class, which needs optimum-intel.
"""

import json
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from eval.core.errors import UserError
from eval.core.records import SampleScores
from eval.core.sections import Task
from eval.engines import load_tokenizer, silenced
from eval.score.samples import check_lm_eval_installed, is_file, lm_eval_name

CLASSES = {"torch": "hf", "openvino": "openvino"}  # engine -> the harness's name for it; it has no others
BATCH = 8  # rows on a CPU; on a GPU as many as the harness finds that fit
PREFERRED = ("acc_norm", "acc", "exact_match", "f1")


@silenced("lm_eval")
def run_lm_eval(task: Task, engine: str, folder: Path, device: str = "cpu") -> tuple[SampleScores, str]:
    """Scores of the model in `folder`, one per sample, and the name of their metric.

    Raises:
        UserError: the harness is not installed, has no such task or no class for the engine, or a score is
            not between 0 and 1.
    """
    check_lm_eval_installed(task)
    if engine not in CLASSES:
        fix = "take tasks of lm_eval out of the study, or the recipes of this engine"
        raise UserError(f"engine {engine!r}", f"lm-evaluation-harness runs {', '.join(CLASSES)}", fix)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    path = Path(lm_eval_name(task))
    from_file = is_file(task)  # a task that the user wrote, in the format of the harness
    manager = TaskManager(include_path=str(path.parent) if from_file else None)
    name = yaml.safe_load(path.read_text(encoding="utf-8"))["task"] if from_file else str(path)
    if name not in manager.all_tasks:  # it has thousands: the nearest names are enough
        near = ", ".join(get_close_matches(name, manager.all_tasks)) or "`lm-eval ls tasks` lists them"
        fix = f"take the name of one that it has: {near}"
        raise UserError(f"task lm_eval:{path}", "lm-evaluation-harness has no such task", fix)
    asked = task.harness
    if asked.chat_template and load_tokenizer(folder).chat_template is None:
        fix = "leave data.tasks.*.harness.chat_template out"
        raise UserError(f"task lm_eval:{path}", f"the tokenizer of {folder} has no chat template", fix)
    bos = {} if asked.bos is None else {"add_bos_token": asked.bos}
    with TemporaryDirectory() as scratch:
        results = simple_evaluate(
            model=CLASSES[engine],
            model_args={
                "pretrained": str(folder),
                **arithmetic(engine, folder, device, Path(scratch)),
                **bos,
            },
            num_fewshot=asked.shots,
            apply_chat_template=asked.chat_template,
            gen_kwargs=asked.generation or None,
            tasks=[name],
            task_manager=manager,
            device=device,
            batch_size=BATCH if device == "cpu" else "auto",
            limit=task.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    assert results is not None, "None is for the other ranks of a distributed run"
    return sample_scores(results["samples"])


def arithmetic(engine: str, folder: Path, device: str, scratch: Path) -> dict[str, str]:
    """What makes the harness compute as this project's engine does: scores by both are of one arithmetic.

    Args:
        scratch: a folder for what it reads from a file.
    """
    if engine == "openvino":
        from eval.engines.openvino import EXACT

        path = scratch / "openvino.json"
        path.write_text(json.dumps(EXACT), encoding="utf-8")
        return {"ov_config": str(path)}
    import torch

    from eval.engines.torch import check_folder, computing_dtype, stored_dtype

    if check_folder(folder):
        return {"dtype": "auto"}  # quantized
    dtype = computing_dtype(stored_dtype(folder), torch.device(device))
    return {"dtype": str(dtype).removeprefix("torch.")}


def sample_scores(samples: dict[str, list[dict[str, Any]]]) -> tuple[SampleScores, str]:
    """The scores in the sample log of the harness: its first filter, the first metric of `PREFERRED`."""
    first = next(iter(samples.values()))[0]
    metric = next((name for name in PREFERRED if name in first["metrics"]), first["metrics"][0])
    ids, values = [], []
    for name, rows in samples.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            if row["filter"] == rows[0]["filter"]:
                ids.append(f"{name}:{row['doc_id']}")
                values.append(row[metric])
    if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in values):
        raise UserError(
            f"task {ids[0]}",
            f"its metric {metric!r} is not between 0 and 1",
            "take a task with acc, exact_match or f1",
        )
    return SampleScores(id=ids, value=[float(value) for value in values]), metric
