"""Attacks on the evidence of a run and on a release: each is refused in a line that names the place."""

import json
import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.core.artifacts import digest, file_sha256, hash_files
from eval.core.errors import UserError
from eval.core.gate_file import read_gate
from eval.gate.decision import judge
from eval.gate.history import write_opening, write_runs
from eval.release.contract import refuse_broken_floors
from eval.release.contract_file import (
    Saving,
    chance_of_one_seed,
    floor_verdict,
    over_documents,
    read_contract,
)
from eval.release.load_release import ReleaseError, list_files, load_release
from eval.report.budget_table import csv_text
from eval.report.format import stamp
from eval.signoff.__main__ import main as signoff
from eval.signoff.figures import COMMANDS, figures_of, first_difference
from eval.signoff.keys import new_key
from eval.watch.recheck import main as recheck
from tests.eval.run_builder import Run, an_opening, copy_run, edit
from tests.helpers import run as command


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """A run whose gate was run; the test documents were opened twice for int8, and the gate saw both."""
    run = Run(tmp_path_factory.mktemp("attacked")).make()
    assert run.gate().returncode == 0
    write_opening(run.path, an_opening(run, 1, "FAIL"))
    write_opening(run.path, an_opening(run, 2, reason="the first one failed"))
    assert run.gate().returncode == 0
    return run.folder


@pytest.fixture
def attacked(judged, tmp_path) -> Run:
    return copy_run(judged, tmp_path)


def lower(budget: dict) -> None:
    budget["f"] = 0.05


def refused(run: Run, *words: str) -> str:
    """The one line with which the gate refuses; nothing is written."""
    before = (run.path / "gate.json").read_bytes()
    done = run.gate(*words)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stdout + done.stderr
    assert (run.path / "gate.json").read_bytes() == before
    return done.stderr


def test_a_budget_that_is_lowered_after_the_verdict_changes_no_verdict_and_is_told(judged, tmp_path):
    run = copy_run(judged, tmp_path)
    study = yaml.safe_load((run.path / "study.yaml").read_text())
    study["budget"] = str(tmp_path / "budget.yaml")
    (run.path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "budget.yaml").write_text(yaml.safe_dump({**run.budget, "f": 0.05, "g": 0.05}))
    before = run.result()
    done = run.gate()
    assert [v.parts for v in run.result().variants] == [v.parts for v in before.variants]
    assert "note: changed since 2025-12-31T00:00:00+00:00: f was 0.5, is 0.05 in the file" in done.stdout
    assert run.result().runs == before.runs, "the same verdict is not counted again"
    run.gate("--budget", str(tmp_path / "budget.yaml"))
    notes = "\n".join(run.result().notes)
    assert "judged by another budget, 'test', than the one fixed on 2025-12-31T00:00:00+00:00" in notes
    count, (first, last) = len(before.runs), (before.runs[-1], run.result().runs[-1])
    assert f"the gate gave {count + 1} different verdicts since" in notes
    budgets = f"by budget 'test' ({first.budget_hash[:8]}): {{}}, 'test' ({last.budget_hash[:8]}): 1"
    assert budgets.format(count) in notes
    assert f"changed since the verdict before: the budget; {first.verdict}, now {last.verdict}" in notes
    assert f"; verdict {count + 1} of this run, repeats not counted" in csv_text(run.result())
    run.gate()
    assert budgets.format(count + 1) in "\n".join(run.result().notes), "it stays known"


def test_a_first_verdict_by_another_budget_and_what_changed_since_are_told(judged, tmp_path):
    run = copy_run(judged, tmp_path)
    (run.path / "gate.json").unlink()
    (run.path / "gate-runs.jsonl").unlink()
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump({**run.budget, "name": "loose", "f": 0.05}))
    result = judge(run.path, str(tmp_path / "loose.yaml"))
    told = f"the gate gave 1 verdict since {result.runs[0].time}, by budget 'loose' ("
    assert result.notes[-1].startswith(told)
    write_runs(run.path, result.runs)
    (run.path / "records/cost/cpu/half/S1-s0.json").unlink()
    result = judge(run.path, str(tmp_path / "loose.yaml"))
    records = [one.extent.records for one in result.runs]
    moved = f"the evidence ({records[0]} records, now {records[0] - 1} records); PASS, now PASS"
    assert result.notes[-1].endswith(f"changed since the verdict before: {moved}")
    assert stamp(result).endswith("; verdict 2 of this run, repeats not counted")


