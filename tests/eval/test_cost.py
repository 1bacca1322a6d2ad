"""Cost: fresh processes in rounds, through the command line; what cannot be measured is reported."""

import json
import shutil
from argparse import Namespace
from itertools import pairwise
from statistics import mean, median

import pytest
import torch

from eval.core.artifacts import file_sha256, read_manifest
from eval.core.budget import Target
from eval.core.errors import UserError
from eval.core.records import TRAINING, read_costs, write_record
from eval.core.study import load_study
from eval.cost.__main__ import main
from eval.cost.estimates import estimate_quantity, list_quantities
from eval.cost.plan import (
    RANDOM,
    are_measured,
    choose_variants,
    draw_prompts,
    find_variants,
    plan_from_folders,
    plan_from_run,
)
from eval.cost.rounds import make_order, measure_group, start_worker
from eval.cost.worker import peak_memory, serve_request
from eval.engines import load_engine, load_tokenizer
from tests.eval.run_builder import COST, facts, fake_run, put, torch_model
from tests.helpers import run


@pytest.fixture
def prepared(tmp_path, openvino_folder):
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


def test_the_command_measures_in_rounds_and_only_once(prepared, monkeypatch, capsys, tmp_path):
    study, folder = prepared
    shutil.rmtree(folder / "base")
    sizes = ["--cost.batch_sizes", "[1, 3]"]
    written = tmp_path / "cost.json"
    done = run("-m", "eval.cost", "--study", study, *sizes, "--json", written)
    assert done.returncode == 0, done.stderr
    assert "left" in done.stderr
    assert "J/token" in done.stdout
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
            assert process.device_memory_bytes is None
            check_energy(process.energy, COST["requests"] * COST["new_tokens"])
            check_batch(process)
        files = [p for p in (folder / name).iterdir() if p.name != "manifest.json"]
        assert record.disk_bytes == sum(p.stat().st_size for p in files)
        assert record.provenance.artifact == read_manifest(folder / name).hash
    assert plain.provenance.time == int8.provenance.time
    stored = [json.loads(path.read_text()) for path in (folder / "records/cost/cpu").rglob("*.json")]
    first = json.loads(written.read_text())
    assert sorted(first, key=str) == sorted(stored, key=str)

    assert plain.prompts == int8.prompts == TRAINING
    monkeypatch.setattr("sys.argv", ["eval.cost", "--study", str(study), *sizes, "--json", str(written)])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out == "2 variants were measured before on cpu\n"
    assert json.loads(written.read_text()) == first, "with what was measured before"
    check_what_counts_as_done(load_study(study, sizes), folder, int8)
    check_numbers(plain)


def check_energy(energy, tokens):
    """A number with its meter, or none with the reason."""
    assert energy.tokens == tokens
    assert (energy.joules is None) == energy.meter.startswith("no meter: ")


def check_batch(process):
    """As many batches as requests, each as long; a step makes a token for every prompt."""
    (batched,) = process.batches
    assert batched.batch_size == 3
    assert len(batched.prefill_ms) == COST["requests"]
    assert len(batched.decode_ms) == COST["requests"] * (COST["new_tokens"] - 1)
    assert batched.peak_memory_bytes >= process.peak_memory_bytes
    check_energy(batched.energy, 3 * COST["requests"] * COST["new_tokens"])


def check_numbers(record):
    """Every batch size has its latency and tokens per second, from the times that were taken."""
    quantities = {name: estimate_quantity([record], name, alpha=0.05) for name in list_quantities([record])}
    per_second = []
    for process in record.processes:
        (batched,) = process.batches
        seconds = sum(batched.prefill_ms + batched.decode_ms) / 1e3
        per_second.append(3 * COST["requests"] * COST["new_tokens"] / seconds)
    assert quantities["tokens_per_s_batch3"].value == pytest.approx(mean(per_second))
    assert (quantities["tokens_per_s_batch3"].unit, quantities["load_time"].unit) == ("tokens/s", "s")
    times = [ms for process in record.processes for ms in process.batches[0].decode_ms]
    assert quantities["decode_p50_batch3"].value == pytest.approx(median(times))
    assert quantities["decode_p95_batch3"].value is None, "needs 59"
    assert "energy" not in quantities or quantities["energy"].value > 0


def check_what_counts_as_done(study, folder, int8):
    """Other rounds, other bytes or other settings: measured again."""
    wanted = find_variants(study)
    assert are_measured(read_costs(study.folder), study, "cpu", wanted)
    assert not are_measured(read_costs(study.folder), study, "gpu", wanted)
    for update in ({"requests": 4}, {"batch_sizes": [1]}, {"threads": 2}, {"warmup": 2}):
        changed = study.model_copy(update={"cost": study.cost.model_copy(update=update)})
        assert not are_measured(read_costs(changed.folder), changed, "cpu", wanted)
    for update in ({"time": "2020-01-01T00:00:00+00:00"}, {"artifact": "0" * 64}):
        source = int8.provenance.model_copy(update=update)
        write_record(folder, int8.model_copy(update={"provenance": source}))
        assert not are_measured(read_costs(study.folder), study, "cpu", wanted)
        assert are_measured(read_costs(study.folder), study, "cpu", wanted[:1])


