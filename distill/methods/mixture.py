"""A mixture of experts made of the dense base, against a dense model of the same active size."""

from copy import deepcopy
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from distill.method import Card, Method, MethodContext, Retrained
from eval.core.config import Frozen
from eval.core.errors import UserError
from eval.core.sections import Train

FAMILIES = ("llama", "mistral")  # whose blocks are those of Mixtral but for the experts
SHARED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
    "tie_word_embeddings",
    "sliding_window",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def upcycled(base: PreTrainedModel, experts: int, active: int, seed: int) -> PreTrainedModel:
    """A Mixtral model whose experts are all the base's MLP: it says what the base says.

    Sparse upcycling (Komatsuzaki et al. 2023, arXiv:2212.05055). Only the routers are new, and `seed` decides
    them: they give experts different tokens, so that these become different.
    """
    fields = {name: getattr(base.config, name, None) for name in SHARED}
    config = MixtralConfig(**fields, num_local_experts=experts, num_experts_per_tok=active)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    weights = base.state_dict()
    for name in [name for name in weights if ".mlp." in name]:
        block, part = name.split(".mlp.")
        if part == "down_proj.weight":
            weights[f"{block}.mlp.experts.down_proj"] = _copies(weights.pop(name), experts)
        elif part == "up_proj.weight":
            both = torch.cat([weights.pop(f"{block}.mlp.gate_proj.weight"), weights.pop(name)])
            weights[f"{block}.mlp.experts.gate_up_proj"] = _copies(both, experts)
    routers = {name: value for name, value in model.state_dict().items() if name.endswith("mlp.gate.weight")}
    model.load_state_dict({**weights, **routers})
    return model.eval()


def _copies(weight: Tensor, count: int) -> Tensor:
    return weight.expand(count, *weight.shape).clone()


def widened(base: PreTrainedModel, times: int, seed: int) -> PreTrainedModel:
    """The base with MLPs so many times as wide: it says what the base says.

    Every unit is there so many times, and each copy has a share of its outgoing weights: shares that `seed`
    draws, or copies would have the same gradient and stay copies.
    """
    config = deepcopy(base.config)
    config.intermediate_size = times * base.config.intermediate_size
    model = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
    weights = base.state_dict()
    generator = torch.Generator().manual_seed(seed)
    for name in [name for name in weights if ".mlp." in name]:
        if not name.endswith("down_proj.weight"):
            weights[name] = weights[name].repeat(times, 1)
            continue
        shares = torch.rand(times, weights[name].shape[1], generator=generator).add_(0.5)
        shares = (shares / shares.sum(0)).to(weights[name])
        weights[name] = torch.cat([weights[name] * share for share in shares], dim=1)
    model.load_state_dict(weights)
    return model.eval()


class Mixture(Retrained):
    card = Card(
        title="Mixture of experts",
        paper="sparse upcycling: Komatsuzaki et al. 2023, arXiv:2212.05055",
        claim="experts that each see some of the tokens learn more than a dense model that computes as much",
        touches="every MLP of the teacher: several experts, of which a router chooses a few for a token",
        limits="all experts must be held in memory; no loss balances them here; an MoE that is there already "
        "needs no method: name it as teacher.path, and `larger_teacher`",
    )

    class Settings(Frozen):
        experts: int = Field(4, gt=1, description="experts of a layer")
        active: int = Field(2, gt=1, description="experts that are run for a token")
        train: Train = Field(Train(), description="how the upcycled teacher and the wide control are trained")
        dense: bool = Field(False, description="a dense model of the same active size: the control")

        @model_validator(mode="after")
        def some_rest(self) -> Self:
            if self.active >= self.experts:
                raise ValueError(f"`active` ({self.active}) must be below `experts` ({self.experts})")
            return self

    def control(self) -> Method:
        """A dense model with MLPs `active` times as wide: as many weights are used for a token."""
        return Mixture(self.settings.model_copy(update={"dense": True}))

    def start(self, context: MethodContext) -> PreTrainedModel:
        """The base, made a mixture or wider.

        Raises:
            UserError: its family has other blocks.
        """
        base, settings = context.load_base(context.seed), self.settings
        biases = any(isinstance(m, nn.Linear) and m.bias is not None for m in base.modules())
        if base.config.model_type not in FAMILIES or biases:
            problem = f"{base.config.model_type}{' with biases' if biases else ''} cannot be made a mixture"
            fix = f"use a base of {' or '.join(FAMILIES)} without biases"
            raise UserError("method mixture", problem, fix)
        if settings.dense:
            return widened(base, settings.active, context.seed)
        return upcycled(base, settings.experts, settings.active, context.seed)
