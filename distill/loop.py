"""The training step: exact over accumulation and processes, stopped and continued to the same weights."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from distill.losses import distillation_loss
from eval.documents import Batch, Row, collate
from eval.errors import UserError
from eval.sections import Train

Teacher = Callable[[Batch], Tensor]  # batch -> log-probabilities [B, T, V], float32
Curve = list[tuple[int, float]]  # step, mean loss per token in nats
CURVE_POINTS = 100

# It warns of tied weights at every checkpoint; `load_state` ties them again, and a test holds the result.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def accelerator() -> Accelerator:
    """One place that knows the processes and the device."""
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # while the first process scores and caches
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[waiting])


def total_steps(config: Train, rows: int) -> int:
    """Steps of a whole run.

    Raises:
        UserError: fewer rows than one step takes.
    """
    if rows < config.rows:
        raise UserError("train.rows", config.rows, f"a step takes that many rows, and there are {rows}")
    return config.steps or config.epochs * rows // config.rows


def row_order(rows: int, steps: int, per_step: int, seed: int) -> list[list[int]]:
    """Row numbers of every step: each epoch a permutation of its own, the epochs laid end to end."""
    stream: list[int] = []
    epoch = 0
    while len(stream) < steps * per_step:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        stream += torch.randperm(rows, generator=generator).tolist()
        epoch += 1
    return [stream[i * per_step : (i + 1) * per_step] for i in range(steps)]


def learning_rate(step: int, steps: int, config: Train) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, flat, linear decay to zero."""
    up = (step + 1) / max(1.0, config.warmup * steps)
    down = (steps - step) / max(1.0, config.decay * steps)
    return min(1.0, up, down)


def _is_hidden_matrix(name: str, parameter: nn.Parameter, shared: set[int]) -> bool:
    return parameter.ndim == 2 and id(parameter) not in shared and "embed" not in name


def optimizers(model: PreTrainedModel, config: Train) -> list[Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all; no decay on vectors."""
    settings = config.optimizer
    rest_lr = settings.lr_rest or settings.lr
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    shared = {id(p) for end in ends if end is not None for p in end.parameters()}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if _is_hidden_matrix(n, p, shared)]
    others = [p for n, p in named if not _is_hidden_matrix(n, p, shared)]
    decay = settings.weight_decay
    groups = [
        {"params": [p for p in others if p.ndim > 1], "lr": rest_lr, "weight_decay": decay},
        {"params": [p for p in others if p.ndim < 2], "lr": rest_lr, "weight_decay": 0.0},
    ]
    if settings.name == "muon" and hidden:
        muon = Muon(hidden, lr=settings.lr, momentum=settings.momentum, weight_decay=decay)
        made: list[Optimizer] = [muon]
    else:
        groups.append({"params": hidden, "lr": settings.lr, "weight_decay": decay})
        made = []
    groups = [group for group in groups if group["params"]]
    if groups:
        made.append(AdamW(groups, lr=rest_lr, betas=settings.betas))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return made


class Checkpoints:
    """The last state of a run, whole or absent, and the loss curve up to it."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator

    def latest(self) -> Path | None:
        found = [p for p in self.folder.glob("step-*") if (p / "curve.json").is_file()]
        return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)

    def load(self) -> tuple[int, Curve]:
        """The step to go on from and the curve so far; 0 and nothing when there is no checkpoint."""
        path = self.latest()
        if path is None:
            return 0, []
        self.accelerator.load_state(str(path))
        return int(path.name.split("-")[1]), [tuple(p) for p in json.loads((path / "curve.json").read_text())]

    def save(self, step: int, curve: Curve) -> None:
        """Writes aside, then renames; the one before goes only when this one is whole."""
        aside, place = self.folder / ".saving", self.folder / f"step-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (aside / "curve.json").write_text(json.dumps(curve))
            before = self.latest()
            os.rename(aside, place)
            if before is not None and before != place:
                shutil.rmtree(before)
        self.accelerator.wait_for_everyone()


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs, use_cache=False).logits


