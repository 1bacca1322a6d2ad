"""Figures that no measurement gives, and copies of processes: each is refused in one line with its file's name."""

import json
from argparse import ArgumentTypeError
from importlib import import_module

import pytest

from eval.core.artifacts import read_manifest
from eval.core.budget import load_budget
from eval.core.commands import count
from eval.core.errors import UserError
from eval.core.records import Agreement, Arrivals, LoadRecord, Rerun, Server, write_record
from eval.core.study import load_study
from eval.cost.merge import read_lines
from eval.gate.decision import judge
from eval.gate.power import list_tests, read_pilot
from eval.stats.queueing import poisson
from tests.eval.run_builder import Run, copy_run, edit

importer = import_module("eval.score.import")
COST = "records/cost/cpu/int8/S1-s0.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("made")).make().folder


@pytest.fixture
def run(made, tmp_path):
    return copy_run(made, tmp_path)


def refused(run: Run) -> str:
    with pytest.raises(UserError) as error:
        judge(run.path)
    return str(error.value)


def in_documents(**changes):
    def change(record):
        for name, value in changes.items():
            record["documents"][name][0] = value

    return change


def in_processes(**changes):
    return lambda record: [one.update(changes) for one in record["processes"]]


SCORE = "records/score/plain/S1-s1.json"
BAD = {
    "bits": (SCORE, in_documents(bits=1e308), "has more than 1e+12 bits"),
    "bytes": (SCORE, in_documents(bytes=10**18), "bytes"),
    "long bytes": (SCORE, in_documents(bytes=10**400), "bytes"),
    "long tokens": (SCORE, in_documents(tokens=10**400), "tokens"),
    "memory": (COST, in_processes(peak_memory_bytes=10**400), "S1-s0.json: "),
    "long times": (COST, in_processes(decode_ms=[1e308] * 90), "expected at most 1000000000000"),
    "short times": (COST, in_processes(decode_ms=[1e-308] * 90), "expected at least 1e-09"),
}


@pytest.mark.parametrize(("name", "change", "message"), BAD.values(), ids=BAD)
def test_figures_out_of_all_bounds_are_refused_by_name(run, name, change, message):
    edit(run.path / name, change)
    said = refused(run)
    assert name in said
    assert message in said


@pytest.mark.parametrize("order", [list, lambda times: times[::-1]], ids=["same", "in another order"])
def test_copies_of_a_process_are_refused(run, order):
    def copied(record):
        first = record["processes"][0]
        record["processes"] = [{**one, "decode_ms": order(first["decode_ms"])} for one in record["processes"]]

    edit(run.path / COST, copied)
    assert "process 2 has the decode_ms of process 1 of S1-s0.json" in refused(run)


def test_copies_in_the_record_of_another_seed_are_refused(run):
    record = json.loads((run.path / COST).read_text())
    artifact = read_manifest(run.path / "variants/int8/S1/s1").hash
    record |= {"seed": 1, "provenance": record["provenance"] | {"artifact": artifact}}
    (run.path / COST).with_name("S1-s1.json").write_text(json.dumps(record))
    assert "S1-s1.json: process 1 has the times of process 1 of S1-s0.json" in refused(run)


def test_sizes_and_a_meter_that_did_not_tick_may_be_the_same(run):
    energy = {"joules": None, "tokens": 100, "meter": "some meter"}
    edit(run.path / COST, in_processes(peak_memory_bytes=2**28, load_s=0.5, energy=energy))
    judge(run.path)


def put_load(run: Run, services, arrivals=None) -> None:
    servers = []
    for turn in range(3):
        arrived = arrivals or poisson(2.0, 10.0, (turn, 0)).tolist()
        times = [5.0 + turn + 0.1 * i for i in range(len(arrived))]
        rate = Arrivals(rate=2.0, arrival_s=arrived, first_ms=times, done_ms=times)
        servers.append(Server(service_ms=[ms + 0.1 * turn for ms in services], rates=[rate]))
    artifact = read_manifest(run.path / "students/S1/s0").hash
    sizes = {
        "prompt_tokens": 64,
        "new_tokens": 10,
        "threads": 1,
        "warmup": 3,
        "seconds": 10.0,
        "slo_ms": 500.0,
    }
    facts = {
        "arm": "S1",
        "seed": 0,
        "engine": "torch",
        "target": "cpu",
        "provenance": run.provenance(artifact),
    }
    write_record(run.path, LoadRecord(**facts, **sizes, processes=servers))


