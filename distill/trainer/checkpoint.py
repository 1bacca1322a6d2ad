"""Checkpoints of a run: whole or absent, and never lost to a disk that is full."""

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eval.core.errors import UserError

Curve = list[tuple[int, float]]  # step, mean loss per token in nats
WEIGHTS = "model.safetensors"  # as accelerate names them


class Checkpoints:
    """The last state of a run and the loss curve up to it. Weights that are not trained are left out."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if not self.sharded:  # those write their shards themselves
            accelerator.register_save_state_pre_hook(_leave_out_frozen)
            accelerator.register_load_state_pre_hook(_load_trained)

    def latest(self) -> Path | None:
        found = [p for p in self.folder.glob("step-*") if (p / "curve.json").is_file()]
        return max(found, key=lambda p: int(p.name.split("-")[1]), default=None)

    def load(self) -> tuple[int, Curve]:
        """The step to go on from and the curve so far; 0 and nothing when there is no checkpoint."""
        path = self.latest()
        if path is None:
            return 0, []
        found, wanted = len(list(path.glob("random_states_*.pkl"))), self.accelerator.num_processes
        if found != wanted or not (self.sharded or (path / WEIGHTS).is_file()):
            fix = "launch it as before, or delete that folder"
            raise UserError(f"checkpoint {path}", f"of {found} processes, here are {wanted}", fix)
        self.accelerator.load_state(str(path))
        return int(path.name.split("-")[1]), [tuple(p) for p in json.loads((path / "curve.json").read_text())]

    def save(self, step: int, curve: Curve) -> None:
        """Writes aside, then renames; the one before goes only when this one is whole.

        Raises:
            UserError: the disk does not take it; what was half written is gone, the one before is whole.
        """
        try:
            self._save(step, curve)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch has RuntimeError for a full disk
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)
            before = self.latest()
            kept = f"{before.name} is whole" if before else "there is none before it"
            fix = f"{kept}; free some room, or fix the folder, and run again: it goes on from there"
            found = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {self.folder / f'step-{step}'}", found, fix) from error

    def _save(self, step: int, curve: Curve) -> None:
        aside, place = self.folder / ".saving", self.folder / f"step-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (aside / "curve.json").write_text(json.dumps(curve))
            before = self.latest()
            os.rename(aside, place)
            if before is not None and before != place:
                shutil.rmtree(before)
        self.accelerator.wait_for_everyone()


def _frozen(model: nn.Module) -> list[str]:
    """Names of the weights that are not trained; a tied one has several."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """They are those that the run starts with, so that a checkpoint of adapters is as small as they are."""
    for model, state in zip(models, weights, strict=True):
        frozen = _frozen(model)
        parts = tuple(f"{name}." for name in frozen)  # scales of quantized ones
        for name in [n for n in state if n in set(frozen) or n.startswith(parts)]:
            del state[name]


def _load_trained(models: list[nn.Module], folder: str) -> None:
    """Takes over the loading of a model with frozen weights: the checkpoint does not have them."""
    if not models or not _frozen(models[0]):
        return
    model = models.pop()
    assert not models, "one learner at a time"
    state = load_file(Path(folder) / WEIGHTS)
    assert state.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(state, strict=False)
