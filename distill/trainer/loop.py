"""The training loop: exact over accumulation and processes, and resumed to the same weights."""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.losses.teacher_output import Aligned, Target, Teacher, to_device
from distill.models.lm_head import check_head
from distill.trainer.checkpoint import Checkpoints, Curve
from distill.trainer.distributed import (
    check_deepspeed,
    gather_weights,
    gradient_norm,
    is_sharded,
    prepare_sharding,
)
from distill.trainer.loading import StepInput, load_steps, step_input
from distill.trainer.logging import Log
from distill.trainer.module import DistillationModule, final_norm, float32_products, layer_widths
from distill.trainer.optimizers import (
    build_optimizers,
    check_bitsandbytes,
    learning_rate_factor,
    set_learning_rate,
)
from eval.core.documents import Batch, Row, collate
from eval.core.errors import UserError
from eval.core.sections import Train
from eval.engines import silenced

Rewrite = Callable[
    [Accelerator, PreTrainedModel, int, list[Row]], list[Row]
]  # rows of a step -> those it learns from
CURVE_POINTS = 100
PROCESS_SEEDS = 1_000_003  # between the seeds of two processes; of a seed, a CPU takes the low 32 bits


def accelerator() -> Accelerator:
    """The processes and the device of this launch: the one place where they are set up.

    Raises:
        UserError: the launcher asked for DeepSpeed, which is not installed.
    """
    check_deepspeed(os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true")
    timeout = InitProcessGroupKwargs(
        timeout=timedelta(hours=6)
    )  # while the first process scores and writes targets
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=[timeout])


def total_steps(config: Train, rows: int) -> int:
    """Steps of a whole run.

    Raises:
        UserError: fewer rows than one step takes.
    """
    if rows < config.rows:
        fix = "lower train.rows, or raise data.train_rows"
        raise UserError("train.rows", f"{config.rows} rows per step, but only {rows} training rows", fix)
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


def batch_loss(
    module: nn.Module, batch: Batch, teacher: Teacher | None, target: Target | Aligned | None = None
) -> Tensor:
    """Summed loss of a batch by a DistillationModule, wrapped or not; without a target, the teacher runs."""
    if target is None and teacher is not None:
        with torch.no_grad():
            target = teacher(batch)
    return module(batch, target)


def step_loss(
    module: nn.Module, step: StepInput, teacher: Teacher | None, config: Train, acc: Accelerator
) -> float:
    """Backward of one step; returns its loss, the mean over the valid tokens of all processes.

    The sum over this process's tokens is divided by the *global* number of valid tokens; processes are
    averaged by DDP, hence the factor. So 1 x 8 and 8 x 1 rows give one loss and one gradient.
    """
    tokens = sum(row.predicted for row in step.rows)
    total = torch.zeros((), device=acc.device)
    for i, (batch, stored) in enumerate(zip(step.batches, step.targets, strict=True)):
        target = None if stored is None else to_device(stored, acc.device)
        # Gradients add up locally; the last backward pass reduces them over the processes. From the flag,
        # DeepSpeed knows when to clip and to step. `acc.accumulate` would divide the loss once more.
        acc.sync_gradients = i == len(step.batches) - 1
        with nullcontext() if acc.sync_gradients else acc.no_sync(module):
            loss = batch_loss(module, batch.to(acc.device), teacher, target) / tokens
            with float32_products(config.precision):
                acc.backward(loss * acc.num_processes)
        total += loss.detach()
    return float(acc.reduce(total, reduction="sum"))


def check_finite(value: float, step: int, rows: list[Row], what: str = "loss") -> None:
    """Refuses a loss or a gradient norm that is not a number, naming the step and its rows."""
    if not math.isfinite(value):
        names = ", ".join(row.id for row in rows)
        fix = f"lower the learning rate, or look at rows {names}"
        raise UserError(f"{what} at step {step + 1}", f"{value}, must be finite", fix)


class Step(NamedTuple):
    """Result of one training step."""

    number: int  # from 1
    total: int  # steps of the whole run
    loss: float  # mean over its tokens, in nats
    tokens: int  # predicted ones, over all processes


