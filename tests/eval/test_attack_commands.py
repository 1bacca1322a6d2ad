"""Attacks on a run that was signed, by the real command line: each is told in a line that names the place."""

from pathlib import Path

import pytest

from eval.gate.history import write_opening
from eval.signoff.keys import new_key
from tests.eval.run_builder import Run, an_opening, copy_run, edit, report
from tests.helpers import run as command

BUNDLE = "signoff/int8@cpu.intoto.jsonl"


def signoff(run: Run, *words: object):
    return command("-m", "eval.signoff", "--study", run.path, *words)


def sign(run: Run, by: str) -> None:
    done = signoff(run, "--variant", "int8", "--by", by, "--key", run.folder / by)
    assert done.returncode == 0, done.stderr


def verify(run: Run):
    return signoff(run, "--verify", "--public", run.folder / "ada.pub", run.folder / "bob.pub")


@pytest.fixture(scope="module")
def signed_folder(tmp_path_factory) -> Path:
    """A run with a verdict, an opening of its test documents, reports, and int8 signed by Ada."""
    run = Run(tmp_path_factory.mktemp("attacked"))
    run.budget["waivers"] = {"signatures": 2, "days": 30}
    run.make()
    assert run.gate().returncode == 0
    write_opening(run.path, an_opening(run, 1))
    assert run.gate().returncode == 0
    report(run)
    for name in ("ada", "bob", "mallory"):
        new_key(run.folder / name)
    sign(run, "ada")
    done = verify(run)
    assert done.returncode == 0, done.stdout + done.stderr
    return run.folder


@pytest.fixture
def run(signed_folder, tmp_path) -> Run:
    return copy_run(signed_folder, tmp_path)


def replace_signoff(run: Run) -> None:
    (run.path / BUNDLE).unlink()
    sign(run, "mallory")


def take_away(run: Run) -> None:
    sign(run, "bob")
    lines = (run.path / BUNDLE).read_text().splitlines(keepends=True)
    (run.path / BUNDLE).write_text("".join(lines[2:]))


def replace(name: str, old: str, new: str):
    def attack(run: Run) -> None:
        text = (run.path / name).read_text()
        assert old in text
        (run.path / name).write_text(text.replace(old, new, 1))

    return attack


def link_weights(run: Run) -> None:
    weights = run.path / "variants/int8/S1/s1/model.safetensors"
    weights.rename(run.folder / "weights")
    weights.symlink_to(run.folder / "weights")


def better(gate: dict) -> None:
    next(row for row in gate["variants"] if row["recipe"] == "half")["verdict"] = "PASS"


# What is done to the run -> words that stand in one line of what `--verify` says.
ATTACKS = {
    "sign-off overwritten": (replace_signoff, ["line 1: signed with the unknown key"]),
    "sign-off of an unknown key added": (
        lambda run: sign(run, "mallory"),
        ["line 3: signed with the unknown key", "trusted: ada"],
    ),
    "first sign-off taken away": (take_away, ["line 1: is not linked to the lines before it"]),
    "budget edited": (replace("plan.json", '"f": 0.5', '"f": 0.1'), ["plan.json has sha256"]),
    "report forged": (
        replace("report.html", "</h1>", "</h1><h1>PASS: ship everything</h1>"),
        ["report.html: line", "ship everything"],
    ),
    "table forged": (replace("table.csv", "FAIL", "PASS"), ["table.csv: line"]),
    "verdict forged": (
        lambda run: edit(run.path / "gate.json", better),
        ["gate.json", "verdict is 'PASS', the records give 'FAIL'"],
    ),
    "opening wiped": (
        lambda run: (run.path / "records/test/opening-1.json").unlink(),
        ["records/test/opening-1.json is missing"],
    ),
    "counts of a record edited": (
        lambda run: edit(run.path / "records/cost/cpu/int8/S1-s0.json", lambda r: r.update(disk_bytes=1)),
        ["records/cost/cpu/int8/S1-s0.json has sha256"],
    ),
    "weights of a signed artifact replaced": (
        replace("variants/int8/S1/s1/model.safetensors", "v", "w"),
        ["variants/int8/S1/s1", "model.safetensors has sha256"],
    ),
    "weights of another artifact replaced": (
        replace("variants/half/S0/s2/model.safetensors", "v", "w"),
        ["variants/half/S0/s2", "model.safetensors has sha256"],
    ),
    "a link planted": (link_weights, ["variants/int8/S1/s1", "model.safetensors is a link"]),
    "code planted": (
        lambda run: (run.path / "variants/int8/S1/s0/modeling.py").write_text("import os"),
        ["variants/int8/S1/s0", "unrecorded file modeling.py"],
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_verify_tells_it_in_one_line(run, name):
    attack, words = ATTACKS[name]
    attack(run)
    done = verify(run)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert any(all(word in line for word in words) for line in lines), done.stdout
    assert "Traceback" not in done.stderr


def refused(done, *words: str) -> None:
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stdout + done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_a_waiver_to_the_year_9999_is_refused(run):
    given = ["--variant", "half", "--by", "Ada", "--key", run.folder / "ada", "--waive", "for ever"]
    refused(
        signoff(run, *given, "--expires", "9999-12-31"), "--expires: 9999-12-31", "the budget allows 30 days"
    )


def test_a_forged_report_is_not_signed_and_what_an_unknown_key_signed_is_not_released(run):
    words = ["--study", run.path, "--variant", "int8", "--owner", "Ada", "--key", run.folder / "mallory"]
    released = command("-m", "eval.release", *words, "--public", run.folder / "mallory.pub")
    refused(released, BUNDLE, "signed with the unknown key")
    ATTACKS["report forged"][0](run)
    given = ["--variant", "int8", "--by", "ada", "--key", run.folder / "ada"]
    refused(signoff(run, *given), "report.html: line", "ship everything")


def test_a_key_of_p256_signs_and_is_trusted_by_its_line_of_allowed_signers(run):
    """The kind of key that a model signature of OpenSSF needs."""
    made = command(
        "-m", "eval.signoff", "--new-key", run.folder / "grace", "--by", "Grace H.", "--kind", "p256"
    )
    assert made.returncode == 0, made.stderr
    sign(run, "grace")
    line = made.stdout.splitlines()[-1].partition(": ")[2]
    assert line.startswith("'Grace H.' ecdsa-sha2-nistp256 ")
    (run.folder / "allowed").write_text(line + "\n")
    both = [run.folder / "ada.pub", run.folder / "allowed"]
    done = signoff(run, "--verify", "--public", *both)
    assert done.returncode == 0, done.stdout
    assert "with the key of Grace H." in done.stdout