def test_recipes_and_devices_choose_the_variants(prepared, capsys):
    study, folder = prepared
    put(folder, "variants/wanda50/S1/s0", torch_model(), **facts("S1", "wanda50"))
    put(folder, "variants/old/S1/s0", torch_model(), **facts("S1", "old"))  # the study names it no longer
    every = find_variants(load_study(study))
    assert [v.name for v in every] == ["plain", "int8", "wanda50", "fallback"]
    cpu, cuda = Target(device="cpu"), Target(device="cuda")
    assert choose_variants(every, None, cpu) == every
    assert [v.name for v in choose_variants(every, ["wanda50"], cpu)] == ["plain", "wanda50", "fallback"]
    assert [v.name for v in choose_variants(every, None, cuda)] == ["plain", "wanda50", "fallback"]
    assert "int8 is not measured: engine openvino does not run on cuda" in capsys.readouterr().out
    with pytest.raises(UserError, match="--recipe: 'int9'; did you mean 'int8'"):
        choose_variants(every, ["int9"], cpu)
    shutil.rmtree(folder / "students/S1/s0")
    with pytest.raises(UserError, match="students/S1/s0: not trained yet"):
        find_variants(load_study(study))


def test_prompts_are_fixed_tokens_of_training_documents(prepared):
    study, folder = prepared
    model = folder / "students/S1/s0"
    given = Namespace(study=study, target="cpu", recipe=None)
    prompts = plan_from_run(given, []).prompts
    assert prompts == plan_from_run(given, []).prompts
    assert {len(prompt) for prompt in prompts} == {COST["prompt_tokens"]}
    assert len(prompts) == COST["warmup"] + COST["requests"]
    assert len(set(map(tuple, prompts))) == len(prompts)
    words = load_tokenizer(model)
    assert words.decode(prompts[0][1:]) in (folder / "data/train.jsonl").read_text()
    random = draw_prompts(load_study(study).cost, model)
    assert [len(prompt) for prompt in random] == [len(prompt) for prompt in prompts]
    assert random == draw_prompts(load_study(study).cost, model)
    assert 0 <= min(map(min, random)) < max(map(max, random)) < len(words)


def test_folders_alone_can_be_measured_with_text_or_random_tokens(prepared, tmp_path):
    study, folder = prepared
    text = tmp_path / "text.txt"
    text.write_text("def return self None import for in if else class " * 9)
    facts = {"study": None, "target": "here", "device": "cpu", "record": "x.jsonl"}
    given = Namespace(variant=[str(folder / "students/S1/s0")], text=None, **facts)
    plan = plan_from_folders(given, ["--cost.prompt_tokens", "7", "--cost.requests", "5"])
    assert (plan.source, plan.config, plan.study) == (RANDOM, "", None)
    assert ({len(prompt) for prompt in plan.prompts}, len(plan.prompts)) == ({7}, plan.cost.warmup + 5)
    given.text, given.study = str(text), str(study)
    plan = plan_from_folders(given, [])
    assert plan.source == f"text of sha256 {file_sha256(text)}"
    assert plan.config == load_study(study).hash()
    assert load_tokenizer(folder / "students/S1/s0").decode(plan.prompts[0][1:]) in text.read_text()
    text.write_text("")
    with pytest.raises(UserError, match=r"--text .*: no tokens; give a text that is not empty"):
        plan_from_folders(given, [])
    given.variant *= 2
    with pytest.raises(UserError, match="the same model twice"):
        plan_from_folders(given, [])
    given.variant, given.study = ["nowhere"], None
    with pytest.raises(UserError, match=r"artifact nowhere: no manifest\.json"):
        plan_from_folders(given, [])
    with pytest.raises(UserError, match="unknown key cots: 'cots'; did you mean 'cost'"):
        plan_from_folders(given, ["--cots.requests", "5"])


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_request_is_a_prefill_and_the_steps_after_it(name, checkpoint, openvino_folder):
    """It walks the greedy path: the same tokens as `generate`."""
    engine = load_engine(name, checkpoint if name == "torch" else openvino_folder)
    seen = []
    decode = engine.decode

    def noted(tokens, state):
        seen.append(tokens)
        return decode(tokens, state)

    engine.decode = noted
    prompts = torch.stack([torch.arange(5, 17), torch.arange(40, 16, -2)])
    stamps = serve_request(engine, prompts, new_tokens=6, synchronize=lambda: None)
    assert len(stamps) == 7
    assert all(a < b for a, b in pairwise(stamps))
    model = load_engine("torch", checkpoint).model
    generated = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    assert torch.stack(seen, 1).tolist() == generated[:, prompts.shape[1] :].tolist()


def test_peak_memory_is_that_of_the_process_at_its_highest():
    script = (
        "from eval.cost.worker import peak_memory\n"
        "before = peak_memory('cpu'); block = b'x' * 2**28; del block\n"
        "print(peak_memory('cpu') - before >= 2**28 - 2**24)"
    )
    held = bytes(2**29)  # a parent's own peak must not be taken for its child's
    assert run("-c", script).stdout == "True\n"
    assert peak_memory("cpu") > len(held) / 2


def test_a_variant_that_cannot_be_loaded_is_reported(prepared):
    study, _ = prepared
    plan = plan_from_run(Namespace(study=study, target="cpu", recipe=["int8"]), [])
    broken = plan.variants[1]
    (broken.folder / "openvino_model.xml").unlink()
    with pytest.raises(UserError, match=r"no openvino_model\.xml; export the model"):
        measure_group([(broken, make_order(plan, broken))], lambda share: None)


def test_a_killed_process_is_reported(prepared):
    study, _ = prepared
    variant = find_variants(load_study(study))[1]
    with start_worker(variant, threads=1) as worker:
        worker.process.kill()
        with pytest.raises(UserError, match=r"measuring .*int8/S1/s0: the process ended with -9"):
            worker.read_answer()


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
def test_a_target_that_this_machine_lacks_is_refused(tmp_path, words, line):
    study, folder = fake_run(tmp_path)
    done = run("-m", "eval.cost", "--study", study, *words)
    assert (done.returncode, done.stderr) == (3, line)
    assert not (folder / "records").exists()
