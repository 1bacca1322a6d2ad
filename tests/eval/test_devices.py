"""Devices of scoring: what `--device` finds, how jobs are dealt out to GPUs, what a record notes."""

import pickle

import pytest
import torch

from eval.core.errors import UserError
from eval.core.jobs import Job
from eval.core.records import read_scores
from eval.core.study import load_study
from eval.score.devices import deal_out, find_devices, settle_device
from eval.score.scoring import score, score_folder
from tests.eval.run_builder import fake_run
from tests.helpers import run, text

NO_GPU = not torch.cuda.is_available()


def job(device: str = "cpu", report=None) -> str:
    return device


@pytest.mark.skipif(not NO_GPU, reason="has a CUDA device")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused_in_a_line(tmp_path):
    assert find_devices("auto") == find_devices("cpu") == ["cpu"]
    with pytest.raises(UserError, match="--device cuda: this machine has no CUDA device; give --device cpu"):
        find_devices("cuda")
    study, _ = fake_run(tmp_path)
    done = run("-m", "eval.score", "--study", study, "--device", "cuda")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: --device cuda: this machine has no CUDA device")


def test_every_gpu_takes_one_job_at_a_time():
    jobs = [Job(f"job {i}", job) for i in range(5)]
    assert deal_out(jobs, ["cpu"], workers=3) == (jobs, 3)
    dealt, side_by_side = deal_out(jobs, ["cuda:0", "cuda:1"], workers=9)
    assert side_by_side == 2
    assert [one.after for one in dealt] == [(), (), ("job 0",), ("job 1",), ("job 2",)]
    ran = [pickle.loads(pickle.dumps(one)).run() for one in dealt]
    assert ran == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]


def test_an_engine_without_cuda_runs_on_the_cpu_and_says_so(capsys):
    assert settle_device(["torch"], "cuda:1", "int8/S1-s0") == "cuda:1"
    assert capsys.readouterr().out == ""
    pytest.importorskip("openvino")
    assert settle_device(["torch", "openvino"], "cuda:1", "int8/S1-s0") == "cpu"
    line = "int8/S1-s0 runs on the cpu: engine openvino does not run on cuda\n"
    assert capsys.readouterr().out == line


def test_a_record_notes_its_device(tmp_path):
    study, folder = fake_run(tmp_path)
    score_folder(folder, load_study(study), folder / "students/S1/s0", device="cpu")
    (record,) = read_scores(folder)
    assert record.provenance.machine.device == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
def test_a_gpu_gives_the_bits_of_the_cpu_and_its_record_names_it(tmp_path):
    study, folder = fake_run(tmp_path)
    place, texts = folder / "students/S1/s0", [text("code", i) for i in range(3)]
    cpu, gpu = (score(place, texts, 64, device=device) for device in ("cpu", "cuda"))
    assert gpu.tokens == cpu.tokens
    assert gpu.bits == pytest.approx(cpu.bits, rel=1e-4)
    score_folder(folder, load_study(study), place, device="cuda:0")
    (record,) = read_scores(folder)
    assert record.provenance.machine.device == torch.cuda.get_device_name(0)
