"""The training step: exact over accumulation and processes, stopped and continued to the same weights."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel

from distill.losses.teacher_output import Teacher
from distill.models.lm_head import check_head
from distill.trainer.checkpoint import Checkpoints, Curve
from distill.trainer.distributed import (
    check_installed,
    gather_weights,
    gradient_norm,
    is_sharded,
    prepare_sharding,
)
from distill.trainer.logging import Log
from distill.trainer.module import DistillationModule, layer_widths
from eval.core.documents import Batch, Row, collate
from eval.core.errors import UserError
from eval.core.sections import Train

Rewrite = Callable[[Accelerator, PreTrainedModel, int, list[Row]], list[Row]]  # step -> the rows it takes
CURVE_POINTS = 100

# It warns of tied weights at every checkpoint; `load_state` ties them again, and a test holds the result.
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)


def accelerator() -> Accelerator:
    """One place that knows the processes and the device.

    Raises:
        UserError: the launcher asked for DeepSpeed, which is not installed.
    """
    check_installed(os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true")
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


def learning_rate_factor(step: int, steps: int, config: Train) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, flat, linear decay to zero."""
    up = (step + 1) / max(1.0, config.warmup * steps)
    down = (steps - step) / max(1.0, config.decay * steps)
    return min(1.0, up, down)


def _is_hidden_matrix(name: str, parameter: nn.Parameter, shared: set[int]) -> bool:
    return parameter.ndim == 2 and id(parameter) not in shared and "embed" not in name


