"""Several processes: what a launcher asks for, and students and teachers in shards."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from distill.method import plain_output
from distill.train import check_processes
from distill.trainer.distributed import check_deepspeed, prepare_sharding
from distill.trainer.loop import accelerator, train
from eval.core.errors import UserError
from eval.core.sections import Optimizer, Train
from tests.distill.test_loop import rows
from tests.helpers import ROOT, run, tiny_model

CONFIG = Train(
    rows=8, accumulate=2, steps=5, checkpoint_every=2, evaluate_every=2, optimizer=Optimizer(lr=0.01)
)


def test_one_cpu_process_of_several_is_refused_with_the_command_that_starts_all(tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    done = run(*launch, "distill/train.py", "--config", "configs/studies/tiny.yaml", "--runs", tmp_path)
    assert (
        "started only one of several processes; use `torchrun --nproc_per_node N distill/train.py"
        in done.stderr
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        *[("", False), ("--num_processes 1", False), ("--cpu", False), ("--num_processes 2", True)],
        *[("--cpu --num_processes 2", True), ("--num_processes 2 --num_machines 1", True)],
    ],
)
def test_what_accelerate_sets_tells_one_process_from_one_of_several(monkeypatch, options, refused):
    """The environment that accelerate itself makes of its options where there is no GPU."""
    args = launch_command_parser().parse_args([*options.split(), "distill/train.py"])
    args, *_ = _validate_launch_command(args)
    for name, value in prepare_simple_launcher_cmd_env(args)[1].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="one of several") if refused else nullcontext():
        check_processes()


def test_what_shards_cannot_do_is_refused(monkeypatch):
    acc = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(
        UserError, match=r"optimizer\.name: muon needs whole matrices, which FSDP splits; .* to adamw"
    ):
        prepare_sharding(acc, Train(optimizer=Optimizer(name="muon")), tiny_model())
    monkeypatch.setattr("eval.core.errors.find_spec", lambda name: None)
    check_deepspeed(False)
    with pytest.raises(
        UserError, match=r"needs deepspeed, which is not installed; run `pip install deepspeed`"
    ):
        check_deepspeed(True)


def of_model(teacher):
    return lambda batch: plain_output(teacher, batch=batch).select(F.pad(batch.mask, (0, 1)))


def trained(model, teacher, scratch, **how):
    """The run that both sides make, and what it logs."""
    logged = {}

    def log(step, values):
        logged.setdefault(step, {}).update({k: v for k, v in values.items() if k != "tokens_per_second"})

    where = {"pad": 0, "seed": 0, "scratch": scratch, "log": log if accelerator().is_main_process else None}
    curve = train(model, rows(8), CONFIG, teacher=of_model(teacher), evaluate=evaluate, **where, **how)
    return logged, curve


@torch.no_grad()
def evaluate(module):
    from eval.core.documents import collate

    return float(module(collate(rows(4), 0), None))


SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path[0] = sys.argv[1]
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from distill.trainer.loop import accelerator
from distill.trainer.distributed import shard_teacher
from tests.distill.test_scale import evaluate, trained
from tests.helpers import tiny_model

torch.set_num_threads(1)
acc = accelerator()
# accelerate 1.15 takes a config with FSDP for GPUs alone; below it, all of it works with gloo as well.
acc.state.fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
)
for state in (PartialState._shared_state, vars(acc.state)):
    state["distributed_type"] = DistributedType.FSDP

teacher = shard_teacher(tiny_model(seed=5, num_hidden_layers=3))
split = sum(isinstance(p, DTensor) for p in teacher.parameters())

def stop(step):
    if step.number == 3:
        raise KeyboardInterrupt

model, scratch = tiny_model(), Path(sys.argv[2])
try:
    trained(model, teacher, scratch, report=stop)
except KeyboardInterrupt:
    pass
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_model().parameters()))
logged, curve = trained(model, teacher, scratch)
if acc.is_main_process:
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    model.save_pretrained(Path(sys.argv[2]) / "out")
    print("RESULTS", json.dumps([acc.num_processes, acc.distributed_type, split, logged, curve]))
"""


@pytest.mark.slow
def test_shards_train_the_model_that_one_process_trains(tmp_path):
    """FSDP 2 on two gloo processes, the teacher in shards too, stopped and continued, against one process."""
    one = tiny_model()
    expected, whole = trained(one, tiny_model(seed=5, num_hidden_layers=3), tmp_path / "one")
    script = tmp_path / "sharded.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*torchrun, script, ROOT, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULTS"))
    processes, kind, split, logged, curve = json.loads(line.removeprefix("RESULTS"))
    assert (processes, kind) == (2, "FSDP")
    assert split == 3 * 9, "every weight of the teacher's layers"
    assert {int(step) for step in logged} == {3, 4, 5}, "it went on from the checkpoint of step 2"
    for step, values in logged.items():
        assert values == pytest.approx(expected[int(step)], rel=1e-4)
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in whole], rel=1e-4)
    two = type(one).from_pretrained(tmp_path / "two" / "out")
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)
