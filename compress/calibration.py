"""What passes measure on training rows: the loss, the norms of inputs, the model's own log-probabilities."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers.pytorch_utils import Conv1D

from compress.recipe import Context
from distill.data.sources import read_source
from distill.models.layers import decoder_layers
from eval.core.documents import Batch, Row, batches, collate, tokens_per_batch, windows
from eval.core.errors import UserError
from eval.core.sections.recipe import Calibration
from eval.engines.torch import logits_of

T = TypeVar("T")
LEAST_ALLOWED = 1e-3  # nats between two computations of one log-probability
LEAVE = "leave this pass, or this size, of this family out of the recipe"
CHECKED = 64  # rows whose ids are looked at before a pass
ERRORS_ALLOWED = 16  # times what float32 leaves open on this very model


def calibration_rows(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` of the rows, chosen by `seed` alone."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def own_rows(calibration: Calibration, tokenizer: Any, context: int) -> list[Row]:
    """Rows of a recipe's own documents: those of one document of each source in turn, until they are enough.

    Raises:
        UserError: a source cannot be read, or has no text.
    """
    sources, rows = [read_source(source) for source in calibration.documents], list[Row]()
    for documents in zip_longest(*sources):
        for document in (one for one in documents if one is not None):
            rows += (row for row in windows(tokenizer, document, context) if len(row.tokens) > 1)
        if len(rows) >= calibration.rows:
            break
    return rows[: calibration.rows]


def check_rows(context: Context, model: Any) -> None:
    """Refuses rows that say nothing of a model: none at all, or ids that it has no embedding for.

    Raises:
        UserError: there are no rows, or they were made by another tokenizer.
    """
    known, rows = model.config.get_text_config().vocab_size, context.rows
    if not len(rows):
        raise UserError("calibration", "no rows", "give it documents that are not empty")
    if (largest := max(max(row.tokens) for row in rows[:CHECKED])) >= known:
        problem = f"token id {largest}, the model has {known} tokens"
        raise UserError("calibration", problem, "give rows of the model's own tokenizer")


@torch.no_grad()
def log_probs(model: Any, batch: Batch) -> Tensor:
    """[B, T, V] float32 log-probabilities of a model with the interface of transformers, on the CPU."""
    moved = batch.to(model.device)
    return torch.log_softmax(logits_of(model, moved).float(), dim=-1).cpu()


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], pad: int) -> float:
    """Mean cross-entropy per token, in nats.

    Raises:
        UserError: it is not finite.
    """
    total, tokens = 0.0, 0
    size = tokens_per_batch(model.config.get_text_config().vocab_size, model.device)
    for cpu_batch in batches(rows, pad, size):
        batch = cpu_batch.to(model.device)
        logits = logits_of(model, batch, use_cache=False)
        total += float(
            cross_entropy(logits[:, :-1][batch.mask].float(), batch.labels[batch.mask], reduction="sum")
        )
        tokens += int(batch.mask.sum())
    if not math.isfinite(loss := total / tokens):
        raise UserError("calibration loss", loss, "it must be finite: look at the training of the student")
    return loss


Run: TypeAlias = tuple[
    Tensor, Callable[[], Any]
]  # an attention mask [B, T], and a call that runs modules on it


class _ReachedError(Exception):
    """Ends a forward pass at a layer."""


class Walk:
    """The decoder layers of a model in turn over one set of rows, each run on the output of those before it.

    A pass that changes layer after layer, and looks at the inputs of each after that, costs two forward
    passes in all (as Frantar and Alistarh 2023, "SparseGPT", work); the whole model for each layer would
    cost as many as there are layers.
    """

    def __init__(self, model: Any, rows: Sequence[Row], pad: int, batch_tokens: int = 4096) -> None:
        self.model, self.layers = model, decoder_layers(model)[2]
        every = batches(rows, pad, batch_tokens)
        self._inputs: list[tuple[Batch, Any]] = [(batch.to(model.device), None) for batch in every]

    @property
    def batches(self) -> list[Batch]:
        return [batch for batch, _ in self._inputs]

    def norms(self, index: int, modules: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """`input_norms` of linear layers inside the layer `index`; `leave` was called for all before it."""
        return input_norms(modules, self._runs(index))

    def hessians(self, index: int, modules: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
        """The same of `input_hessians`."""
        return input_hessians(modules, self._runs(index))

    def _runs(self, index: int) -> list[Run]:
        return [
            (batch.attention_mask, partial(self._run, index, batch, hidden)) for batch, hidden in self._inputs
        ]

    @torch.no_grad()
    def leave(self, index: int) -> None:
        """Stores the output of the layer `index`, as it is now: the input of the next one."""
        self._inputs = [(batch, self._run(index, batch, hidden)) for batch, hidden in self._inputs]

    def onward(self, index: int, call: Callable[[Batch], T]) -> Iterator[T]:
        """`call` of each batch, where the layers before `index` are not run: `leave` was called for all."""
        for batch, hidden in self._inputs:
            with self._left(index, hidden):
                yield call(batch)

    @contextmanager
    def _left(self, index: int, hidden: Any) -> Iterator[None]:
        """The layers before `index` return `hidden`, and do not run."""
        before = list(self.layers)[:index]
        for layer in before:
            layer.forward = lambda *args, **kwargs: hidden  # the model itself makes the masks of each layer
        try:
            yield
        finally:
            for layer in before:
                del layer.forward

    def _run(self, index: int, batch: Batch, hidden: Any) -> Any:
        """The output of the layer `index` where those before it return `hidden`; later ones do not run."""
        outputs: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise _ReachedError

        hook = self.layers[index].register_forward_hook(stop)
        try:
            with self._left(index, hidden):
                self.model(**batch.inputs, use_cache=False)
        except _ReachedError:
            return outputs[0]
        finally:
            hook.remove()
        raise UserError(f"layer {index}", "the model does not run it", "leave the pass out of the recipe")


def input_norms(modules: Mapping[str, nn.Linear | Conv1D], runs: Iterable[Run]) -> dict[str, Tensor]:
    """L2 norm over all tokens of each input of `modules`: name -> [I] float32. Padding is left out.

    Args:
        runs: attention mask [B, T] of each batch, and a call that runs the modules on it.

    Raises:
        UserError: a norm is not finite, or a module saw no token.
    """
    squares = _input_sums(modules, runs, lambda x: x.double().square().sum(dim=0))
    norms = {name: total.sqrt().float() for name, total in squares.items()}
    for name, norm in norms.items():
        _check_inputs(name, norm)
    return norms


def input_hessians(modules: Mapping[str, nn.Linear], runs: Iterable[Run]) -> dict[str, Tensor]:
    """Sum of x x' over the inputs x of all tokens: name -> [I, I] float64; else as `input_norms`."""
    sums = _input_sums(modules, runs, lambda x: (x.float().T @ x.float()).double())
    for name, total in sums.items():
        _check_inputs(name, total.diagonal())
    return sums


