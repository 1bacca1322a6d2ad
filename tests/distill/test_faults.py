"""Full disks and folders that cannot be written: one line, the last good checkpoint whole, and on from there."""

import errno
import json
import os
import resource
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.models.export import export
from distill.trainer.checkpoint import Checkpoints
from distill.trainer.logging import check_trackers, make_tracker, open_trackers
from distill.trainer.loop import train
from eval.core.errors import UserError
from eval.core.sections import Train
from tests.distill.test_loop import row_teacher, rows
from tests.helpers import run as command
from tests.helpers import tiny_model, tiny_study, tiny_tokenizer

CONFIG = Train(rows=4, steps=7, checkpoint_every=2)


@contextmanager
def room_for(size):
    """Inside, the kernel refuses every byte of a file beyond `size`, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(model, folder, **how):
    return train(model, rows(), CONFIG, pad=0, seed=1, teacher=row_teacher, scratch=folder, **how)


def listed(folder):
    return sorted(p.name for p in folder.iterdir())


# What is written first, and what torch writes after it: its own error is a RuntimeError.
@pytest.mark.parametrize("size", [10_000, 600_000])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole(tmp_path, size):
    whole = tiny_model()
    curve = run(whole, tmp_path / "whole")

    def fill(step):
        if step.number == 3:
            limit.enter_context(room_for(size))

    with (
        ExitStack() as limit,
        pytest.raises(UserError, match=r"checkpoint .*step-4: .*step-2 is intact; free") as caught,
    ):
        run(tiny_model(), tmp_path / "parts", report=fill)
    assert "\n" not in str(caught.value)
    assert listed(tmp_path / "parts") == ["step-2"], "what was half written is gone"
    again = tiny_model(seed=9)
    assert run(again, tmp_path / "parts") == curve
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("place", ["save_state", "rename"])
def test_a_folder_that_becomes_read_only_is_reported(tmp_path, monkeypatch, place):
    """The error that the kernel gives then, at the first and at the last write of a checkpoint."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path))

    owner = {"save_state": Accelerator, "rename": os}[place]

    def freeze(step):
        if step.number == 3:
            monkeypatch.setattr(owner, place, refuse)

    with pytest.raises(UserError, match=r"step-4: .*Read-only file system.*step-2 is intact"):
        run(tiny_model(), tmp_path / "run", report=freeze)
    monkeypatch.undo()
    assert listed(tmp_path / "run") == ["step-2"]
    assert Checkpoints(tmp_path / "run", Accelerator(cpu=True)).latest().name == "step-2"


def test_an_export_without_disk_space_is_reported(tmp_path):
    with (
        room_for(10_000),
        pytest.raises(UserError, match=r"export to .*File too large|export to .*os error 27"),
    ):
        export(tiny_model(), tiny_tokenizer(), tmp_path / "out", "card", [])


@pytest.mark.slow
def test_a_full_disk_ends_a_command_with_one_line_and_no_partial_artifact(tmp_path):
    """Through the real command: the models of the study are larger than what the kernel lets it write."""
    path = tiny_study(tmp_path, seeds=[0], method={"name": "placebo"}, ce_arm=False, trackers=[])
    script = tmp_path / "small_disk.py"
    script.write_text(
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = command(script, "distill/train.py", "--config", path, "--base.train.checkpoint_every", "4")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert "checkpoint" in lines[0]
    run_folder = tmp_path / "runs" / "tiny"
    assert not list(run_folder.rglob("*.tmp"))
    assert not list(run_folder.rglob("*.safetensors"))
    assert (run_folder / "data" / "manifest.json").is_file()


def test_trackers_are_asked_for_by_name():
    check_trackers(["tensorboard"])
    check_trackers([])
    with pytest.raises(UserError, match=r"trackers: 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    missing = next(name for name in ("swanlab", "aim", "wandb") if find_spec(name) is None)
    with pytest.raises(
        UserError, match=rf"trackers: {missing} is not installed; run `pip install {missing}`"
    ):
        check_trackers([missing])


def test_curves_are_written_for_tensorboard_and_a_new_run_starts_them_anew(tmp_path):
    acc = Accelerator(cpu=True)
    for fresh, steps in ((True, (1, 2)), (False, (3,)), (True, (1,))):
        with open_trackers(acc, ["tensorboard"], tmp_path, "S1-s0", fresh) as log:
            for step in steps:
                log(step, {"loss": 1.0 / step, "validation_bits_per_byte": 2.0})
        if not fresh:
            assert len(listed(tmp_path / "S1-s0")) == 2
    events = EventAccumulator(str(tmp_path / "S1-s0"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0)]
    with open_trackers(acc, [], tmp_path, "S0-s0", True) as log:
        assert log is None
    assert listed(tmp_path) == ["S1-s0"]


PROJECT = {"project": "study", "config": {"seeds": [0, 1], "train.optimizer.lr": 0.5, "title": None}}


@pytest.mark.parametrize("name", list(LOGGER_TYPE_TO_CLASS))
def test_the_study_is_the_project_and_arm_and_seed_the_run_of_every_tracker(tmp_path, name):
    """As accelerate's own classes hand it on; none of them is imported before it starts."""
    tracker = make_tracker(name, "study", "S1-s0", tmp_path)
    given = vars(tracker)
    named = json.dumps({key: value for key, value in given.items() if key != "tags"}, default=str)
    if name == "comet_ml":
        assert given["run_name"] == "study"
        return  # its run is named when it has started
    assert "S1-s0" in named
    assert name in ("tensorboard", "dvclive") or '"study"' in named, (
        "these have a folder for each run, and no projects"
    )


def test_tensorboard_shows_the_settings_of_the_study_beside_the_curves(tmp_path):
    with open_trackers(Accelerator(cpu=True), ["tensorboard"], tmp_path, "S1-s0", True, **PROJECT) as log:
        log(1, {"loss": 1.0})
    events = EventAccumulator(str(tmp_path / "S1-s0"))
    events.Reload()
    text = events.Tensors("study/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| train.optimizer.lr | 0.5 |" in text
    assert "| seeds | [0, 1] |" in text


def test_wandb_gets_a_project_a_run_and_the_config(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for key, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    with open_trackers(Accelerator(cpu=True), ["wandb"], tmp_path, "S1-s0", True, **PROJECT) as log:
        assert (wandb.run.project, wandb.run.name) == ("study", "S1-s0")
        assert dict(wandb.config) == {"seeds": "[0, 1]", "train.optimizer.lr": 0.5, "title": "null"}
        log(1, {"loss": 1.0})
    assert list(tmp_path.rglob("*.wandb"))


@pytest.mark.filterwarnings("ignore")  # of what it stands on
def test_mlflow_gets_an_experiment_a_run_and_the_parameters(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with open_trackers(Accelerator(cpu=True), ["mlflow"], tmp_path, "S1-s0", True, **PROJECT) as log:
        log(1, {"loss": 1.0})
    (run,) = mlflow.search_runs(experiment_names=["study"], output_format="list")
    assert run.info.run_name == "S1-s0"
    assert run.data.params["train.optimizer.lr"] == "0.5"
    assert run.data.metrics == {"loss": 1.0}
