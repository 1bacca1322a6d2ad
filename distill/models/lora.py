"""What of a student is trained: all weights, or low-rank adapters that are merged for the export."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.models.lm_head import output_embedding
from distill.models.quantized import dequantize, load_quantized, quantized_layers
from eval.core.errors import UserError
from eval.core.sections import Student
from eval.engines import silenced

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


@dataclass(frozen=True)
class TrainableModel:
    """A model to train, and the function that returns it as a plain model afterwards."""

    model: PreTrainedModel
    merged: Callable[[], PreTrainedModel]


def add_adapters(
    model: PreTrainedModel, config: Student, seed: int, *, device: torch.device, dtype: torch.dtype
) -> TrainableModel:
    """The student as the study trains it; `seed` decides the initial weights of adapters.

    LoRA (Hu et al. 2021, arXiv:2106.09685) keeps the weights of the model. QLoRA (Dettmers et al. 2023,
    arXiv:2305.14314) quantizes its matrices to NF4. The export contains the dequantized matrices with the
    adapters merged: the model that was trained.

    Args:
        dtype: of the products with NF4 matrices.

    Raises:
        UserError: no module of that name; QLoRA without CUDA or without bitsandbytes.
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
    """Refuses QLoRA on a CPU, where products of bitsandbytes 0.50 have no gradient."""
    if config.tuning == "qlora" and device.type != "cuda":
        raise UserError(
            "student.tuning", f"qlora needs CUDA, the device is {device.type}", "use lora on a CPU"
        )


def attach_adapters(model: PreTrainedModel, config: Student) -> PeftModel:
    """The model with trainable adapters; its own weights are frozen.

    Raises:
        UserError: no module of that name; it is the head, whose weight the loss reads directly, or its weight
            is tied to another module, which would get the merged adapter too.
    """
    from peft import get_peft_model

    head = next(name for name, module in model.named_modules() if module is output_embedding(model))
    if set(config.modules) & {head, head.split(".")[-1]}:
        raise UserError(
            "student.modules", config.modules, f"leave {head} out: the loss reads its weight directly"
        )
    try:
        with warnings.catch_warnings():
            # peft 0.21 requests twice the rank for fused matrices of experts, under a name that it does not
            # find: they get the rank of the study.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # refused below
            adapted = get_peft_model(model, _lora_config(model, config))
    except ValueError as error:
        problem = f"{config.modules} ({' '.join(str(error).split())[:200]})"
        raise UserError("student.modules", problem, "name linear layers, or give all-linear") from error
    check_routers(adapted, config)
    check_ties(adapted, config)
    return adapted


def check_ties(adapted: PeftModel, config: Student) -> None:
    """Refuses adapters on a weight that another module shares: merged, they would change that module too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [m for m in adapted.modules() if not isinstance(m, BaseTunerLayer)]
    uses = Counter(id(weight) for module in modules for weight in module.parameters(recurse=False))
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer):
            weights = module.get_base_layer().parameters(recurse=False)
            if any(uses[id(weight)] > 1 for weight in weights):
                own = name.removeprefix("base_model.model.")
                problem = f"{config.modules!r} includes {own}, whose weight is tied to another module"
                fix = "leave it out, or set tuning: full: merged adapters would change the other module too"
                raise UserError("student.modules", problem, fix)


def check_routers(adapted: PeftModel, config: Student) -> None:
    """Refuses adapters on a module of which the model needs more than the weight: peft 0.21 hides it."""
    from peft.tuners.lora.layer import ParamWrapper

    for name, module in adapted.named_modules():
        if isinstance(module, ParamWrapper) and list(module.get_base_layer().buffers(recurse=False)):
            problem = f"{config.modules!r} includes {name}, which has more than a weight"
            fix = "name the linear layers to adapt, e.g. [q_proj, o_proj]"
            raise UserError("student.modules", problem, fix)


def _lora_config(model: PreTrainedModel, config: Student) -> LoraConfig:
    from peft import LoraConfig

    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 stores [I, O]
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=config.modules,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


def add_adapters_to_nf4(
    plain: PreTrainedModel, config: Student, device: torch.device, dtype: torch.dtype
) -> TrainableModel:
    """Adapters on frozen NF4 matrices; `plain` gets the dequantized matrices, to merge the adapters into."""
    with TemporaryDirectory() as folder, silenced("transformers"):
        plain.save_pretrained(folder)  # transformers quantizes only while it loads
        quantized = load_quantized(Path(folder), "nf4", dtype, device)
    for name, layer in quantized_layers(quantized).items():
        _replace_weight(plain.get_submodule(name), dequantize(layer).cpu())
    adapted = attach_adapters(quantized, config)

    def merged() -> PreTrainedModel:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        merged_model = attach_adapters(plain, config)
        set_peft_model_state_dict(
            merged_model, get_peft_model_state_dict(adapted, save_embedding_layers=False)
        )
        return merged_model.merge_and_unload()

    return TrainableModel(adapted.get_base_model(), merged)


@torch.no_grad()
def _replace_weight(module: nn.Module, matrix: Tensor) -> None:
    """Overwrites a weight with the matrix [O, I] that was dequantized from it."""
    weight = module.get_parameter("weight")
    matrix = matrix.mT if isinstance(module, Conv1D) else matrix
    error = float((matrix - weight).norm() / weight.norm())
    assert error < 0.2, f"relative error {error:.3f} of a dequantized matrix; NF4 has 0.09"
    weight.copy_(matrix)