def _check_inputs(name: str, sums: Tensor) -> None:
    if not bool(torch.isfinite(sums).all()) or not bool(sums.any()):
        raise UserError(
            f"inputs of {name}",
            "not finite, or all zero",
            "both are useless for pruning: look at the student's training",
        )


@torch.no_grad()
def _input_sums(
    modules: Mapping[str, nn.Linear | Conv1D], runs: Iterable[Run], of: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sums over batches of what `of` makes of the inputs [N, I] of all real tokens; on the CPU."""
    sums: dict[str, Tensor] = {}
    masks: list[Tensor] = []

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values, mask = args[0], masks[-1]
        mask = mask.flatten() if values.ndim == 2 else mask  # some families put all tokens in one row
        if values.shape[:-1] != mask.shape:
            problem = f"{tuple(values.shape)}, of {mask.numel()} tokens"
            raise UserError(
                f"inputs of {name}",
                problem,
                "leave the pass out: it needs linear layers that see every token",
            )
        new = of(values[mask]).cpu()
        sums[name] = sums[name] + new if name in sums else new

    handles = [m.register_forward_pre_hook(partial(add, name)) for name, m in modules.items()]
    try:
        for mask, run in runs:
            masks.append(mask.bool())
            run()
    finally:
        for handle in handles:
            handle.remove()
    if unseen := next((name for name in modules if name not in sums), None):
        problem, fix = "it saw no token", "leave the pass out: it needs linear layers that see every token"
        raise UserError(f"inputs of {unseen}", problem, fix)
    return sums


def check_same_answers(model: Any, batch: Batch, before: Tensor, after: Tensor, thing: str) -> None:
    """Compares log-probabilities [n, V] of a model on `batch` with those of one that must say the same.

    Raises:
        UserError: they differ by more than float32 leaves open on `model`: the family of `thing` lays its
            weights out, or uses them, in another way than the pass knows.
    """
    difference = float((before - after).abs().max())
    if not difference <= (allowed := allowed_difference(rounding_error(model, batch))):
        problem = f"after the cut, log-probabilities differ by {difference:.3g} nats (at most {allowed:.3g})"
        raise UserError(f"{thing} of model type {model.config.model_type!r}", problem, LEAVE)


def check_export(thing: str, model: Any, exported: Any, batch: Batch) -> None:
    """Compares log-probabilities of an exported model on `batch` with those of the `model` it was made of.

    Raises:
        UserError: they differ by more than float32 leaves open on `model`.
    """
    allowed = allowed_difference(rounding_error(model, batch))
    differences = (log_probs(exported, batch) - log_probs(model, batch))[batch.attention_mask.bool()]
    if not (difference := float(differences.abs().max())) <= allowed:
        raise UserError(
            f"{thing} of {type(model).__name__}",
            f"log-probabilities differ from torch by up to {difference:.3g} nats, where float32 "
            f"on this model explains {allowed:.3g}",
            "it is another model: leave the pass out of the recipe for this architecture",
        )


def rounding_error(model: Any, batch: Batch) -> float:
    """Largest change of a log-probability, in nats, when every product is summed in float64 and rounded once.

    What float32 itself leaves open on this model: it grows with depth, width and the size of logits. Another
    engine sums in another order and cannot be nearer than that.
    """

    def exact(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight, bias = module.get_parameter("weight").double(), getattr(module, "bias", None)
        if isinstance(module, Conv1D):
            weight = weight.mT
        bias = None if bias is None else bias.double()
        return linear(args[0].double(), weight, bias).to(output.dtype)

    layers = [m for m in model.modules() if type(m) in (nn.Linear, Conv1D)]
    largest = 0.0
    for ids, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True):  # of one row at a time
        row = Batch([], [], [], ids[None, : int(mask.sum())], mask[None, mask].long())
        rounded = log_probs(model, row)
        handles = [layer.register_forward_hook(exact) for layer in layers]
        try:
            largest = max(largest, float((log_probs(model, row) - rounded).abs().max()))
        finally:
            for handle in handles:
                handle.remove()
    return largest


def allowed_difference(error: float) -> float:
    """How far log-probabilities of one model may lie apart, in nats, where float32 leaves `error` open."""
    return max(LEAST_ALLOWED, ERRORS_ALLOWED * error)


def check_batch(rows: Sequence[Row], pad: int) -> Batch:
    """The fixed batch of training rows on which a model and its saved copy are compared; none is packed."""
    return collate([replace(row, tokens=row.tokens[: row.parts[0][0]], packed=()) for row in rows[:4]], pad)
