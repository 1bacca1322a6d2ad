"""A narrower model of the same family: which axes of its weights follow a size, and cutting them.

The axes are found by comparing the shapes of the model with those of one built from the smaller config, so
that no table of families is needed. What shapes do not show, such as the order inside a fused matrix, the
answers do: a cut model must answer like the whole one without what was cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from distill.models.layers import decoder_layers
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Size of a model -> the fields of transformers configs that may hold it.
FIELDS = {
    "ffn": ("n_inner", "ffn_dim", "intermediate_size"),
    "heads": ("num_key_value_heads", "num_attention_heads"),
    "hidden": ("hidden_size",),
    "vocabulary": ("vocab_size",),
}
LEAVE = "leave this size of this family as it is"
Matrix: TypeAlias = nn.Linear | Conv1D


@dataclass(frozen=True)
class Axis:
    """An axis of a weight that follows a size."""

    number: int
    size: int
    sections: int  # the channels of the size come so many times, one after the other, as in [gate | up]


@dataclass(frozen=True)
class Axes:
    """The weights that follow one size of a model."""

    kind: str  # a key of `FIELDS`
    size: int  # of the model as it is
    of: Mapping[str, Axis]  # name in the state dict -> its axis

    def places(self, name: str, kept: Tensor) -> Tensor:
        """The entries of the axis of `name` where the channels `kept` of the size are."""
        axis = self.of[name]
        if (
            self.kind == "heads"
        ):  # all entries of a head lie together, and those of queries that share its keys
            width = axis.size // self.size
            return (kept[:, None] * width + torch.arange(width)).flatten()
        return (torch.arange(axis.sections)[:, None] * self.size + kept).flatten()


def size_in_config(model: PreTrainedModel, kind: str) -> int:
    """The size of a model as its config says it.

    Raises:
        UserError: the config has no such size.
    """
    config = model.config.get_text_config()
    for field in FIELDS[kind]:
        if isinstance(value := getattr(config, field, None), int):
            return value
        if field == "n_inner" and hasattr(config, field):  # of GPT-2, which says none
            return int(4 * config.hidden_size)
    raise UserError(_thing(model, kind), f"its config has none of {', '.join(FIELDS[kind])}", LEAVE)


def smaller_configs(model: PreTrainedModel, kind: str, size: int, fields: Mapping[str, Any]) -> list[Any]:
    """The config with one size changed and other `fields`: one for each field that may hold the size."""
    old = model.config.get_text_config()
    heads = int(old.num_attention_heads)
    changes: list[dict[str, int]] = [{field: size} for field in FIELDS[kind] if hasattr(old, field)]
    if kind == "heads":
        groups = heads // int(getattr(old, "num_key_value_heads", None) or heads)
        grouped = {"num_key_value_heads": size} if hasattr(old, "num_key_value_heads") else {}
        changes = [{**grouped, "num_attention_heads": size * groups}]
    head_dim = getattr(old, "head_dim", None) or int(old.hidden_size) // heads
    return [_checked(model, kind, {**change, "head_dim": head_dim, **fields}) for change in changes]


def _checked(model: PreTrainedModel, kind: str, change: dict[str, Any]) -> Any:
    """The config with some fields changed, as it would be read from a file: transformers checks it there."""
    make = type(model.config).from_dict
    config = make(model.config.to_dict())
    for field, value in change.items():
        setattr(config.get_text_config(), field, value)
    try:
        return make(config.to_dict())
    except StrictDataclassError as error:
        problem = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(_thing(model, kind), problem, "cut it to another size") from error


def find_axes(model: PreTrainedModel, kind: str, size: int, **fields: Any) -> tuple[Any, Axes]:
    """The config of the model with one size changed to `size`, and the axes that follow it.

    Args:
        fields: of the config, that change with the size.

    Raises:
        UserError: nothing follows that size, or something in another way than it can be cut.
    """
    now = size_in_config(model, kind)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for config in smaller_configs(model, kind, size, fields):
        new = _built_shapes(model, config, kind)
        changed = [name for name in shapes if shapes[name] != new.get(name)]
        if changed:
            of = {
                name: _axis(model, kind, name, (shapes[name], new.get(name)), now, size) for name in changed
            }
            return config, Axes(kind, now, of)
    raise UserError(_thing(model, kind), "none of its weights follows it", LEAVE)


def _built_shapes(model: PreTrainedModel, config: Any, kind: str) -> dict[str, torch.Size]:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
    except (ValueError, RuntimeError) as error:
        raise UserError(_thing(model, kind), " ".join(str(error).split())[:200], LEAVE) from error
    return {name: tensor.shape for name, tensor in built.state_dict().items()}


def _axis(
    model: PreTrainedModel,
    kind: str,
    name: str,
    shapes: tuple[torch.Size, torch.Size | None],
    now: int,
    size: int,
) -> Axis:
    """The one axis of a weight that differs between two shapes, where the size is `now` and `size`."""
    before, after = shapes
    problem = f"{name} {tuple(before)} would be {'absent' if after is None else tuple(after)}"
    numbers = [] if after is None else [i for i, n in enumerate(before) if n != after[i]]
    if len(numbers) != 1 or after is None or len(after) != len(before):
        raise UserError(_thing(model, kind), problem, LEAVE)
    number = numbers[0]
    old, new = before[number], after[number]
    if old % now or old // now * size != new:
        raise UserError(_thing(model, kind), f"{problem}, in no proportion to it", LEAVE)
    if kind == "heads":
        config = model.config.get_text_config()
        heads = int(config.num_attention_heads)
        groups, head_dim = heads // now, getattr(config, "head_dim", None) or config.hidden_size // heads
        if old // now not in (1, groups, head_dim, groups * head_dim):
            raise UserError(_thing(model, kind), f"{name} holds queries, keys and values in one", LEAVE)
    return Axis(number, old, old // now)


def readers(model: PreTrainedModel, axes: Axes) -> dict[str, Matrix]:
    """The matrices that read what a size counts, by name: the size is the axis of their inputs."""
    reading = {}
    for name, module in model.named_modules():
        axis = axes.of.get(f"{name}.weight")
        inputs = 1 if type(module) is nn.Linear else 0 if type(module) is Conv1D else None
        if axis is not None and axis.number == inputs:
            reading[name] = module
    return reading


def layer_readers(model: PreTrainedModel, axes: Axes) -> dict[str, Matrix]:
    """The one matrix of each decoder layer that reads its channels or heads, in the order of the layers.

    Raises:
        UserError: a layer has none, or several.
    """
    reading = readers(model, axes)
    places = {name: i for i, name in enumerate(_layer_names(model))}
    layers = [places.get(_layer_of(name, places)) for name in reading]
    if layers != list(range(len(places))):
        problem = f"{len(reading)} linear layers read it, expected one in each of {len(places)} layers"
        raise UserError(_thing(model, axes.kind), problem, LEAVE)
    return reading


def output_energy(module: Matrix, norms: Tensor) -> Tensor:
    """[I] squared norm of what each input of a matrix adds to its outputs, over the tokens of `norms` [I].

    It is the squared error of the output without input i: the squared Wanda scores (Sun et al. 2023) of its
    column, summed.
    """
    weight = module.get_parameter("weight").detach().float()
    columns = weight.square().sum(dim=1 if isinstance(module, Conv1D) else 0)
    return columns.cpu() * norms.float().square()


def strongest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of `scores` [n], ascending; of equal ones the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


@torch.no_grad()
def cut(model: PreTrainedModel, config: Any, axes: Axes, kept: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of `config` with the `kept` channels of a size; the model given is not changed.

    Args:
        kept: decoder layer -> its channels, or "" -> those of every weight.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        narrow = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    weights = dict(model.state_dict())
    for name, axis in axes.of.items():
        places = axes.places(name, kept[_layer_of(name, kept)])
        weights[name] = weights[name].index_select(axis.number, places.to(weights[name].device))
    narrow.load_state_dict(weights)
    narrow.tie_weights()
    narrow.generation_config = copy.deepcopy(model.generation_config)
    return narrow


@torch.no_grad()
def masked(model: PreTrainedModel, axes: Axes, kept: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of the model in which nothing reads channels that are not `kept`: it answers as `cut` must."""
    whole = copy.deepcopy(model)
    for name, module in layer_readers(whole, axes).items():
        keep = torch.zeros(axes.of[f"{name}.weight"].size, dtype=torch.bool)
        keep[axes.places(f"{name}.weight", kept[_layer_of(name, kept)])] = True
        weight = module.get_parameter("weight")
        keep = keep.to(weight.device)
        weight *= keep[:, None] if isinstance(module, Conv1D) else keep
    return whole


def kept_by_layer(
    model: PreTrainedModel, axes: Axes, scores: Mapping[str, Tensor], count: int
) -> dict[str, Tensor]:
    """Decoder layer -> its `count` strongest channels, by the scores [I] of what its matrix reads."""
    layers = _layer_names(model)
    summed = [score.reshape(axes.size, -1).sum(dim=1) for score in scores.values()]
    return {layer: strongest(score, count) for layer, score in zip(layers, summed, strict=True)}


def _layer_names(model: PreTrainedModel) -> list[str]:
    names = {module: name for name, module in model.named_modules()}
    return [names[layer] for layer in decoder_layers(model)[2]]


def _layer_of(name: str, layers: Mapping[str, Any]) -> str:
    """The one of `layers` that a weight lies in; "" if in none."""
    return next((layer for layer in layers if layer and name.startswith(f"{layer}.")), "")


def _thing(model: PreTrainedModel, kind: str) -> str:
    return f"{kind} of model type {model.config.model_type!r}"
