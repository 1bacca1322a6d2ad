"""`--json FILE` of every command that measures, judges or verifies: what it found, for a program to read."""

import json
import shutil

import pytest
import yaml

from tests.eval.run_builder import COST, Run, copy_run, facts, fake_run, put, teacher_hash, torch_model
from tests.eval.test_test_set import OpenedRun
from tests.helpers import run, text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of tiny random models with one variant, and what scoring it wrote."""
    folder = tmp_path_factory.mktemp("json")
    load = {"rates": [500.0], "seconds": 0.5}
    _, run_folder = fake_run(folder, recipes=["wanda50"], cost={**COST, "load": load})
    for arm, seed in {"S1": 3, "S0": 4}.items():
        put(run_folder, f"variants/wanda50/{arm}/s0", torch_model(seed), **facts(arm, "wanda50"))
    done = run("-m", "eval.score", "--study", run_folder, "--json", folder / "score.json")
    assert done.returncode == 0, done.stderr
    return run_folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A run of records alone that can be judged."""
    return Run(tmp_path_factory.mktemp("toy")).make()


def score(request, folder):
    return json.loads((request.getfixturevalue("tiny").parent.parent / "score.json").read_text())


def command(module, fixture, *words, code=0):
    """A case: runs `module` on the run of the fixture and returns what `--json` wrote."""

    def result(request, folder):
        where = request.getfixturevalue(fixture)
        where = getattr(where, "path", where)
        return written(folder, module, "--study", where, *words, code=code)

    return result


def verified(request, folder):
    run_folder = request.getfixturevalue("released_run")
    words = ("--study", run_folder.path, "--verify", "--public", run_folder.folder / "key.pub")
    return written(folder, "eval.signoff", *words)


def released(request, folder):
    release = request.getfixturevalue("release")
    contract = yaml.safe_load((release / "contract.yaml").read_text())
    return [contract, json.loads((release.parent / "release.json").read_text())]


def written(folder, module, *words, code=0):
    done = run("-m", module, *words, "--json", folder / "out.json")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())


def merge(request, folder):
    here = shutil.copytree(request.getfixturevalue("tiny"), folder / "tiny")
    gone = here / "records/score/plain/S1-s0.json"
    gone.unlink()
    return [written(folder, "eval.cost.merge", request.getfixturevalue("tiny"), "--study", here), [str(gone)]]


def opening(request, folder):
    toy = OpenedRun(folder, seeds=[0, 1, 2])
    toy.make()
    for arm in ("T0", "T1"):
        for seed in toy.seeds:
            toy.test_score(arm, seed, teacher_hash(arm, seed))
    done = run("-m", "eval.gate.test_set", "--study", toy.path, "--by", "Ada", "--json", folder / "out.json")
    assert done.returncode in (1, 2), done.stderr  # random models keep nothing
    return json.loads((folder / "out.json").read_text())


def recheck(request, folder):
    path = folder / "new.jsonl"
    odd = [" ".join(reversed(text("code", i, 40).split())).upper() for i in range(30)]
    path.write_text("".join(json.dumps({"text": words}) + "\n" for words in odd))
    words = ("--release", request.getfixturevalue("release"), "--data", path)
    return written(folder, "eval.watch.recheck", *words, code=1)


@pytest.mark.parametrize(
    ("case", "check"),
    [
        (score, lambda r: r["bits_per_byte"]["wanda50"]["S1"]["far"] > 0 and r["tasks"] == {}),
        (command("eval.score.agreement", "tiny"), lambda r: r["wanda50"]["kl"]["value"] > 0),
        pytest.param(
            command("eval.cost.load", "tiny", "--recipe", "plain"),
            lambda r: r[0]["processes"][0]["rates"][0]["rate"] == 500,
            marks=pytest.mark.slow,
        ),
        (merge, lambda r: r[0] == r[1]),
        (command("eval.gate.power", "toy"), lambda r: r["tests"][0]["power"]["value"] > 0),
        (command("eval.gate", "toy"), lambda r: r["verdict"] == "PASS" and r["variants"]),
        (opening, lambda r: (r["by"], r["documents"]) == ("Ada", 12) and r["verdict"] in ("FAIL", "INCONCLUSIVE")),
        (verified, lambda r: r == {"holds": True, "problems": []}),
        (released, lambda r: r[0]["targets"].keys() == r[1]["targets"].keys() and r[0]["owner"] == r[1]["owner"]),
        (recheck, lambda r: r["verdict"] == "FAIL" and r["findings"] and r["drift"]),
    ],
    ids=["score", "agreement", "load", "merge", "power", "gate", "test_set", "verify", "release", "recheck"],
)  # fmt: skip
def test_the_result_is_written_as_json(case, check, request, tmp_path):
    result = case(request, tmp_path)
    assert check(result), result


def test_the_verdict_is_written_as_it_lies_in_the_run(toy, tmp_path):
    written(tmp_path, "eval.gate", "--study", toy.path)
    assert (tmp_path / "out.json").read_bytes() == (toy.path / "gate.json").read_bytes()


def test_a_broken_sign_off_is_written_with_its_problems(released_run, tmp_path):
    broken = copy_run(released_run.folder, tmp_path / "copy")
    (broken.path / "gate.json").write_text("{}")
    result = written(
        tmp_path,
        "eval.signoff",
        "--study",
        broken.path,
        "--verify",
        "--public",
        broken.folder / "key.pub",
        code=1,
    )
    assert result["holds"] is False
    assert any("gate.json" in problem for problem in result["problems"])


@pytest.mark.parametrize(
    "words",
    [
        ("eval.gate", "--study", "runs/none"),
        ("eval.cost", "--study", "runs/none"),
        ("eval.cost.merge", "--study", "runs/none", "records.jsonl"),
        ("eval.watch.recheck", "--release", "runs/none", "--data", "new.jsonl"),
    ],
)
def test_after_an_error_no_result_lies_there_not_even_that_of_an_earlier_run(words, tmp_path):
    (tmp_path / "out.json").write_text('{"verdict": "PASS"}')
    done = run("-m", *words, "--json", tmp_path / "out.json")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert not (tmp_path / "out.json").exists()
