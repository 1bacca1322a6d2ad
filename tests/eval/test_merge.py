"""Records of other machines: what fits is joined, what does not is refused with both values named."""

import json
import shutil
from pathlib import Path

import pytest

from eval.core.artifacts import read_manifest
from eval.core.errors import UserError
from eval.core.records import Documents, Score, read_costs, write_record
from eval.core.sections import Load
from eval.core.study import load_study
from eval.cost.merge import merge_records
from eval.cost.plan import plan_from_command
from tests.eval.run_builder import COST, fake_run

MACHINE = {
    "host": "elsewhere",
    "system": "Linux",
    "cpu": "c",
    "isa": "AVX2",
    "cores": 4,
    "device": "Some GPU",
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(study file, run folder) with the plain student."""
    return fake_run(tmp_path_factory.mktemp("merge"), recipes=[])


@pytest.fixture
def here(prepared):
    """The run folder without any record, and its study."""
    shutil.rmtree(prepared[1] / "records", ignore_errors=True)
    return prepared[1], load_study(prepared[0])


def source(run, study, place="students/S1/s0", **changes):
    facts = {"artifact": read_manifest(run / place).hash, "config": study.hash(), "machine": MACHINE}
    return {**facts, "versions": {}, "time": "2026-01-01T00:00:00+00:00", **changes}


def cost(run, study, **changes):
    """A cost record of the plain student on the GPU, as JSON."""
    count = COST["requests"]
    process = {
        "prefill_ms": [1.0] * count,
        "decode_ms": [1.0] * count * (COST["new_tokens"] - 1),
        "load_s": 1.0,
        "peak_memory_bytes": 1,
    }
    sizes = {name: COST[name] for name in ("prompt_tokens", "new_tokens", "threads", "warmup")}
    facts = {"kind": "cost", "arm": "S1", "seed": 0, "engine": "torch", "target": "gpu"}
    facts["disk_bytes"] = read_manifest(run / "students/S1/s0").bytes
    processes = [process] * COST["processes"]
    return {**facts, **sizes, "processes": processes, "provenance": source(run, study), **changes}


def load(run, study, **changes):
    """A record of the same under load."""
    gone = {"kind", "processes", "disk_bytes"}
    fields = {name: value for name, value in cost(run, study).items() if name not in gone}
    servers = [{"service_ms": [1600.0] * 10, "rates": []}] * COST["processes"]
    return {**fields, "kind": "load", "processes": servers, "seconds": 30.0, "slo_ms": None, **changes}


def lines(path: Path, *records: dict) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_records_of_a_file_are_joined_once(here, tmp_path):
    run_folder, study = here
    given = lines(tmp_path / "far.jsonl", cost(*here), load(*here))
    assert [record.kind for record in merge_records(run_folder, study, [given])] == ["cost", "load"]
    (merged,) = read_costs(run_folder)
    assert (merged.provenance.machine.host, merged.target) == ("elsewhere", "gpu")
    assert merge_records(run_folder, study, [given]) == [], "the very same again changes nothing"


def test_a_record_without_a_study_is_bound_by_its_artifact(here, tmp_path):
    run_folder, study = here
    given = lines(tmp_path / "bare", cost(*here, provenance=source(*here, config=""), prompts="random"))
    (record,) = merge_records(run_folder, study, [given])
    assert (record.provenance.config, record.prompts) == (study.hash(), "random")
    other = source(*here, "students/S0/s0", config="")
    refused = lines(tmp_path / "other", cost(*here, provenance=other, target="cpu"))
    with pytest.raises(UserError, match="Some GPU"):
        merge_records(run_folder, study, [refused])
    shutil.rmtree(run_folder / "records")
    with pytest.raises(UserError, match=other["artifact"][:12]):
        merge_records(run_folder, study, [lines(tmp_path / "other", cost(*here, provenance=other))])


@pytest.mark.parametrize("make", [cost, load])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target": "gpux"}, ["target: 'gpux'; did you mean 'gpu'?"]),
        ({"target": "cpu"}, ["measured on 'Some GPU', the target 'cpu' is 'cpu'"]),
        ({"threads": 8}, ["threads is 8, the study asks 1"]),
        ({"new_tokens": 9}, ["new_tokens is 9, the study asks 4"]),
        ({"recipe": "int8"}, ["recipe: 'int8'", "accepted: plain"]),
        ({"arm": "../../evil"}, ["arm: '../../evil'", "give a name, not a path"]),
        ({"arm": "S0"}, ["S0-s0.json", "measured on artifact", "students/S0/s0 holds"]),
        ({"provenance": {"config": "f" * 64}}, ["study hash ffffffffffff", "this study's is"]),
        ({"provenance": {"artifact": "a" * 64}}, ["artifact aaaaaaaaaaaa", "students/S1/s0 holds"]),
        ({"provenance": {"time": "2999-01-01T00:00:00+00:00"}}, ["2999-01-01", "yet to come"]),
        ({"kind": "nothing"}, ["line 1", "'cost'"]),
        ({"seed": "x"}, ["line 1", "seed"]),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(here, tmp_path, make, changes, words):
    changed = {**changes}
    if "provenance" in changes:
        changed["provenance"] = source(*here, **changes["provenance"])
    good = cost(*here) if make is load else load(*here)
    given = lines(tmp_path / "good", good), lines(tmp_path / "bad", make(*here, **changed))
    with pytest.raises(UserError) as caught:
        merge_records(*here, list(given))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (here[0] / "records").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["processes"].pop(), "processes is 1, the study asks 2"),
        (lambda r: r["processes"].clear(), "cost.processes: expected at least 1 of them"),
        (lambda r: [p["prefill_ms"].pop() for p in r["processes"]], "requests is 2, the study asks 3"),
        (lambda r: r["processes"][1]["prefill_ms"].pop(), "requests is 2, the study asks 3"),
        (lambda r: r["processes"][1]["decode_ms"].pop(), "number of decode steps is 8, the study asks 9"),
        (lambda r: r.update(warmup=2), "warmup is 2, the study asks 1"),
        (lambda r: r.pop("warmup"), "warmup is unknown, the study asks 1"),
    ],
)
def test_half_measured_is_refused(here, tmp_path, change, words):
    record = json.loads(json.dumps(cost(*here)))
    change(record)
    with pytest.raises(UserError, match=words):
        merge_records(*here, [lines(tmp_path / "half", record)])
    assert not (here[0] / "records").exists()


def test_other_settings_of_the_load_are_refused(here, tmp_path):
    with pytest.raises(UserError, match=r"slo_ms is 5\.0, the study asks None"):
        merge_records(*here, [lines(tmp_path / "x", load(*here, slo_ms=5.0))])
    run_folder, study = here
    cost = study.cost.model_copy(update={"load": Load(rates=[2.0])})
    with pytest.raises(UserError, match=r"rates is \[\], the study asks \[2\.0\]"):
        merge_records(
            run_folder, study.model_copy(update={"cost": cost}), [lines(tmp_path / "x", load(*here))]
        )


def test_two_records_of_one_model_are_refused(here, tmp_path):
    ours, theirs = cost(*here), cost(*here, prompts="others")
    both = [lines(tmp_path / "a", ours), lines(tmp_path / "b", theirs)]
    with pytest.raises(UserError, match=r"b: .*comes from .*a: .* too; give one of them"):
        merge_records(*here, both)
    merge_records(*here, both[:1])
    theirs["provenance"]["machine"] = {**MACHINE, "host": "third"}
    with pytest.raises(UserError, match=r"from third at 2026.*is from elsewhere at 2026.*delete the one"):
        merge_records(*here, [lines(tmp_path / "b", theirs)])


def test_a_copy_of_the_run_gives_all_its_records(here, tmp_path):
    run_folder, study = here
    merge_records(run_folder, study, [lines(tmp_path / "a", load(*here))])
    copy = Path(shutil.copytree(run_folder, tmp_path / "tiny"))
    merge_records(copy, load_study(copy), [lines(tmp_path / "b", cost(*here))])
    documents = Documents(id=["x"], slice=["validation"], bytes=[3], tokens=[1], bits=[4.0])
    score = {"arm": "S1", "seed": 0, "engine": "torch", "documents": documents, "provenance": source(*here)}
    write_record(copy, Score(**score, data=read_manifest(run_folder / "data").hash))
    assert {record.kind for record in merge_records(run_folder, study, [str(copy)])} == {"score", "cost"}
    shutil.rmtree(run_folder / "records")
    test = Score(**score, kind="test", data=read_manifest(run_folder / "data").hash)
    (copy / "test.jsonl").write_text(test.model_dump_json() + "\n")
    with pytest.raises(UserError, match="a score of test documents"):
        merge_records(run_folder, study, [str(copy / "test.jsonl")])
    write_record(copy, Score(**score, data="d" * 64))
    with pytest.raises(UserError, match=r"measured on data dddddddddddd, .*data holds"):
        merge_records(run_folder, study, [str(copy)])


def test_a_file_that_is_no_record_is_refused(here, tmp_path):
    with pytest.raises(UserError, match="nowhere; name a file of records, or a copy"):
        merge_records(*here, ["nowhere"])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="the file is empty"):
        merge_records(*here, [str(tmp_path / "empty")])
    (tmp_path / "broken").write_text("{")
    with pytest.raises(UserError, match="broken, line 1: top level: Invalid JSON"):
        merge_records(*here, [str(tmp_path / "broken")])


def test_a_folder_that_is_not_what_its_manifest_says_is_not_measured(here, tmp_path, monkeypatch):
    alone = Path(shutil.copytree(here[0] / "students/S1/s0", tmp_path / "model"))
    (alone / "config.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["eval.cost", "--variant", str(alone)])
    with pytest.raises(UserError, match=r"config\.json has sha256"):
        plan_from_command("Cost.", "cost.jsonl")


def test_a_damaged_record_that_lies_there_is_reported(here, tmp_path):
    run_folder, study = here
    given = lines(tmp_path / "far.jsonl", cost(*here))
    merge_records(run_folder, study, [given])
    (path,) = (run_folder / "records" / "cost").rglob("*.json")
    path.write_text("")
    with pytest.raises(UserError, match=r"S1-s0\.json: top level: Invalid JSON.*delete it"):
        merge_records(run_folder, study, [given])
    path.unlink()


def test_seeds_that_the_study_does_not_have_are_refused(here, tmp_path):
    given = lines(tmp_path / "far.jsonl", cost(*here, seed=77))
    with pytest.raises(UserError, match=r"seed: 77; the study has"):
        merge_records(*here, [given])