def batch_loss(model: nn.Module, batch: Batch, teacher: Teacher | None, config: Train) -> Tensor:
    """Summed loss of a batch: position p of student and teacher answers for token p + 1."""
    valid = batch.mask
    student = _logits(model, batch)[:, :-1][valid]
    target = None
    if teacher is not None:
        with torch.no_grad():
            target = teacher(batch)[:, :-1][valid]
    return distillation_loss(student, batch.labels[valid], target, config.loss)


def _micro_batches(rows: list[Row], config: Train, acc: Accelerator, pad: int) -> list[Batch]:
    """This process's share of a step: every process knows all rows, so nothing is exchanged."""
    parts = config.accumulate * acc.num_processes
    if len(rows) % parts:
        raise UserError(
            "train.rows",
            len(rows),
            f"must be a multiple of accumulate x processes = {parts}; change one of them",
        )
    size = len(rows) // parts
    mine = range(acc.process_index, parts, acc.num_processes)
    return [collate(rows[i * size : (i + 1) * size], pad).to(acc.device) for i in mine]


def step_loss(
    model: nn.Module, rows: list[Row], teacher: Teacher | None, config: Train, acc: Accelerator, pad: int
) -> float:
    """Backward of one step; returns its loss, the mean over the valid tokens of all processes.

    The sum over this process's tokens is divided by the *global* number of valid tokens; processes are
    averaged by DDP, hence the factor. So 1 x 8 and 8 x 1 rows give one loss and one gradient.
    """
    tokens = sum(len(row.tokens) - 1 for row in rows)
    micro = _micro_batches(rows, config, acc, pad)
    total = torch.zeros((), device=acc.device)
    for i, batch in enumerate(micro):
        with nullcontext() if i == len(micro) - 1 else acc.no_sync(model):
            loss = batch_loss(model, batch, teacher, config) / tokens
            acc.backward(loss * acc.num_processes)
        total += loss.detach()
    return float(acc.reduce(total, reduction="sum"))


def train(
    model: PreTrainedModel,
    rows: list[Row],
    config: Train,
    *,
    pad: int,
    seed: int,
    teacher: Teacher | None,
    scratch: Path,
    report: Callable[[int, int, float], None] | None = None,
    after_step: Callable[[], None] | None = None,
) -> Curve:
    """Trains `model` in place and returns its loss curve.

    Args:
        rows: training rows; step by step in an order that `seed` alone decides.
        pad: id under the mask.
        teacher: batch -> log-probabilities [B, T, V]; None for plain cross-entropy.
        scratch: folder of the checkpoints; an interrupted run goes on from there to the same weights.
        report: called with (step, steps, loss) after every step.
        after_step: called after every optimizer step (a pruned student keeps its zeros so).

    Raises:
        UserError: the loss is not finite; names the step and the rows.
    """
    acc = accelerator()
    steps = total_steps(config, len(rows))
    order = row_order(len(rows), steps, config.rows, seed)
    torch.manual_seed(seed)
    made = optimizers(model, config)
    model.train()
    model, *made = acc.prepare(model, *made)
    saved = Checkpoints(scratch, acc)
    start, curve = saved.load()
    every = max(1, steps // CURVE_POINTS)
    for step in range(start, steps):
        chosen = [rows[i] for i in order[step]]
        loss = step_loss(model, chosen, teacher, config, acc, pad)
        if not math.isfinite(loss):
            names = ", ".join(row.id for row in chosen)
            raise UserError(
                f"loss at step {step + 1}", loss, f"lower the learning rate, or look at rows {names}"
            )
        clip_grad_norm_(model.parameters(), config.clip)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate(step, steps, config)
            optimizer.step()
            optimizer.zero_grad()
        if after_step is not None:
            after_step()
        if (step + 1) % every == 0 or step + 1 == steps:
            curve.append((step + 1, loss))
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < steps:
            saved.save(step + 1, curve)
        if report is not None:
            report(step + 1, steps, loss)
    acc.unwrap_model(model).eval()
    acc.free_memory()
    return curve