def edited_plan(run: Run) -> None:
    edit(run.path / "plan.json", lambda plan: lower(plan["budget"]))


def hashed_plan(run: Run) -> None:
    def change(plan):
        lower(plan["budget"])
        plan["hash"] = digest({name: value for name, value in plan.items() if name != "hash"})

    edit(run.path / "plan.json", change)


def wiped_run(run: Run) -> None:
    path = run.path / "gate-runs.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[-1])


def edited_run(run: Run) -> None:
    path = run.path / "gate-runs.jsonl"
    path.write_text(path.read_text().replace('"number":1,"time":"20', '"number":1,"time":"19'))


def renumbered_opening(run: Run) -> None:
    (run.path / "records/test/opening-2.json").replace(run.path / "records/test/opening-1.json")
    edit(run.path / "records/test/opening-1.json", lambda o: o.update(number=1, previous=None, reason=None))


ATTACKS = {
    "plan of another version": (
        lambda run: edit(run.path / "plan.json", lambda plan: plan.update(schema_version=2)),
        ["plan.json: schema_version: found 2, expected 1", "another version of this project trained"],
    ),
    "plan edited": (edited_plan, ["plan.json: its hash says", "it was edited"]),
    "plan edited and hashed anew": (hashed_plan, ["plan.json: is ", "verdict 1 in gate-runs.jsonl was by"]),
    "plan deleted": (
        lambda run: (run.path / "plan.json").unlink(),
        ["plan.json: is none, verdict 1 in gate-runs.jsonl was by"],
    ),
    "verdict wiped": (wiped_run, ["gate-runs.jsonl: line 1: is verdict 2"]),
    "verdict edited": (edited_run, ["gate-runs.jsonl: line 2", "linked to"]),
    "verdicts deleted": (
        lambda run: (run.path / "gate-runs.jsonl").unlink(),
        ["gate-runs.jsonl: gate.json lists 2 verdict(s), it holds 0"],
    ),
    "first opening wiped": (
        lambda run: (run.path / "records/test/opening-1.json").unlink(),
        ["opening-1.json: is gone"],
    ),
    "last opening wiped": (
        lambda run: (run.path / "records/test/opening-2.json").unlink(),
        ["opening-2.json: is gone; verdict 2 in gate-runs.jsonl has seen it"],
    ),
    "opening edited": (
        lambda run: edit(run.path / "records/test/opening-1.json", lambda o: o.update(verdict="PASS")),
        ["opening-2.json: is linked to", "opening 1 is"],
    ),
    "openings renumbered": (
        renumbered_opening,
        ["opening-2.json: is gone; verdict 2 in gate-runs.jsonl has seen it"],
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_gate_refuses_in_one_line_that_names_the_place(attacked, name):
    attack, words = ATTACKS[name]
    attack(attacked)
    line = refused(attacked)
    assert all(word in line for word in words), line


def test_counts_of_a_cost_record_are_those_of_the_manifest_and_the_settings(judged, tmp_path):
    for field, value in (("disk_bytes", 1), ("new_tokens", 99), ("warmup", 1)):
        run = copy_run(judged, tmp_path / field)
        edit(run.path / "records/cost/cpu/int8/S1-s0.json", lambda r, f=field, v=value: r.update({f: v}))
        line = refused(run)
        assert "int8/S1-s0.json" in line
        assert f"{field} is {value}" in line


def test_a_record_that_is_a_link_is_refused(attacked, tmp_path):
    record = attacked.path / "records/score/int8/S1-s0.json"
    record.rename(tmp_path / "elsewhere.json")
    record.symlink_to(tmp_path / "elsewhere.json")
    assert "S1-s0.json: is a link" in refused(attacked)


def load(release: Path, key: Path) -> str:
    """What the installed loader says: a reason, an error, or None."""
    try:
        return str(load_release(release, "cpu", public_key=key)[1].reason)
    except ReleaseError as error:
        return str(error)


def plant(place: str, what: str):
    def attack(release: Path) -> None:
        (release / place).parent.mkdir(exist_ok=True)
        (release / place).write_text(what)

    return attack


def link(release: Path) -> None:
    (release / "fallback/more").symlink_to("/etc")


def linked_weights(release: Path) -> None:
    weights = release / "variants/small/model.safetensors"
    weights.rename(release.parent / "weights")
    weights.symlink_to(release.parent / "weights")


def hashed_anew(release: Path) -> None:
    """A hand that knows how: the index says no waiver ends, and every hash is put right."""
    index = json.loads((release / "release.json").read_text())
    index["targets"]["cpu"]["expires"] = "9999-12-31"
    (release / "release.json").write_text(json.dumps(index))

    def put_right(m: dict) -> None:
        m["files"]["release.json"] = hash_files(release)["release.json"].model_dump()
        m["hash"] = digest({name: entry["sha256"] for name, entry in m["files"].items()})

    edit(release / "manifest.json", put_right)


PLANTED = {
    "a compiled loader": (
        plant("__pycache__/load_release.cpython-311.pyc", "x"),
        "load_release.cpython-311.pyc",
    ),
    "code": (plant("variants/small/modeling.py", "import os"), "variants/small/modeling.py"),
    "a link to a folder": (link, "fallback/more is a link"),
    "a link to weights": (linked_weights, "variants/small/model.safetensors is a link"),
    "the index hashed anew": (hashed_anew, "release.json is not the one that was signed"),
    "evidence": (plant("evidence/gate.json", "{}"), "evidence/gate.json was changed"),
    "a signature of nobody": (plant("signature.json", "{}"), "signature.json is no signature"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_release_that_was_touched_is_refused_with_the_place(release, released_run, tmp_path, name):
    copy = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    attack, words = PLANTED[name]
    attack(copy)
    assert words in load(copy, released_run.folder / "key.pub")


@pytest.mark.parametrize("name", ["fallback", "variants/small", "variants"])
def test_a_linked_folder_is_never_served(release, released_run, tmp_path, name):
    """What a link names can be swapped after its hash was taken."""
    copy = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    if name == "fallback":
        with pytest.raises(ReleaseError, match="fallback is a link"):
            load_release(copy, "cpu", public_key=released_run.folder / "key.pub")
        return
    info = load_release(copy, "cpu", public_key=released_run.folder / "key.pub")[1]
    assert (info.fallback, info.reason) == (True, f"{name} is a link")
    with pytest.raises(ReleaseError, match=f"{name} is a link"):
        list_files(copy, "variants/small")


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_recheck_of_it_is_refused_in_one_line_with_the_place(release, released_run, tmp_path, name):
    copy = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    attack, words = PLANTED[name]
    attack(copy)
    (tmp_path / "new.jsonl").write_text('{"text": "a new one"}\n')
    key = released_run.folder / "key.pub"
    done = command(
        "-m", "eval.watch.recheck", "--release", copy, "--data", tmp_path / "new.jsonl", "--public", key
    )
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stdout + done.stderr
    assert words.split()[0] in done.stderr


def test_a_release_by_an_unknown_key_is_refused_and_an_untouched_one_is_served(
    release, released_run, tmp_path
):
    assert load(release, released_run.folder / "key.pub") == "None"
    new_key(tmp_path / "other")
    assert "was signed with the unknown key" in load(release, tmp_path / "other.pub")


@pytest.mark.slow
def test_the_loader_in_the_folder_leaves_no_compiled_copy_of_itself(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import sys; sys.path.insert(0, '.')\nfrom load_release import load_release\nprint(load_release('.', 'cpu')[1].fallback)"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False"
    assert not (copy / "__pycache__").exists()


def test_a_waiver_ends_whatever_day_the_caller_says(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
    edit(
        copy / "release.json", lambda index: index["targets"]["cpu"].update(waiver="x", expires="2026-01-31")
    )
    edit(
        copy / "manifest.json",
        lambda m: m["files"]["release.json"].update(sha256=file_sha256(copy / "release.json")),
    )
    info = load_release(copy, "cpu", today=date(2026, 1, 1))[1]
    assert (info.fallback, info.reason) == (True, "its waiver expired on 2026-01-31")


def test_a_release_whose_own_artifact_is_below_its_floor_is_not_built(released_run, tmp_path):
    """All seeds together pass; the first of them, which is released, keeps a third of what they keep."""
    shipped = read_contract(released_run.folder / "release").targets["cpu"]
    gain = shipped.gain["validation"]
    saved = np.random.default_rng(0).normal(0.048, 0.01, 60)
    weak = Saving(floor=0.06, measured=over_documents(saved, 0.05), verdict=floor_verdict(saved, 0.06, 0.05))
    assert (weak.verdict, floor_verdict(saved, 0.04, 0.05)) == ("FAIL", "PASS")
    for floor in (
        weak.measured.low,
        weak.measured.high,
    ):  # the interval that is shown is the one that decides
        held = [floor_verdict(saved, floor + sign * 1e-6, 0.05) for sign in (-1, 1)]
        assert held == (["PASS", "INCONCLUSIVE"] if floor < 0.048 else ["INCONCLUSIVE", "FAIL"])
    target = shipped.model_copy(
        update={"gain": {"validation": gain.model_copy(update={"over_control": weak})}}
    )
    with pytest.raises(
        UserError, match=r"saves 0\.04\d\d \[.*over the control on validation, the floor is 0\.0600"
    ):
        refuse_broken_floors({"cpu": target})


def test_the_chance_of_one_seed_is_the_prediction_of_student_s_t():
    """Reference: how often a further draw is at the floor, simulated from four seeds each."""
    rng = np.random.default_rng(1)
    seeds, further = rng.normal(1, 0.2, (4000, 4)), rng.normal(1, 0.2, 4000)
    predicted = np.array([chance_of_one_seed(row, 0.9) for row in seeds])
    sure = predicted >= 0.7
    assert (further[sure] >= 0.9).mean() == pytest.approx(predicted[sure].mean(), abs=0.15)
    lows = [row.mean() - 2.353 * row.std(ddof=1) * 1.25**0.5 for row in seeds]
    assert chance_of_one_seed(seeds[0], lows[0]) == pytest.approx(0.95, abs=1e-3)
    assert (further >= lows).mean() == pytest.approx(0.95, abs=0.015)
    assert chance_of_one_seed(seeds[0][:1], 0.9) is None


def flip(place: Path, rng: np.random.Generator) -> None:
    spoiled = bytearray(place.read_bytes())
    spoiled[rng.integers(len(spoiled))] ^= 1 << int(rng.integers(8))
    place.write_bytes(bytes(spoiled))


@pytest.mark.slow
@pytest.mark.parametrize("of", ["run", "release"])
def test_bits_flipped_in_fifty_places_are_each_named_by_the_command(
    released_run, release, tmp_path, monkeypatch, capsys, of
):
    """Any file at all but those that nobody signs: the log, and the page that the command makes anew.

    In gate.json, figures that are the same to nine digits are the same figures.
    """
    rng, key = np.random.default_rng(7), released_run.folder / "key.pub"
    (tmp_path / "new.jsonl").write_text('{"text": "a new one"}\n')
    main, words, folder = signoff, ["--study", released_run.path, "--verify"], released_run.path
    if of == "release":
        folder = shutil.copytree(release, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__"))
        main, words = recheck, ["--release", folder, "--data", tmp_path / "new.jsonl"]
    monkeypatch.setattr("sys.argv", ["command", *map(str, words), "--public", str(key)])
    places = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    unsigned = ("index.html", ".lock", "log.txt")
    for place in rng.choice([p for p in places if p.name not in unsigned], 50):
        whole, was = place.read_bytes(), place.stat()
        flip(place, rng)
        try:
            with pytest.raises(SystemExit) as end:
                main()
            flipped = read_gate(folder) if (place.name, end.value.code) == ("gate.json", 0) else None
        finally:
            place.write_bytes(whole)
            os.utime(place, ns=(was.st_atime_ns, was.st_mtime_ns))
        printed = "".join(capsys.readouterr())
        if flipped:
            same = [figures_of(gate, COMMANDS) for gate in (flipped, read_gate(folder))]
            assert first_difference(*same) is None
            continue
        assert end.value.code in (1, 3), f"{place}: {printed}"
        assert any(place.name in line for line in printed.splitlines()), f"{place}: {printed}"
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in ((0,) if of == "run" else (0, 1, 2)), "put back, it holds"
