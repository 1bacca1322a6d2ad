"""Models as bitsandbytes quantizes them: `int8` (LLM.int8, Dettmers et al. 2022) and `nf4` (QLoRA, 2023)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from eval.core.errors import require_installed
from eval.engines import silenced


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The config of `int8`, or of `nf4` with products in `dtype`."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_quantized(folder: Path, kind: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model quantized by bitsandbytes: `int8`, or `nf4` with products in `dtype`; the rest in `dtype`.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    require_installed("bitsandbytes", f"quantization {kind!r}", "run `pip install '.[gpu]'`")
    with silenced("transformers"):
        model = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            quantization_config=quantization_config(kind, dtype),
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    return model.eval()


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that bitsandbytes holds, by name."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantize(layer: Any) -> Tensor:
    """[O, I] float32: the matrix that a quantized layer multiplies with.

    Before the layer's first call: on a CPU bitsandbytes then stores NF4 weights in another layout.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight = layer.weight
    if weight.dtype == torch.int8:
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    return dequantize_4bit(weight.data, weight.quant_state).float()
