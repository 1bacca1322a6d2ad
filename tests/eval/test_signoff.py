"""A sign-off: who may give one, what it rests on, and that one flipped bit of that is found and named."""

import base64
import json
import os
import shutil
from datetime import UTC, date, datetime

import pytest
import yaml

from eval.core.errors import UserError
from eval.core.gate_file import GateFile, OnTestSet, read_gate
from eval.signoff.figures import figures_of, first_difference
from eval.signoff.keys import allowed_signer, new_key, public_key, read_trusted
from eval.signoff.statement import TEST_RESULT, read_bundle
from eval.signoff.verify import REPORTS, Rerun, problems, row_of, signable_verdict
from tests.eval.run_builder import NOW, Run, edit, gate, report, sign
from tests.eval.test_beside_the_verdict import put_teacher
from tests.helpers import run as command

TODAY = NOW.date()


@pytest.fixture(scope="module")
def judged_folder(tmp_path_factory):
    """A run of one passing and one failing variant, with its gate, its reports and keys; not yet signed."""
    folder = tmp_path_factory.mktemp("signed")
    run = Run(folder)
    run.budget["waivers"] = {"signatures": 2, "days": 30}
    run.budget["targets"]["cpu"]["limits"]["prefill_p50"] = {"at_most": 50, "unit": "ms"}
    run.make()
    put_teacher(run)
    gate(run)
    report(run)
    new_key(folder / "key")
    new_key(folder / "second")
    return folder


def faults(path, run, *trusted, today=TODAY):
    """All that speaks against a sign-off; trusted are files of public keys."""
    return problems(path, Rerun(run.path), read_trusted(trusted), today)[1]


@pytest.fixture
def pub(judged_folder):
    return judged_folder / "key.pub"


@pytest.fixture
def second(judged_folder):
    return judged_folder / "second"


@pytest.fixture
def fresh(judged_folder, tmp_path):
    """A copy in the same place below a new folder; its budget and recipes are still those of `made`."""
    shutil.copytree(judged_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("signoff", *REPORTS))
    return Run(tmp_path / "copy")


@pytest.fixture
def reported(judged_folder, fresh):
    """The same with its reports: to render them again takes a second at each signature."""
    for name in REPORTS:
        shutil.copy(Run(judged_folder).path / name, fresh.path)
    return fresh


@pytest.fixture(scope="module")
def signed(judged_folder):
    """The run in its own place, since recipes are files with absolute paths, and its signature."""
    run = Run(judged_folder)
    return run, sign(run, judged_folder / "key")


@pytest.fixture
def key(judged_folder):
    return judged_folder / "key"