def test_a_load_record_holds_as_many_requests_as_its_settings_say(tmp_path):
    run = Run(tmp_path)
    run.load = {"rates": [2.0], "seconds": 10, "slo_ms": 500}
    run.make()
    put_load(run, [20.0] * 400)
    judge(run.path)
    put_load(run, [1.0])
    assert "requests back to back is 1, the study asks 10" in refused(run)
    put_load(run, [1.0] * 10)
    assert "seconds back to back is 0.01, the study asks 5.0" in refused(run)
    put_load(run, [20.0] * 400, arrivals=[0.1, 0.2])
    assert "number of arrivals is 2, the study asks" in refused(run)


@pytest.mark.parametrize(
    "given",
    [
        {"arrival_s": [], "first_ms": [], "done_ms": []},
        {"arrival_s": [1.0], "first_ms": [1.0, 1.0], "done_ms": [1.0, 1.0]},
        {"arrival_s": [2.0, 1.0], "first_ms": [1.0], "done_ms": [1.0]},
        {"arrival_s": [1.0], "first_ms": [-5.0], "done_ms": [-6.0]},
        {"arrival_s": [1.0], "first_ms": [float("nan")], "done_ms": [1.0]},
    ],
)
def test_requests_that_cannot_have_been_are_refused(given):
    with pytest.raises(ValueError, match="validation error"):
        Arrivals(rate=2.0, **given)


RERUN = Rerun(tokens=5, flips=0, kl_bits=0.0)
AGREEMENT = {
    "id": ["d0", "d1"], "tokens": [5, 5], "flips": [1, 0], "kl_bits": [0.1, 0.2], "reruns": {"batch": RERUN},
}  # fmt: skip


def agreement(run: Run, seed: int, **changes) -> Agreement:
    hashes = [read_manifest(run.path / f"{name}S1/s{seed}").hash for name in ("students/", "variants/int8/")]
    facts = {"arm": "S1", "seed": seed, "recipe": "int8", "engine": "openvino", "student": hashes[0]}
    data = read_manifest(run.path / "data").hash
    return Agreement(**facts, data=data, **{**AGREEMENT, **changes}, provenance=run.provenance(hashes[1]))


@pytest.mark.parametrize(
    "changes",
    [
        {"reruns": {}},
        {"reruns": {"batch": {"tokens": 0, "flips": 0, "kl_bits": 0.0}}},
        {"id": ["d0", "d0"]},
        {"flips": [50, 0]},
        {"flips": [-3, 0]},
        {"kl_bits": [-5.0, 0.2]},
    ],
)
def test_agreements_that_cannot_have_been_are_refused(run, changes):
    with pytest.raises(ValueError, match="validation error"):
        agreement(run, 0, **changes)


@pytest.mark.parametrize("name", ["nope", "d50"])
def test_an_agreement_on_other_documents_is_named(run, name):
    for seed in run.seeds:
        write_record(run.path, agreement(run, seed, id=["d0", name]))
    assert f"agreement of int8: document {name!r} is none of the validation documents" in refused(run)


def test_unbuilt_recipes_that_are_nested_too_deep_are_one_line(run):
    (run.path / "unbuilt.json").write_text("[" * 100_000)
    assert "unbuilt.json: holds no recipes with reasons" in refused(run)


@pytest.mark.parametrize("name", ["arm", "recipe", "target"])
def test_a_record_that_names_a_path_is_not_merged(run, tmp_path, name):
    record = json.loads((run.path / COST).read_text()) | {name: "/etc"}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"line 1: {name}: '/etc'; give a name, not a path"):
        read_lines(tmp_path / "records.jsonl")


def test_likelihoods_and_counts_beyond_all_bounds_are_refused():
    row = {"slice": "validation", "id": "a", "sha256": "x", "nats": 1.7e308}
    with pytest.raises(UserError, match="line 1: nats"):
        importer.read_row("line 1", row)
    for tokens in (10**400, True, 0):
        with pytest.raises(UserError, match="line 1: tokens"):
            importer.read_row("line 1", row | {"nats": 1.0, "tokens": tokens})
    with pytest.raises(ArgumentTypeError, match="expected a whole number"):
        count("1" + "0" * 400)


def test_a_pilot_whose_teacher_harms_plans_no_share(tmp_path):
    run = Run(tmp_path)
    run.gains |= {"T1": -0.12, "S1": -0.06, "S0": 0.0}
    run.make()
    study, budget = load_study(run.path), load_budget(load_study(run.path))
    for share in (0.2, None):
        with pytest.raises(UserError, match="no teacher gain on validation"):
            list_tests(read_pilot(run.path, study), budget, study, None if share else 0.1, share, 1)
