"""Checkpoints of a run: complete or absent; a full disk never destroys the last one."""

import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.trainer.distributed import is_sharded
from eval.core.errors import UserError
from eval.engines import silenced

Curve = list[tuple[int, float]]  # step, mean loss per token since the last point, in nats
WEIGHTS = "model.safetensors"  # as accelerate names them
NORMS = "norms.json"  # of the gradients of the steps after the last point of the curve


class Checkpoints:
    """The latest state of a run with its loss curve. Frozen weights are left out."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.sharded = is_sharded(accelerator)
        if not self.sharded:  # FSDP and DeepSpeed write their shards themselves
            accelerator.register_save_state_pre_hook(_leave_out_frozen)
            accelerator.register_load_state_pre_hook(_load_trained)

    def latest(self) -> Path | None:
        complete = [p for p in self.folder.glob("step-*") if (p / "curve.json").is_file()]
        return max(complete, key=lambda p: int(p.name.split("-")[1]), default=None)

    def load(self) -> tuple[int, Curve, list[float]]:
        """The step to continue from, the curve so far and the gradient norms since its last point.

        Without a checkpoint 0, and nothing of both.

        Raises:
            UserError: the checkpoint is of another number of processes or another way to distribute them.
        """
        path = self.latest()
        if path is None:
            return 0, [], []
        saved, running = len(list(path.glob("random_states_*.pkl"))), self.accelerator.num_processes
        if saved != running or not (self.sharded or (path / WEIGHTS).is_file()):
            fix = "launch the run as before, or delete that folder"
            problem = f"written by {saved} processes, this launch has {running}"
            if saved == running:
                problem = "written under another way of distributing the model"
            raise UserError(f"checkpoint {path}", problem, fix)
        self.accelerator.load_state(str(path))
        step, curve = int(path.name.split("-")[1]), json.loads((path / "curve.json").read_text())
        norms = path / NORMS
        kept = json.loads(norms.read_text()) if norms.is_file() else []  # older versions kept none
        return step, [tuple(point) for point in curve], kept

    def save(self, step: int, curve: Curve, norms: list[float]) -> None:
        """Writes into a temporary folder, then renames it; only then the previous checkpoint is deleted.

        Raises:
            UserError: it cannot be written (full disk, no permission); the previous checkpoint is intact.
        """
        try:
            self._save(step, curve, norms)
        except (
            OSError,
            RuntimeError,
            SafetensorError,
        ) as error:  # torch raises RuntimeError when the disk is full
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)
            previous = self.latest()
            state = f"{previous.name} is intact" if previous else "there is no earlier one"
            fix = f"{state}; free disk space or fix the folder, then run the same command to continue"
            problem = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {self.folder / f'step-{step}'}", problem, fix) from error

    def _save(self, step: int, curve: Curve, norms: list[float]) -> None:
        temporary, final = self.folder / ".saving", self.folder / f"step-{step}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        with silenced(
            "accelerate"
        ):  # it warns of tied weights; `load_state` ties them again, which a test checks
            self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (temporary / NORMS).write_text(json.dumps(norms))
            (temporary / "curve.json").write_text(json.dumps(curve))
            previous = self.latest()
            os.rename(temporary, final)
            if previous is not None and previous != final:
                shutil.rmtree(previous)
        self.accelerator.wait_for_everyone()


def _frozen(model: nn.Module) -> list[str]:
    """Names of the weights that are not trained; a tied weight has several names."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """Drops frozen weights, which a restart loads anyway, so that a checkpoint of adapters is small."""
    for model, state in zip(models, weights, strict=True):
        frozen = _frozen(model)
        prefixes = tuple(f"{name}." for name in frozen)  # scales of quantized weights
        for name in [n for n in state if n in set(frozen) or n.startswith(prefixes)]:
            del state[name]


def _load_trained(models: list[nn.Module], folder: str) -> None:
    """Loads a model with frozen weights in place of accelerate: the checkpoint does not contain those."""
    if not models or not _frozen(models[0]):
        return
    model = models.pop()
    assert not models, "one module at a time"
    state = load_file(Path(folder) / WEIGHTS)
    assert state.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(state, strict=False)
