"""Models in shards, under FSDP 2 and ZeRO-3: what may be trained so, and how it becomes whole again."""

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedModel

from distill.models.layers import decoder_layers
from eval.core.errors import UserError
from eval.core.sections import Train


def is_sharded(acc: Accelerator) -> bool:
    """True if no process holds the whole student."""
    return acc.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_installed(wanted: bool) -> None:
    """Refuses DeepSpeed where it is not installed."""
    if wanted and find_spec("deepspeed") is None:
        fix = "`pip install deepspeed`, or take configs/accelerate/fsdp.yaml, which needs nothing more"
        raise UserError("accelerate config", "DeepSpeed is asked for and not installed", fix)


def prepare_sharding(acc: Accelerator, config: Train, model: PreTrainedModel) -> None:
    """Refuses what cannot be trained in shards, and tells DeepSpeed what it does in place of the loop.

    Raises:
        UserError: Muon, which needs whole matrices; FSDP 1; a quantized student.
    """
    if not is_sharded(acc):
        return
    kind = acc.distributed_type.value
    if config.optimizer.name == "muon":
        fix = "set train.optimizer.name (and base.train's) to adamw, with a learning rate of its own"
        raise UserError("optimizer.name", f"muon, and {kind} splits the matrices that it needs whole", fix)
    if acc.distributed_type == DistributedType.FSDP and not acc.is_fsdp2:
        raise UserError("accelerate config", "FSDP 1", "set fsdp_version: 2")
    if not all(p.is_floating_point() for p in model.parameters()):
        raise UserError("student.tuning", f"qlora under {kind}", "take lora, or plain data parallelism")
    if acc.distributed_type == DistributedType.DEEPSPEED:
        settings = acc.state.deepspeed_plugin.deepspeed_config
        # The loop makes batches and adds them up itself; DeepSpeed clips and steps in the last backward pass.
        settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        settings |= {"gradient_clipping": config.clip, "zero_allow_untested_optimizer": True}


def gather_weights(acc: Accelerator, learner: nn.Module, model: PreTrainedModel) -> None:
    """Puts the trained weights of all shards into the first process's own whole copy of the model."""
    state = acc.get_state_dict(learner)
    if acc.is_main_process:
        own = {name.removeprefix("model."): value for name, value in state.items() if name[:6] == "model."}
        missing, unknown = model.load_state_dict(own, strict=False)
        tied = set(model.all_tied_weights_keys)
        assert not unknown, unknown
        assert set(missing) <= tied, missing


def gradient_norm(acc: Accelerator, norm: Any) -> float:
    """The norm of a gradient as a number; of one in shards it is a tensor in shards itself."""
    return float(norm.full_tensor() if acc.is_fsdp2 else norm)


def shard_teacher(model: PreTrainedModel) -> PreTrainedModel:
    """Splits the weights of every decoder layer over the processes, in place; the two ends stay whole.

    All processes must then call the model equally often: each call gathers a layer, uses it, drops it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    for layer in decoder_layers(model)[2]:
        fully_shard(layer, mesh=mesh)
    return model
