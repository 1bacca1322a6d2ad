"""What of a student is trained: all of it, or low-rank adapters beside it that its export takes in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.models.lm_head import output_embedding
from distill.models.load import load_quantized
from eval.core.errors import UserError
from eval.core.sections import Student
from eval.engines.torch import quiet

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@dataclass(frozen=True)
class TrainableModel:
    """A model to train, and what makes a plain one of it afterwards."""

    model: PreTrainedModel
    merged: Callable[[], PreTrainedModel]


def add_adapters(
    model: PreTrainedModel, config: Student, seed: int, *, device: torch.device, dtype: torch.dtype
) -> TrainableModel:
    """The student as the study trains it; `seed` decides the first weights of adapters.

    LoRA (Hu et al. 2021, arXiv:2106.09685) leaves the model's own weights as they are. QLoRA (Dettmers et
    al. 2023, arXiv:2305.14314) holds its matrices in NF4; those very matrices, made plain, with the adapters
    added, are exported: the model that was trained.

    Args:
        dtype: of the products with NF4 matrices.

    Raises:
        UserError: no module has such a name; QLoRA without CUDA or without bitsandbytes.
    """
    if config.tuning == "full":
        return TrainableModel(model, lambda: model)
    torch.manual_seed(seed)
    if config.tuning == "lora":
        adapted = attach_adapters(model, config)
        return TrainableModel(adapted.get_base_model(), adapted.merge_and_unload)
    check_device(config, device)
    return add_adapters_to_nf4(model, config, device, dtype)


def check_device(config: Student, device: torch.device) -> None:
    """Refuses QLoRA on a CPU: the products of bitsandbytes 0.50 have no gradient there."""
    if config.tuning == "qlora" and device.type != "cuda":
        raise UserError("student.tuning", "qlora", "NF4 needs CUDA here: take lora on a CPU")


def attach_adapters(model: PreTrainedModel, config: Student) -> PeftModel:
    """The model with trainable adapters inside; its own weights are frozen.

    Raises:
        UserError: no module has such a name, or it is the head, whose own weight the loss reads.
    """
    from peft import get_peft_model

    head = next(name for name, module in model.named_modules() if module is output_embedding(model))
    if set(config.modules) & {head, head.split(".")[-1]}:
        raise UserError("student.modules", config.modules, f"leave {head} out: the loss reads its own weight")
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks for twice the rank for fused matrices of experts, by a name that it does not
            # find: they get the rank that the study asks for.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            adapted = get_peft_model(model, _lora_config(model, config))
    except ValueError as error:
        raise UserError("student.modules", config.modules, " ".join(str(error).split())[:200]) from error
    check_routers(adapted, config)
    return adapted


def check_routers(adapted: PeftModel, config: Student) -> None:
    """Refuses adapters on a module that its model reads more of than the weight: peft 0.21 hides the rest."""
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in adapted.named_modules():
        if isinstance(module, ParamWrapper) and list(module.get_base_layer().buffers(recurse=False)):
            found = f"{config.modules!r} takes in {name}, which has more than a weight"
            raise UserError(
                "student.modules", found, "name the linear layers to adapt, e.g. [q_proj, o_proj]"
            )


def _lora_config(model: PreTrainedModel, config: Student) -> LoraConfig:
    from peft import LoraConfig

    turned = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 keeps [I, O]
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=config.modules,
        fan_in_fan_out=turned,
        task_type="CAUSAL_LM",
    )


def add_adapters_to_nf4(
    plain: PreTrainedModel, config: Student, device: torch.device, dtype: torch.dtype
) -> TrainableModel:
    """NF4 matrices, frozen, with adapters beside; `plain` holds the same ones, and takes the adapters."""
    with TemporaryDirectory() as folder, quiet():
        plain.save_pretrained(folder)  # transformers quantizes while it loads, and only then
        small = load_quantized(Path(folder), "nf4", dtype, device)
    for name, matrix in dequantized_matrices(small).items():
        _replace(plain.get_submodule(name), matrix)
    adapted = attach_adapters(small, config)

    def merged() -> PreTrainedModel:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        whole = attach_adapters(plain, config)
        set_peft_model_state_dict(whole, get_peft_model_state_dict(adapted, save_embedding_layers=False))
        return whole.merge_and_unload()

    return TrainableModel(adapted.get_base_model(), merged)


def dequantized_matrices(model: nn.Module) -> dict[str, Tensor]:
    """[O, I] float32 of every NF4 layer, by its name. Before its first call: a CPU repacks it then."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {
        name: dequantize_4bit(m.weight.data, m.weight.quant_state).float().cpu() for name, m in found.items()
    }


@torch.no_grad()
def _replace(module: nn.Module, matrix: Tensor) -> None:
    """Puts the quantized matrix in the place of the one that it was made of."""
    weight = module.get_parameter("weight")
    matrix = matrix.mT if isinstance(module, Conv1D) else matrix
    gap = float((matrix - weight).norm() / weight.norm())
    assert gap < 0.2, f"NF4 restores a matrix with an error of {gap:.3f}; 0.09 is its own"
    weight.copy_(matrix)
