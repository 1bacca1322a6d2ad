"""Cost: fresh processes in rounds, through the command line; what cannot be measured is told."""

import shutil

import pytest
import torch

from eval.artifacts import read_manifest
from eval.budget import Target
from eval.cost import chosen, measure_group, measured_before, prompts, started, variants
from eval.engines import load_engine, load_tokenizer
from eval.errors import UserError
from eval.probe import peak_memory, timed_request
from eval.records import read_costs, write_record
from eval.study import load_study
from tests.eval.fake_run import COST, facts, fake_run, put, torch_model
from tests.helpers import run


@pytest.fixture
def made(tmp_path, openvino_folder):
    """(study file, run folder) with the plain student and one OpenVINO variant of it."""
    study, folder = fake_run(tmp_path)
    put(
        folder,
        "variants/int8/S1/s0",
        lambda to: shutil.copytree(openvino_folder, to, dirs_exist_ok=True),
        **facts("S1", "int8", "openvino"),
    )
    put(folder, "variants/int8/S0/s0", torch_model(), **facts("S0", "int8", "openvino"))
    return study, folder


def test_the_command_measures_in_rounds_and_only_once(made):
    study, folder = made
    done = run("-m", "eval.cost", "--study", study)
    assert done.returncode == 0, done.stderr
    assert "left" in done.stderr
    plain, int8 = sorted(read_costs(folder), key=lambda r: r.engine, reverse=True)
    assert [(r.recipe, r.arm, r.engine) for r in (plain, int8)] == [
        ("plain", "S1", "torch"),
        ("int8", "S1", "openvino"),
    ]
    for record, name in ((plain, "students/S1/s0"), (int8, "variants/int8/S1/s0")):
        assert len(record.processes) == COST["processes"]
        for process in record.processes:
            assert len(process.prefill_ms) == COST["requests"]
            assert len(process.decode_ms) == COST["requests"] * (COST["new_tokens"] - 1)
            assert min(process.prefill_ms + process.decode_ms) > 0
            assert process.load_s > 0
            assert process.peak_memory_bytes > 2**26, "torch alone weighs more"
        files = [p for p in (folder / name).iterdir() if p.name != "manifest.json"]
        assert record.disk_bytes == sum(p.stat().st_size for p in files)
        assert record.provenance.artifact == read_manifest(folder / name).hash
    assert plain.provenance.time == int8.provenance.time

    again = run("-m", "eval.cost", "--study", study)
    assert (again.returncode, again.stdout) == (0, "2 variants were measured before on cpu\n")
    check_what_counts_as_done(load_study(study), folder, int8)


def check_what_counts_as_done(study, folder, int8):
    """Other rounds, other bytes or other settings: measured again."""
    wanted = variants(study)
    assert measured_before(study, "cpu", wanted)
    assert not measured_before(study, "gpu", wanted)
    changed = study.model_copy(update={"cost": study.cost.model_copy(update={"requests": 4})})
    assert not measured_before(changed, "cpu", wanted)
    for update in ({"time": "2020-01-01T00:00:00+00:00"}, {"artifact": "0" * 64}):
        source = int8.provenance.model_copy(update=update)
        write_record(folder, int8.model_copy(update={"provenance": source}))
        assert not measured_before(study, "cpu", wanted)
        assert measured_before(study, "cpu", wanted[:1])


def test_recipes_and_devices_choose_the_variants(made, capsys):
    study, folder = made
    put(folder, "variants/wanda50/S1/s0", torch_model(), **facts("S1", "wanda50"))
    put(folder, "variants/old/S1/s0", torch_model(), **facts("S1", "old"))  # the study names it no longer
    every = variants(load_study(study))
    assert [v.recipe for v in every] == ["plain", "int8", "wanda50"]
    cpu, cuda = Target(device="cpu"), Target(device="cuda")
    assert [v.recipe for v in chosen(every, None, cpu)] == ["plain", "int8", "wanda50"]
    assert [v.recipe for v in chosen(every, ["wanda50"], cpu)] == ["plain", "wanda50"]
    assert [v.recipe for v in chosen(every, None, cuda)] == ["plain", "wanda50"]
    assert "int8 is not measured: engine openvino does not run on cuda" in capsys.readouterr().out
    with pytest.raises(UserError, match="--recipe: 'int9'; did you mean 'int8'"):
        chosen(every, ["int9"], cpu)
    shutil.rmtree(folder / "students/S1/s0")
    with pytest.raises(UserError, match="students/S1/s0: not made yet"):
        variants(load_study(study))


def test_prompts_are_fixed_tokens_of_training_documents(made):
    study, folder = made
    model = folder / "students/S1/s0"
    found = prompts(load_study(study), model)
    assert found == prompts(load_study(study), model)
    assert {len(prompt) for prompt in found} == {COST["prompt_tokens"]}
    assert len(found) == COST["warmup"] + COST["requests"]
    assert len(set(map(tuple, found))) == len(found)
    words = load_tokenizer(model)
    assert words.decode(found[0][1:]) in (folder / "data/train.jsonl").read_text()


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_request_is_a_prefill_and_the_steps_after_it(name, checkpoint, openvino_folder):
    """It walks the greedy path: the same tokens as `generate`."""
    engine = load_engine(name, checkpoint if name == "torch" else openvino_folder)
    seen = []
    decode = engine.decode

    def noted(token, state):
        seen.append(token)
        return decode(token, state)

    engine.decode = noted
    prompt = list(range(5, 17))
    times = timed_request(engine, prompt, new_tokens=6, synchronize=lambda: None)
    assert len(times) == 6
    model = load_engine("torch", checkpoint).model
    made = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    assert seen == made[0, len(prompt) :].tolist()


def test_peak_memory_is_that_of_the_process_at_its_highest():
    script = (
        "from eval.probe import peak_memory\n"
        "before = peak_memory('cpu'); block = b'x' * 2**28; del block\n"
        "print(peak_memory('cpu') - before >= 2**28 - 2**24)"
    )
    held = bytes(2**29)  # a parent's own peak must not be taken for its child's
    assert run("-c", script).stdout == "True\n"
    assert peak_memory("cpu") > len(held) / 2


def test_a_variant_that_cannot_be_loaded_is_told(made):
    study, _ = made
    broken = variants(load_study(study))[1]
    (broken.folder / "openvino_model.xml").unlink()
    with pytest.raises(UserError, match=r"no openvino_model\.xml; export it"):
        measure_group([broken], load_study(study).cost, "cpu", [[1, 2, 3]], lambda share: None)


def test_a_killed_process_is_told(made):
    study, _ = made
    variant = variants(load_study(study))[1]
    with started(variant, threads=1) as probe:
        probe.process.kill()
        with pytest.raises(UserError, match=r"measuring .*int8/S1/s0: the process ended with -9"):
            probe.hear()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--target", "gpux"], "error: --target: 'gpux'; did you mean 'gpu'? accepted: cpu, gpu\n"),
        pytest.param(
            ["--target", "gpu"],
            "error: target 'gpu': no CUDA device here; "
            "run this command on a machine that has one, on a copy of the run folder\n",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_a_target_that_is_not_there_is_told(tmp_path, words, line):
    study, folder = fake_run(tmp_path)
    done = run("-m", "eval.cost", "--study", study, *words)
    assert (done.returncode, done.stderr) == (3, line)
    assert not (folder / "records").exists()
