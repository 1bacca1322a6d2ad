"""What the gate refuses: one clear line that names both values, exit code 3, nothing written."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from eval.core.artifacts import read_manifest
from eval.core.budget import load_budget
from eval.core.errors import UserError
from eval.core.study import load_study
from eval.gate.evidence import collect_evidence
from tests.eval.run_builder import Run, change_score, copy_run, edit, teacher_hash


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run; tests that change it take a copy."""
    return Run(tmp_path_factory.mktemp("gate")).make().folder


def change_cost(change):
    return lambda run: edit(run.path / "records/cost/cpu/int8/S1-s0.json", change)


def change_budget(change):
    def spoil(run: Run) -> None:
        change(run.budget)
        (run.folder / "budget.yaml").write_text(yaml.safe_dump(run.budget))

    return spoil


def copied_student(run: Run) -> None:
    same = read_manifest(run.path / "students/S1/s0")
    (run.path / "students/S1/s1/manifest.json").write_text(same.model_dump_json())
    change_score(lambda r: r["provenance"].update(artifact=same.hash))(run)


def retrained(arm: str):
    """Another student of seed 1, scored anew; what was made from the old one is still there."""

    def spoil(run: Run) -> None:
        place = f"students/{arm}/s1"
        student = run.artifact(place, read_manifest(run.path / place).parents, content="trained again")
        change_score(lambda r: r["provenance"].update(artifact=student), f"plain/{arm}-s1")(run)

    return spoil


def other_parent(place: str, role: str):
    return lambda run: edit(
        run.path / place / "manifest.json", lambda m: m["parents"].update({role: "9" * 64})
    )


def one_more(record: dict) -> None:
    added = {"id": "new", "slice": "far", "bytes": 9, "tokens": 3, "bits": 20.0}
    for name, value in added.items():
        record["documents"][name].append(value)


def no_far(run: Run) -> None:
    """Scores that lost every document of a mandatory slice."""
    for path in (run.path / "records/score").rglob("*.json"):
        edit(path, lambda r: r["documents"].update({n: c and c[:40] for n, c in r["documents"].items()}))


def by_other_recipe(run: Run) -> None:
    """The control of a variant was made by an older recipe of its name."""
    for arm, recipe_hash in (("S1", "new"), ("S0", "old")):
        for seed in run.seeds:
            place = run.path / f"variants/int8/{arm}/s{seed}/manifest.json"
            edit(place, lambda m, recipe_hash=recipe_hash: m["facts"].update(recipe_hash=recipe_hash))


def by_other_code(top: str, arms: tuple[str, str]):
    """One of a pair was kept by --accept-old, the other was made by newer code; each has code of its own."""

    def spoil(run: Run) -> None:
        for arm, version in zip(arms, ("1", "2"), strict=True):
            place = f"{top}/{arm}/s1"
            if top == "method":
                run.artifact(place)
            changes = {"code": {"student": version, "torch": "2.13.0", arm: arm}}
            if version == "1":
                changes["accepted"] = {**changes["code"], "student": "2"}
            path = run.path / place / "manifest.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def other_weights(run: Run) -> None:
    """Weights that nobody measured, with a manifest that lists them and keeps its hash."""
    path = run.path / "variants/int8/S1/s0/manifest.json"
    edit(path, lambda m: m["files"].update({next(iter(m["files"])): {"sha256": "0" * 64, "bytes": 1}}))


def calibrated(slices: list[str], sums: float, bins: int = 15):
    """A score that tells its calibration on these slices."""
    calibration = {"tokens": [1.0] * bins, "confidence": [sums] * 15, "correct": [0.5] * 15}
    return change_score(lambda r: r["documents"].update(calibration=dict.fromkeys(slices, calibration)))


def recipe(text: str):
    """The study asks for a recipe `half` with this text."""

    def spoil(run: Run) -> None:
        study = yaml.safe_load((run.path / "study.yaml").read_text())
        study["recipes"][-1] = str(run.folder / "half.yaml")
        (run.path / "study.yaml").write_text(yaml.safe_dump(study))
        (run.folder / "half.yaml").write_text(text)

    return spoil


def twice(run: Run) -> None:
    path = run.folder / "budget.yaml"
    path.write_text(path.read_text() + "\nf: 0.001\n")