def test_the_signature_is_that_of_the_dsse_specification(fresh, key):
    """Against the specification and OpenSSL's Ed25519, without the library that made it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    first, last = sign(fresh, key).read_text().splitlines()
    outside = json.loads(first)
    payload, kind = base64.b64decode(outside["payload"]), outside["payloadType"]
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    signature = base64.b64decode(outside["signatures"][0]["sig"])
    load_pem_public_key(key.with_name("key.pub").read_bytes()).verify(signature, message)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [s["name"] for s in statement["subject"]] == [
        f"variants/int8/S1/s{i}/manifest.json" for i in range(4)
    ]
    result = json.loads(base64.b64decode(json.loads(last)["payload"]))
    assert (result["predicateType"], result["predicate"]["result"]) == (TEST_RESULT, "PASSED")
    assert {"retention", "cost:decode_p50"} <= set(result["predicate"]["passedTests"])
    assert result["subject"] == statement["subject"]


def test_what_is_signed_is_verified_and_is_figures_and_versions(reported, key, pub):
    path = sign(reported, key)
    (one,), found = problems(path, Rerun(reported.path), read_trusted([pub]), TODAY)
    assert found == []
    said = one.predicate
    assert (one.holder, said.by, said.verdict, said.recommended, said.waiver) == (
        "key", "Ada", "PASS", True, None,
    )  # fmt: skip
    assert {"plan.json", "gate.json", "report.html", "study.yaml", "data/manifest.json"} <= set(said.files)
    assert said.artifacts["S0/s3/int8"] == read_gate(reported.path).provenance.artifacts["S0/s3/int8"]
    assert said.figures["row"]["holm_p"] == row_of(read_gate(reported.path), "int8", "cpu").holm_p
    assert (said.versions.generator, said.versions.project) == ("Philox", "0.3.0")
    assert said.versions.numpy
    assert said.versions.scipy
    assert (said.policy.fixed, said.judged.number) == (True, 1)


def test_a_recipe_or_a_slice_called_how_is_compared_like_any_other(judged_folder):
    gate = read_gate(Run(judged_folder).path)
    row = gate.variants[0]
    named = gate.model_copy(update={"documents": {**gate.documents, "how": 3}})
    other = gate.model_copy(update={"documents": {**gate.documents, "how": 4}})
    assert "documents.how is 3" in first_difference(figures_of(named), figures_of(other))
    scored = row.model_copy(update={"scores": {"how": row.scores["far"]}, "how": "absorb cost"})
    assert figures_of(scored)["scores"]["how"]["point"] == row.scores["far"].point
    assert "how" not in figures_of(scored)


def test_other_words_and_another_random_stream_break_nothing(fresh, key, pub, monkeypatch):
    """As a later version of the project would tell the same verdict."""
    path = sign(fresh, key)
    original = GateFile.model_copy

    def reworded(self, update=None, **given):
        copy = original(self, update=update, **given)
        if update and "runs" in update:
            object.__setattr__(copy, "reason", "the same in other words")
            object.__setattr__(copy.variants[1].kept_share, "bootstrap_low", 0.123)
        return copy

    monkeypatch.setattr(GateFile, "model_copy", reworded)
    for seed in ("eval.stats.quantiles.SEED", "eval.gate.quality.BOOTSTRAP_SEED"):
        monkeypatch.setattr(seed, 1)
    before, now = read_gate(fresh.path), Rerun(fresh.path).now
    costs = [row_of(one, "int8", "cpu").cost["prefill_p50"] for one in (before, now)]
    parts = [next(p for p in row_of(one, "int8", "cpu").parts if p.unit == "ms") for one in (before, now)]
    assert costs[0].value == costs[1].value
    assert costs[0].upper != costs[1].upper, "it is drawn"
    assert (parts[0].name, parts[0].verdict) == ("cost:prefill_p50", parts[1].verdict)
    assert parts[0].high != parts[1].high
    assert faults(path, fresh, pub) == []
    gate(fresh)
    assert "the same in other words" in (fresh.path / "gate.json").read_text()
    report(fresh)
    assert faults(path, fresh, pub) == [], "gate.json and its reports were written anew by that version"
    (fresh.folder / "budget.yaml").write_text("# a comment\n" + yaml.safe_dump(fresh.budget))
    assert faults(path, fresh, pub) == []


def test_a_line_that_is_no_envelope_is_reported(fresh, key, pub):
    path = sign(fresh, key)
    lines = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(lines[0]) | {"payload": 5}) + f"\n{lines[1]}\n")
    assert "line 1: no DSSE envelope" in faults(path, fresh, pub)[0]


FILES = {
    "artifact": "variants/int8/S1/s2/model.safetensors",
    "manifest": "variants/int8/S1/s0/manifest.json",
    "manifest of a rival": "students/CE/s0/manifest.json",
    "control": "variants/int8/S0/s1/model.safetensors",
    "fallback": "base/s0/model.safetensors",
    "teacher": "method/T1/s0/fitted",
    "manifest of a teacher": "method/T1/s0/manifest.json",
    "data": "data/model.safetensors",
    "score": "records/score/int8/S1-s1.json",
    "cost": "records/cost/cpu/int8/S1-s0.json",
    "another record": "records/score/plain/CE-s0.json",
    "gate": "gate.json",
    "table": "table.md",
    "report": "report.html",
    "study": "study.yaml",
    "sign-off": "signoff/int8@cpu.intoto.jsonl",
    "plan": "plan.json",
    "verdicts": "gate-runs.jsonl",
}


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
def test_one_flipped_bit_is_found_and_named(signed, pub, name):
    run, path = signed
    spoiled = (run.path / name).resolve()
    was = spoiled.stat()
    content = bytearray(spoiled.read_bytes())
    original = bytes(content)
    content[len(content) // 2] ^= 1
    spoiled.write_bytes(content)
    try:
        found = faults(path, run, pub)
    finally:
        spoiled.write_bytes(original)
        os.utime(spoiled, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert any(spoiled.name in text or text.startswith("line ") for text in found), found
    assert faults(path, run, pub) == [], "repaired, it holds again"


def test_a_report_that_was_forged_is_refused_before_and_after_it_is_signed(reported, key, pub):
    page = reported.path / "report.html"
    whole = page.read_text()
    forged = whole.replace("</h1>", "</h1><h1>PASS: ship everything</h1>", 1)
    page.write_text(forged)
    with pytest.raises(
        UserError, match=r"report.html: line \d+ is not what gate.json gives: '.*ship everything"
    ):
        sign(reported, key)
    page.write_text(whole)
    path = sign(reported, key)
    page.write_text(forged)
    assert any(
        "report.html: line" in text and "ship everything" in text for text in faults(path, reported, pub)
    )
    edit(reported.path / "gate.json", lambda g: g.update(reason="ship everything"))
    report(reported)
    assert any("gate.json: reason is 'ship everything'" in text for text in faults(path, reported, pub))


def test_a_file_that_is_gone_or_came_later_is_named(reported, key, pub):
    path = sign(reported, key)
    (reported.path / "table.md").unlink()
    assert faults(path, reported, pub) == ["table.md is missing"]
    shutil.copy(reported.path / "report.html", reported.path / "variants/int8/S1/s0/extra")
    assert any("unrecorded file extra" in text for text in faults(path, reported, pub))
    reported.cost("int8", 0.6, target="gpu")
    assert any("records/cost/gpu/int8/S1-s0.json" in text for text in faults(path, reported, pub))


def test_signatures_are_added_and_none_can_be_taken_away(fresh, key, second, pub):
    path = sign(fresh, key)
    first = path.read_text()
    sign(fresh, second, by="Bob")
    assert path.read_text().startswith(first)
    assert faults(path, fresh, pub, second.with_name("second.pub")) == []
    assert "line 3: signed with the unknown key" in faults(path, fresh, pub)[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[2:]))
    assert "one was wiped" in faults(path, fresh, second.with_name("second.pub"))[0]
    path.write_text("".join([*lines[:2], lines[0], lines[3]]))
    assert "line 3: is not linked" in faults(path, fresh, pub)[0]
    path.write_text("".join([lines[0], lines[3], *lines[2:]]))
    assert "line 2: is not the result of the line before" in faults(path, fresh, pub)[0]
    path.write_text(lines[0])
    assert "1 lines, two for each signature" in faults(path, fresh, pub)[0]


def test_who_signs_again_takes_back_what_was_signed_before(fresh, key, pub):
    path = sign(fresh, key)
    fresh.cost("half", 0.9)
    gate(fresh)
    report(fresh)
    assert faults(path, fresh, pub) != []
    sign(fresh, key, by="Ada again")
    assert [one.predicate.by for one in read_bundle(path)] == ["Ada", "Ada again"]
    assert faults(path, fresh, pub) == []


def test_only_keys_that_are_named_are_trusted(fresh, key, pub, second, tmp_path):
    path = sign(fresh, second)
    assert "signed with the unknown key" in faults(path, fresh, pub)[0], "another's sign-off in its place"
    allowed = tmp_path / "allowed"
    names = {"ada@example.org": pub, "Bob B.": second.with_name("second.pub")}
    lines = [allowed_signer(name, public_key(place)) for name, place in names.items()]
    allowed.write_text("# who may sign\n" + "\n".join(lines) + "\n")
    assert {one.name for one in read_trusted([allowed]).values()} == set(names)
    assert faults(path, fresh, allowed) == []
    allowed.write_text("ada ssh-ed25519 nonsense\n")
    with pytest.raises(UserError, match="allowed: line 1: no allowed signer"):
        read_trusted([allowed])
    with pytest.raises(UserError, match="no key"):
        read_trusted([])
    envelope, result = path.read_text().splitlines()
    stolen = json.loads(sign(fresh, key, "half", waive="x", expires="2026-06-20").read_text().splitlines()[0])
    forged = json.loads(envelope) | {"signatures": stolen["signatures"]}
    path.write_text(f"{json.dumps(forged)}\n{result}\n")
    with pytest.raises(UserError, match="does not fit the bytes"):
        read_bundle(path)


def test_what_did_not_pass_needs_a_waiver_which_ends_and_as_many_keys_as_the_budget_says(
    fresh, key, second, pub
):
    with pytest.raises(UserError, match="the verdict is FAIL"):
        sign(fresh, key, "half")
    for day in ("2026-06-01", "2025-01-01", "soon"):
        with pytest.raises(UserError, match="--expires"):
            sign(fresh, key, "half", waive="a demonstration", expires=day)
    with pytest.raises(UserError, match="the budget allows 30 days: give a day up to 2026-07-01"):
        sign(fresh, key, "half", waive="a demonstration", expires="9999-12-31")
    with pytest.raises(UserError, match="the verdict is PASS"):
        sign(fresh, key, waive="why not", expires="2026-07-01")
    path = sign(fresh, key, "half", waive="a demonstration", expires="2026-07-01")
    both = pub, second.with_name("second.pub")
    assert faults(path, fresh, *both) == ["the waiver has 1 of 2 signatures that the budget asks"]
    sign(fresh, key, "half", waive="a demonstration", expires="2026-07-01")
    assert "1 of 2 signatures" in faults(path, fresh, *both)[0], "one key is one signature"
    with pytest.raises(UserError, match="Ada signed until 2026-07-01; give 2026-07-01"):
        sign(fresh, second, "half", by="Bob", waive="a demonstration", expires="2026-06-30")
    sign(fresh, second, "half", by="Bob", waive="a demonstration", expires="2026-07-01")
    assert faults(path, fresh, *both, today=date(2026, 7, 1)) == []
    found = faults(path, fresh, *both, today=date(2026, 7, 2))
    assert [text.partition(": ")[2] for text in found] == ["the waiver expired on 2026-07-01"] * 2


def test_a_waiver_to_the_year_9999_that_was_signed_all_the_same_does_not_hold(fresh, key, pub, monkeypatch):
    monkeypatch.setattr("eval.signoff.__main__.last_day", lambda *_: date.max)
    path = sign(fresh, key, "half", waive="for ever", expires="9999-12-31")
    assert "the waiver ends on 9999-12-31, the budget allows 2026-07-01 at latest" in faults(path, fresh, pub)


def test_what_was_not_measured_cannot_be_signed(fresh, key):
    with pytest.raises(UserError, match=r"half was not measured on gpu: run absorb cost"):
        sign(fresh, key, "half", "gpu", waive="we have none", expires="2026-06-20")
    with pytest.raises(UserError, match="did you mean 'int8'"):
        sign(fresh, key, "int9")


def test_a_gate_that_the_records_do_not_give_is_refused(fresh, key):
    def better(value):
        row = next(row for row in value["variants"] if row["recipe"] == "half")
        row["verdict"] = "PASS"

    edit(fresh.path / "gate.json", better)
    with pytest.raises(UserError, match=r"verdict is 'PASS', the records give 'FAIL'"):
        sign(fresh, key, "half")


def test_what_is_signed_is_stricter_than_a_row(judged_folder):
    gate = read_gate(Run(judged_folder).path)
    row = row_of(gate, "int8", "cpu")
    assert signable_verdict(gate, row)[0] == "PASS"
    assert signable_verdict(gate, row.model_copy(update={"holm_p": 0.2}))[0] == "INCONCLUSIVE", (
        "as a pick among several"
    )
    nothing = dict.fromkeys(("target", "documents", "teacher_gain", "kept_share", "guard_share"))
    last = {"time": "", "by": "Ada", "recipe": "half", "current": False, "verdict": "PASS", "parts": []}

    def signed(*looks):
        history = [
            {"number": n, "time": "", "by": "Ada", "reason": None, "recipe": r, "verdict": v, "seen": s}
            for n, (r, v, s) in enumerate(looks, start=1)
        ]
        on_test_set = OnTestSet(**nothing, **last, openings=len(looks), history=history)
        return signable_verdict(gate.model_copy(update={"test_set": on_test_set}), row)[0]

    assert signed(("int8", "FAIL", ["int8"])) == "FAIL"
    assert signed(("int8", "FAIL", ["int8"]), ("half", "PASS", ["half"])) == "FAIL", "hidden by a later look"
    assert signed(("int8", "FAIL", ["int8"]), ("int8", "PASS", ["int8"])) == "FAIL", "looked at twice"
    assert signed(("int8", None, ["int8"]), ("int8", "PASS", ["int8"])) == "PASS", "cut short, then finished"
    assert signed(("int8", None, ["int8"])) == "INCONCLUSIVE", "opened and not finished"
    assert signed(("int8", "PASS", ["int8"])) == "PASS"
    assert signed(("half", "FAIL", ["half"])) == "PASS", "of another variant"
    assert signed(("int8", "FAIL", [])) == "PASS", "of earlier artifacts"


def test_a_clock_that_went_back_is_refused(fresh, key):
    with pytest.raises(UserError, match="set the clock"):
        sign(fresh, key, now=datetime(2025, 12, 31, tzinfo=UTC))


def test_the_command_line(judged_folder, tmp_path):
    run = Run(judged_folder)
    shutil.rmtree(run.path / "signoff", ignore_errors=True)
    mine = tmp_path / "mine"
    done = command("-m", "eval.signoff", "--new-key", mine, "--by", "Ada <script>")
    assert done.returncode == 0, done.stderr
    assert "for a file of allowed signers: 'Ada <script>' ssh-ed25519 " in done.stdout
    secret = b"".join(mine.read_bytes().splitlines()[1:-1]).decode()
    given = ["-m", "eval.signoff", "--study", run.path]
    done = command(*given, "--variant", "int8", "--by", "Ada <script>", "--key", mine)
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    page = (run.path / "signoff/index.html").read_text()
    assert "signed by Ada &lt;script&gt;" in page
    assert "Whose the keys are was not looked at." in page
    done = command(*given, "--verify")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "--public: missing" in done.stderr
    done = command(*given, "--verify", "--public", tmp_path / "mine.pub")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS of int8 on cpu, signed by Ada <script>" in done.stdout
    assert "of <code>" not in (run.path / "signoff/index.html").read_text()
    (run.path / "table.csv").write_text("recipe\n")
    done = command(*given, "--verify", "--public", tmp_path / "mine.pub")
    assert done.returncode == 1
    assert "table.csv: line 1 is not what gate.json gives: 'recipe'" in done.stdout
    assert "Does not hold" in (run.path / "signoff/index.html").read_text()
    report(run)