class MetricsLogger:
    """Reports a run step by step: loss curve, logs, validation bits per byte, progress."""

    def __init__(
        self,
        curve: Curve,
        norms: list[float],
        config: Train,
        *,
        report: Callable[[Step], None] | None,
        log: Log | None,
        evaluate: Callable[[], float] | None,
    ) -> None:
        self.curve, self.norms, self.config = curve, norms, config
        self.report, self.log, self.evaluate = report, log, evaluate
        self.since, self.tokens = time.monotonic(), 0

    def __call__(self, step: Step, rate: float, norm: float) -> None:
        self.tokens += step.tokens
        self.curve.append((step.number, step.loss))
        self.norms.append(norm)
        apart = max(1, step.total // CURVE_POINTS)  # steps between two points
        if step.number % apart == 0 or step.number == step.total:
            loss = self._join(since=(step.number - 1) // apart * apart)
            if self.log is not None:
                self.log(step.number, self._values(loss, rate))
            self.norms.clear()
        every = self.config.evaluate_every
        if self.evaluate is not None and every and step.number % every == 0:
            bits_per_byte = self.evaluate()  # by every process: a sharded student needs them all
            if self.log is not None:
                self.log(step.number, {"validation_bits_per_byte": bits_per_byte})
        if self.report is not None:
            self.report(step)

    def _join(self, since: int) -> float:
        """Makes the steps of the curve after `since` one point, and returns its loss, their mean.

        Until then each stands in the curve, and so in the checkpoints.
        """
        steps = [point for point in self.curve if point[0] > since]
        loss = sum(value for _, value in steps) / len(steps)
        self.curve[-len(steps) :] = [(steps[-1][0], loss)]
        return loss

    def _values(self, loss: float, rate: float) -> dict[str, float]:
        now, norm = time.monotonic(), sum(self.norms) / len(self.norms)
        speed = self.tokens / max(now - self.since, 1e-9)
        self.since, self.tokens = now, 0
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "tokens_per_second": speed}


def check_train(config: Train, device: torch.device, where: str = "train") -> None:
    """Refuses what cannot be trained with here, whatever the model.

    Args:
        where: key of the settings in the study, for errors.

    Raises:
        UserError: `auto`, which only a study settles; TF32 without CUDA; 8 bits without bitsandbytes.
    """
    if config.precision == "auto":
        fix = "give fp32, tf32 or bf16: only a study settles it, when its training starts"
        raise UserError(f"{where}.precision", "auto", fix)
    if config.precision == "tf32" and device.type != "cuda":
        raise UserError(f"{where}.precision", f"tf32 needs CUDA, the device is {device.type}", "take fp32")
    if config.optimizer.name == "adamw_8bit":
        check_bitsandbytes(where)


def set_memory_and_attention(model: PreTrainedModel, config: Train, where: str = "train") -> None:
    """Turns on what `config` asks of the model's own forward pass.

    Args:
        where: key of `config` in the study, for errors.

    Raises:
        UserError: the family has no such attention, or cannot compute its activations again.
    """
    try:
        if config.attention != "auto":
            with silenced("transformers"):
                model.set_attn_implementation(config.attention)
            if (used := model.config._attn_implementation) != config.attention:
                raise ValueError(f"it stays with {used} attention")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except (ValueError, ImportError) as error:
        problem = f"{type(model).__name__}: {' '.join(str(error).split())[:200]}"
        fix = f"leave {where}.attention or {where}.gradient_checkpointing out"
        raise UserError(where, problem, fix) from error


@torch.no_grad()
def build_module(
    model: PreTrainedModel, row: Row, config: Train, teacher: Teacher | None, pad: int
) -> DistillationModule:
    """The module to train; the model's head and the teacher are tried on one row first."""
    batch = collate([row], pad).to(model.device)
    check_head(model, batch)
    target = teacher(batch) if teacher is not None and config.loss.hidden is not None else None
    norm = final_norm(model, batch) if config.exits else None
    return DistillationModule(model, config, layer_widths(target, config), norm).to(model.device)


def train(
    model: PreTrainedModel,
    rows: Sequence[Row],
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
    """Trains `model` in place; returns its loss curve.

    Args:
        rows: training rows; `seed` alone decides their order.
        pad: id under the mask.
        teacher: batch -> target of its valid tokens; None for plain cross-entropy.
        scratch: folder of the checkpoints; an interrupted run continues from there to the same weights.
        rewrite: called with (accelerator, model, step from 0, rows) before every step; returns its rows.
        report: called after every step.
        log: receives loss, gradient norm and tokens per second at every point of the curve, as means of the
            steps since the point before, and the learning rate.
        evaluate: module -> validation bits per byte, logged every `config.evaluate_every` steps; must not
            change weights or random numbers.
        after_step: called after every optimizer step (for example to keep pruned weights at zero).

    Raises:
        UserError: the loss is not finite (names the step and the rows), or model head, targets and loss do
            not go together.
    """
    acc = accelerator()
    check_train(config, acc.device)
    steps = total_steps(config, len(rows))
    order = row_order(len(rows), steps, config.rows, seed)
    prepare_sharding(acc, config, model)
    torch.manual_seed(seed)
    trained = deepcopy(model) if is_sharded(acc) else model  # sharding changes a model for good
    set_memory_and_attention(trained, config)
    plain_module = build_module(trained, rows[order[0][0]], config, teacher, pad)
    optimizers = build_optimizers(trained, config, plain_module.own_weights)
    plain_module.train()
    module, *optimizers = acc.prepare(plain_module, *optimizers)
    if acc.process_index > 0:  # dropout of its own; the order of rows is that of the seed everywhere
        torch.manual_seed(seed + PROCESS_SEEDS * acc.process_index)
    checkpoints = Checkpoints(scratch, acc)
    start, curve, norms = checkpoints.load()
    evaluated = module if is_sharded(acc) else plain_module
    validation = None if evaluate is None else partial(evaluate, evaluated)
    log_metrics = MetricsLogger(curve, norms, config, report=report, log=log, evaluate=validation)
    loaded = load_steps(rows, order, start, config, acc, pad, teacher if rewrite is None else None)
    for step, prepared in enumerate(loaded, start):
        inputs = prepared
        if rewrite is not None:
            inputs = step_input(rewrite(acc, trained, step, prepared.rows), config, acc, pad)
        factor = learning_rate_factor(step, steps, config)
        set_learning_rate(optimizers, factor)
        loss = step_loss(module, inputs, teacher, config, acc)
        check_finite(loss, step, inputs.rows)
        norm = gradient_norm(acc, acc.clip_grad_norm_(module.parameters(), config.clip))
        check_finite(norm, step, inputs.rows, "gradient norm")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if after_step is not None:
            after_step()
        done = Step(step + 1, steps, loss, sum(row.predicted for row in inputs.rows))
        log_metrics(done, factor * config.optimizer.lr, norm)
        if done.number % config.checkpoint_every == 0 and done.number < steps:
            checkpoints.save(done.number, curve, norms)
    if is_sharded(acc):
        gather_weights(acc, module, model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    model.eval()
    acc.free_memory()
    return curve