BAD = {
    "a manifest edited": (other_weights, ["int8/S1/s0/manifest.json", "its files give", "it was edited"]),
    "a manifest of no text": (
        lambda run: (run.path / "variants/int8/S1/s0/manifest.json").write_bytes(b'{"kind": "\xff"}'),
        ["int8/S1/s0/manifest.json", "Invalid JSON"],
    ),
    "students of other code": (
        by_other_code("students", ("S1", "S0")),
        [
            "students/S1/s1: made by student 1, its control",
            "S0/s1 by student 2; delete",
            "S1/s1, train again",
        ],
    ),
    "teachers of other code": (
        by_other_code("method", ("T0", "T1")),
        ["method/T1/s1: made by student 2, its control", "T0/s1 by student 1; delete"],
    ),
    "another recipe": (by_other_recipe, ["int8/S0/s0", "another recipe 'int8'", "absorb compress again"]),
    "another engine of the control": (
        change_score(lambda r: r.update(engine="torch"), "int8/S0-s1"),
        ["int8/S0/s1", "another engine"],
    ),
    "calibration of other slices": (
        calibrated(["validation"], 0.5),
        ["S1-s1.json", "calibration of slices ['validation'], documents of ['far', 'validation']"],
    ),
    "calibration not a number": (
        calibrated(["validation", "far"], math.nan),
        ["S1-s1.json", "calibration.validation.confidence.0"],
    ),
    "calibration of other bins": (calibrated(["validation", "far"], 0.5, 14), ["of different bins"]),
    "passes that are none": (recipe("name: half\ntarget: cpu\npasses: 3\n"), ["half.yaml", "passes", "list"]),
    "recipes of one name": (
        recipe("name: int8\ntarget: cpu\npasses: [{pass: int8}]\n"),
        ["half.yaml: name", "'int8'", "another recipe has it"],
    ),
    "a recipe called plain": (
        recipe("name: plain\ntarget: cpu\npasses: [{pass: int8}]\n"),
        ["half.yaml: name", "'plain'", "uncompressed student"],
    ),
    "a key twice": (twice, ["budget.yaml", "key 'f' twice", "line"]),
    "no finite limit": (
        change_budget(
            lambda b: b["targets"]["cpu"].update(limits={"disk": {"at_most": math.inf, "unit": "B"}})
        ),
        ["targets.cpu.limits.disk.at_most", "finite"],
    ),
    "no records": (lambda run: shutil.rmtree(run.path / "records"), ["no score record", "absorb score"]),
    "seed missing": (
        lambda run: (run.path / "records/score/int8/S0-s2.json").unlink(),
        ["S0", "int8", "seeds [2] are missing", "[0, 1, 2, 3]"],
    ),
    "no seed": (
        lambda run: shutil.rmtree(run.path / "records/score/int8"),
        ["S1", "int8", "no score of any seed; run absorb score"],
    ),
    "other data": (change_score(lambda r: r.update(data="f" * 64)), ["S1-s1.json", "ffffffffffff", "holds"]),
    "other study": (
        change_score(lambda r: r["provenance"].update(config="e" * 64)),
        ["S1-s1.json", "eeeeeeeeeeee", "this study's is"],
    ),
    "other artifact": (
        change_score(lambda r: r["provenance"].update(artifact="a" * 64), "int8/S0-s1"),
        ["S0-s1.json", "aaaaaaaaaaaa", "holds"],
    ),
    "no artifact": (
        lambda run: (run.path / "variants/int8/S1/s1/manifest.json").unlink(),
        ["variants/int8/S1/s1", "no manifest.json"],
    ),
    "student trained again": (
        retrained("S1"),
        ["half/S1/s1", "made from student", "the run's is", "run absorb compress again"],
    ),
    "control trained again": (retrained("S0"), ["half/S0/s1", "made from student"]),
    "other base": (
        other_parent("students/CE/s2", "base"),
        ["students/CE/s2", "made from base 999999999999", "run absorb train again"],
    ),
    "other teacher": (
        other_parent("students/S0/s2", "teacher"),
        ["made from teacher 999999999999", f"the run's is {teacher_hash('T0', 2)[:12]}"],
    ),
    "base of other data": (
        other_parent("base/s3", "data"),
        ["base/s3", "data 999999999999", "absorb train"],
    ),
    "variant of other data": (other_parent("variants/half/S0/s0", "data"), ["half/S0/s0", "made from data"]),
    "no parents": (
        lambda run: edit(run.path / "students/S1/s0/manifest.json", lambda m: m["parents"].clear()),
        ["students/S1/s0", "made from data unknown"],
    ),
    "base scored before": (
        change_score(lambda r: r["provenance"].update(artifact="b" * 64), "plain/B-s1"),
        ["B-s1.json", "bbbbbbbbbbbb", "base/s1 holds"],
    ),
    "seeds are copies": (copied_student, ["seeds 0 and 1", "same artifact"]),
    "other document": (
        change_score(lambda r: r["documents"]["id"].__setitem__(3, "zzz")),
        ["'d3'", "is missing", "S1-s1.json"],
    ),
    "other bytes": (change_score(lambda r: r["documents"]["bytes"].__setitem__(3, 7)), ["'d3'", "7 bytes"]),
    "one document more": (
        change_score(one_more),
        ["71 documents", "70"],
    ),
    "not a number": (
        change_score(lambda r: r["documents"]["bits"].__setitem__(0, float("nan"))),
        ["'d0'", "nan"],
    ),
    "infinite": (
        change_score(lambda r: r["documents"]["bits"].__setitem__(2, float("inf"))),
        ["'d2'", "inf"],
    ),
    "zero bytes": (change_score(lambda r: r["documents"]["bytes"].__setitem__(4, 0)), ["'d4' has 0 bytes"]),
    "duplicate id": (
        change_score(lambda r: r["documents"]["id"].__setitem__(1, "d0")),
        ["'d0' appears twice in slice 'validation'"],
    ),
    "columns of other lengths": (
        change_score(lambda r: r["documents"]["bits"].pop()),
        ["columns of [69, 70] entries"],
    ),
    "one document less": (
        change_score(lambda r: [r["documents"][n].pop() for n in ("id", "slice", "bytes", "tokens", "bits")]),
        ["'d69'", "is missing"],
    ),
    "empty slice": (no_far, ["slice without any scored document", "'far'", "accepted: validation"]),
    "a time to come": (
        change_score(lambda r: r["provenance"].update(time="2999-01-01T00:00:00+00:00")),
        ["S1-s1.json", "measured at 2999-01-01", "yet to come; set the clock"],
    ),
    "no time": (
        change_cost(lambda r: r["provenance"].update(time="yesterday")),
        ["int8/S1-s0.json", "provenance.time", "yesterday"],
    ),
    "a time without a zone": (
        change_score(lambda r: r["provenance"].update(time="2026-01-01T00:00:00")),
        ["names no time zone"],
    ),
    "cut short": (
        lambda run: (run.path / "records/score/int8/S0-s2.json").write_text('{"arm": "S0", "seed"'),
        ["S0-s2.json", "Invalid JSON"],
    ),
    "misplaced record": (
        lambda run: (run.path / "records/score/int8/S0-s2.json").rename(
            run.path / "records/score/half/S0-s9.json"
        ),
        ["half/S0-s9.json", "its path and its content"],
    ),
    "unknown slice": (
        change_budget(lambda b: b.update(slices={"fra": 0.5})),
        ["'fra'", "did you mean 'far'"],
    ),
    "unknown variant": (
        change_budget(lambda b: b["targets"]["cpu"].update(limits={"disk": {"at_most": 1, "of": "int9"}})),
        ["'int9'", "did you mean 'int8'"],
    ),
    "unknown target": (
        change_budget(lambda b: b["targets"].update(cpux=b["targets"].pop("cpu"))),
        ["'cpux'", "did you mean 'cpu'"],
    ),
    "unknown unit": (
        change_budget(lambda b: b["targets"]["cpu"].update(limits={"disk": {"at_most": 1, "unit": "MB"}})),
        ["targets.cpu.limits.disk.unit", "'MB'", "'MiB'"],
    ),
    "unit of another quantity": (
        change_budget(lambda b: b["targets"]["cpu"].update(limits={"disk": {"at_most": 1, "unit": "ms"}})),
        ["targets.cpu", "disk cannot be in ms; accepted: B, KiB, MiB, GiB"],
    ),
    "nothing required": (
        change_budget(lambda b: b["targets"]["cpu"].update(required=False)),
        ["no required target"],
    ),
    "unknown key": (change_budget(lambda b: b.update(alhpa=0.1)), ["alhpa", "did you mean 'alpha'"]),
    "other threads": (change_cost(lambda r: r.update(threads=8)), ["threads is 8", "the study asks 1"]),
    "fewer processes": (change_cost(lambda r: r["processes"].pop()), ["processes is 2", "the study asks 3"]),
    "other engine": (change_cost(lambda r: r.update(engine="torch")), ["'torch'", "'openvino'"]),
    "other device": (
        change_cost(lambda r: r["provenance"]["machine"].update(device="Some GPU")),
        ["'Some GPU'", "'cpu'"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(toy_folder: Path, tmp_path: Path, name: str):
    run = copy_run(toy_folder, tmp_path)
    spoil, words = BAD[name]
    spoil(run)
    with pytest.raises(UserError) as error:
        collect_evidence(
            run.path, load_study(run.path), load_budget(run.study, str(tmp_path / "budget.yaml"))
        )
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", ["no records", "not a number", "unknown target", "cut short"])
def test_the_command_ends_with_that_line_and_writes_nothing(toy_folder: Path, tmp_path: Path, name: str):
    run = copy_run(toy_folder, tmp_path)
    spoil, words = BAD[name]
    spoil(run)
    done = run.gate("--budget", str(tmp_path / "budget.yaml"))
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in words)
    assert not (run.path / "gate.json").exists()