def build_optimizers(
    model: PreTrainedModel, config: Train, projectors: Sequence[nn.Parameter] = ()
) -> list[Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all; no decay on vectors."""
    settings = config.optimizer
    rest_lr = settings.lr_rest or settings.lr
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends += [module for module in model.modules() if isinstance(module, nn.Embedding)]  # positions too
    shared = {id(p) for end in ends if end is not None for p in end.parameters()}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if _is_hidden_matrix(n, p, shared)]
    others = [p for n, p in named if not _is_hidden_matrix(n, p, shared)]
    decay = settings.weight_decay
    groups = [
        {"params": [*(p for p in others if p.ndim > 1), *projectors], "lr": rest_lr, "weight_decay": decay},
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


def batch_loss(learner: nn.Module, batch: Batch, teacher: Teacher | None) -> Tensor:
    """Summed loss of a batch, of the module or what wraps it; the teacher runs first, without gradient."""
    with torch.no_grad():
        target = None if teacher is None else teacher(batch)
    return learner(batch, target)


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


@contextmanager
def _sync_on_last(acc: Accelerator, learner: nn.Module, last: bool) -> Iterator[None]:
    """Inside, a backward pass adds its gradient up; the last of a step also joins those of all processes."""
    if last:
        acc.gradient_state._set_sync_gradients(True)  # what tells DeepSpeed to clip and step
        yield
    else:
        acc.gradient_state._set_sync_gradients(False)
        with acc.no_sync(learner):
            yield


def step_loss(
    learner: nn.Module, rows: list[Row], teacher: Teacher | None, config: Train, acc: Accelerator, pad: int
) -> float:
    """Backward of one step; returns its loss, the mean over the valid tokens of all processes.

    The sum over this process's tokens is divided by the *global* number of valid tokens; processes are
    averaged by DDP, hence the factor. So 1 x 8 and 8 x 1 rows give one loss and one gradient.
    """
    tokens = sum(row.predicted for row in rows)
    micro = _micro_batches(rows, config, acc, pad)
    total = torch.zeros((), device=acc.device)
    for i, batch in enumerate(micro):
        with _sync_on_last(acc, learner, last=i == len(micro) - 1):
            loss = batch_loss(learner, batch, teacher) / tokens
            acc.backward(loss * acc.num_processes)
        total += loss.detach()
    return float(acc.reduce(total, reduction="sum"))


def check_finite(value: float, step: int, rows: list[Row], what: str = "loss") -> None:
    """Refuses a loss or a gradient norm that is not a number, naming the step and its rows."""
    if not math.isfinite(value):
        names = ", ".join(row.id for row in rows)
        raise UserError(
            f"{what} at step {step + 1}", value, f"lower the learning rate, or look at rows {names}"
        )


def set_learning_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Step(NamedTuple):
    """What one step was."""

    number: int  # from 1
    of: int
    loss: float  # mean over its tokens, in nats
    tokens: int  # that it learned from, over all processes


class MetricsLogger:
    """What is told of a run: its curve, its logs, validation bits per byte, progress."""

    def __init__(
        self,
        curve: Curve,
        config: Train,
        *,
        report: Callable[[Step], None] | None,
        log: Log | None,
        evaluate: Callable[[], float] | None,
    ) -> None:
        self.curve, self.config = curve, config
        self.report, self.log, self.evaluate = report, log, evaluate
        self.since, self.tokens = time.monotonic(), 0

    def __call__(self, step: Step, rate: float, norm: float) -> None:
        self.tokens += step.tokens
        if step.number % max(1, step.of // CURVE_POINTS) == 0 or step.number == step.of:
            self.curve.append((step.number, step.loss))
            if self.log is not None:
                self.log(step.number, self._values(step.loss, rate, norm))
        every = self.config.evaluate_every
        if self.evaluate is not None and every and step.number % every == 0:
            found = self.evaluate()  # by every process: a student in shards needs them all
            if self.log is not None:
                self.log(step.number, {"validation_bits_per_byte": found})
        if self.report is not None:
            self.report(step)

    def _values(self, loss: float, rate: float, norm: float) -> dict[str, float]:
        now = time.monotonic()
        speed = self.tokens / max(now - self.since, 1e-9)
        self.since, self.tokens = now, 0
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "tokens_per_second": speed}


@torch.no_grad()
def build_module(
    model: PreTrainedModel, row: Row, config: Train, teacher: Teacher | None, pad: int
) -> DistillationModule:
    """The model with what its loss needs beside it, its head and its teacher tried on one row."""
    batch = collate([row], pad).to(model.device)
    check_head(model, batch)
    target = teacher(batch) if teacher is not None and config.loss.hidden is not None else None
    return DistillationModule(model, config, layer_widths(target, config)).to(model.device)


def train(
    model: PreTrainedModel,
    rows: list[Row],
    config: Train,
    *,
    pad: int,
    seed: int,
    teacher: Teacher | None,
    scratch: Path,
    rewrite: Rewrite | None = None,
    report: Callable[[Step], None] | None = None,
    log: Log | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    after_step: Callable[[], None] | None = None,
) -> Curve:
    """Trains `model` in place and returns its loss curve.

    Args:
        rows: training rows; step by step in an order that `seed` alone decides.
        pad: id under the mask.
        teacher: batch -> what it says of the valid tokens; None for plain cross-entropy.
        scratch: folder of the checkpoints; an interrupted run goes on from there to the same weights.
        rewrite: called with (accelerator, model, step from 0, rows) before every step; gives the step's rows.
        report: called after every step.
        log: takes loss, gradient norm, learning rate and tokens per second at every point of the curve.
        evaluate: module -> validation bits per byte, logged every `config.evaluate_every` steps; it leaves
            the weights and the random numbers as they are.
        after_step: called after every optimizer step (a pruned student keeps its zeros so).

    Raises:
        UserError: the loss is not finite (names the step and the rows), or the model's last step, the targets
            and the loss do not go together.
    """
    acc = accelerator()
    steps = total_steps(config, len(rows))
    order = row_order(len(rows), steps, config.rows, seed)
    prepare_sharding(acc, config, model)
    torch.manual_seed(seed)
    trained = deepcopy(model) if is_sharded(acc) else model  # what is split keeps another form for good
    plain = build_module(trained, rows[order[0][0]], config, teacher, pad)
    made = build_optimizers(trained, config, list(plain.projectors.parameters()))
    plain.train()
    learner, *made = acc.prepare(plain, *made)
    saved = Checkpoints(scratch, acc)
    start, curve = saved.load()
    whole = learner if is_sharded(acc) else plain
    validation = None if evaluate is None else partial(evaluate, whole)
    tell = MetricsLogger(curve, config, report=report, log=log, evaluate=validation)
    for step in range(start, steps):
        chosen = [rows[i] for i in order[step]]
        if rewrite is not None:
            chosen = rewrite(acc, trained, step, chosen)
        factor = learning_rate_factor(step, steps, config)
        set_learning_rate(made, factor)
        loss = step_loss(learner, chosen, teacher, config, acc, pad)
        check_finite(loss, step, chosen)
        norm = gradient_norm(acc, acc.clip_grad_norm_(learner.parameters(), config.clip))
        check_finite(norm, step, chosen, "gradient norm")
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
        if after_step is not None:
            after_step()
        done = Step(step + 1, steps, loss, sum(row.predicted for row in chosen))
        tell(done, factor * config.optimizer.lr, norm)
        if done.number % config.checkpoint_every == 0 and done.number < steps:
            saved.save(done.number, curve)
    if is_sharded(acc):
        gather_weights(acc, learner, model)
    model.eval()
    acc.free_memory()
    return curve
