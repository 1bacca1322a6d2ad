"""Sharded models under FSDP 2 and ZeRO-3: what can be trained so, and how the weights are gathered."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from distill.models.layers import decoder_layers
from eval.core.errors import UserError, require_installed
from eval.core.sections import Train


def is_sharded(acc: Accelerator) -> bool:
    """True if no process holds the whole student."""
    return acc.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_deepspeed(requested: bool) -> None:
    """Refuses a launch with DeepSpeed where it is not installed."""
    if requested:
        fix = "run `pip install deepspeed`, or use configs/accelerate/fsdp.yaml, which needs no extra package"
        require_installed("deepspeed", "accelerate config", fix)


def prepare_sharding(acc: Accelerator, config: Train, model: PreTrainedModel) -> None:
    """Refuses what cannot be trained in shards, and configures what DeepSpeed does in place of the loop.

    Raises:
        UserError: Muon or moments of 8 bits, which need whole matrices; FSDP 1; a quantized student.
    """
    if not is_sharded(acc):
        return
    kind = acc.distributed_type.value
    if (name := config.optimizer.name) != "adamw":
        fix = "set train.optimizer.name (and base.train's) to adamw, with a suitable learning rate"
        raise UserError("optimizer.name", f"{name} needs whole matrices, which {kind} splits", fix)
    if acc.distributed_type == DistributedType.FSDP and not acc.is_fsdp2:
        raise UserError("accelerate config", "FSDP 1, only FSDP 2 is supported", "set fsdp_version: 2")
    if not all(p.is_floating_point() for p in model.parameters()):
        fix = "use lora, or plain data parallelism"
        raise UserError("student.tuning", f"qlora, and {kind} cannot shard quantized weights", fix)
    if acc.distributed_type == DistributedType.DEEPSPEED:
        settings = acc.state.deepspeed_plugin.deepspeed_config
        # The loop accumulates gradients itself; DeepSpeed clips and steps in the last backward pass.
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        settings |= {"gradient_clipping": config.clip, "zero_allow_untested_optimizer": True}


def gather_weights(acc: Accelerator, module: nn.Module, model: PreTrainedModel) -> None:
    """Copies the trained weights of all shards into the whole model of the first process."""
    state = acc.get_state_dict(module)
    if acc.is_main_process:
        weights = {
            name.removeprefix("model."): value for name, value in state.items() if name[:6] == "model."
        }
        missing, unknown = model.load_state_dict(weights, strict=False)
        tied = set(model.all_tied_weights_keys)
        assert not unknown, unknown
        assert set(missing) <= tied, missing


def gradient_norm(acc: Accelerator, norm: Any) -> float:
    """The gradient norm as a number; under FSDP 2 it arrives as a sharded tensor."""
    return float(norm.full_tensor() if acc.is_fsdp2 else norm)


def shard_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """Shards the weights of every decoder layer over the processes, in place; embedding and head stay whole.

    All processes must then call the model equally often: each call gathers a layer, uses it and frees it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    for layer in decoder_layers(model)[2]:
        fully_shard(layer, mesh=mesh)
    return model
