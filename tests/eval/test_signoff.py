"""A sign-off: who may give one, what it rests on, and that one flipped bit of that is found and named."""

import base64
import json
import os
import shutil
from datetime import UTC, date, datetime

import pytest

from eval.core.errors import UserError
from eval.core.gate_file import OnTestSet
from eval.signoff.__main__ import verify
from eval.signoff.keys import new_key, private_key, public_key
from eval.signoff.statement import BEGIN, END, list_signoffs, read_statement
from eval.signoff.verify import problems, read_gate, row_of, signable_verdict
from tests.eval.run_builder import NOW, Run, edit, gate, sign
from tests.helpers import run as command

TODAY = NOW.date()


@pytest.fixture(scope="module")
def judged_folder(tmp_path_factory):
    """A run of one passing and one failing variant, with its gate, a report and a key; not yet signed."""
    folder = tmp_path_factory.mktemp("signed")
    run = Run(folder).make()
    gate(run)
    (run.path / "table.md").write_text("| int8 | PASS |\n")
    (run.path / "report.html").write_text(f"<p>{'PASS ' * 20}</p>\n{BEGIN}<strong>nobody yet</strong>{END}\n")
    new_key(folder / "key")
    return folder


@pytest.fixture
def fresh(judged_folder, tmp_path):
    """A copy in the same place below a new folder; its budget and recipes are still those of `made`."""
    shutil.copytree(judged_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("signoff"))
    return Run(tmp_path / "copy")


@pytest.fixture
def key(judged_folder):
    return judged_folder / "key"


def test_a_key_is_private_whole_and_never_overwritten(tmp_path):
    path = tmp_path / "keys" / "ada"
    key = new_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert private_key(path).public_key.keyid == public_key(tmp_path / "keys" / "ada.pub").keyid == key.keyid
    before = path.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        new_key(path)
    path.with_name("bob.pub").write_text("something")
    with pytest.raises(UserError, match=r"bob\.pub: is there already"):
        new_key(path.with_name("bob"))
    assert path.read_bytes() == before
    assert not path.with_name("bob").exists()
    path.chmod(0o640)
    with pytest.raises(UserError, match="mode 0640, others may read it"):
        private_key(path)


def test_a_file_that_is_no_key_is_refused(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(UserError, match="no such file"):
        private_key(path)
    new_key(path)
    with pytest.raises(UserError, match="no public key"):
        public_key(path)
    shutil.copy(path.with_name("key.pub"), path)
    path.chmod(0o600)
    with pytest.raises(UserError, match="no private key"):
        private_key(path)


def test_the_signature_is_that_of_the_dsse_specification(fresh, key):
    """Against the specification and OpenSSL's Ed25519, without the library that made it."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    outside = json.loads(sign(fresh, key).read_text())
    payload, kind = base64.b64decode(outside["payload"]), outside["payloadType"]
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    signature = base64.b64decode(outside["signatures"][0]["sig"])
    load_pem_public_key(key.with_name("key.pub").read_bytes()).verify(signature, message)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert [s["name"] for s in statement["subject"]] == [
        f"variants/int8/S1/s{i}/manifest.json" for i in range(4)
    ]


def test_what_is_signed_is_verified_and_shown(fresh, key, judged_folder):
    path = sign(fresh, key)
    statement, faults = problems(path, fresh.path, public_key(judged_folder / "key.pub"), TODAY)
    assert faults == []
    predicate = statement.predicate
    assert (predicate.by, predicate.verdict, predicate.recommended, predicate.waiver) == (
        "Ada",
        "PASS",
        True,
        None,
    )
    assert {"gate.json", "table.md", "report.html", "study.yaml", "data/manifest.json"} <= set(
        predicate.files
    )
    assert predicate.artifacts["S0/s3/int8"] == read_gate(fresh.path).provenance.artifacts["S0/s3/int8"]
    shown = list_signoffs(fresh.path, TODAY)
    assert [(s.predicate.by, s.problem) for s in shown] == [("Ada", None)]
    page = fresh.path / "report.html"
    page.write_text(page.read_text().replace("nobody yet", "signed by Ada"))
    assert problems(path, fresh.path, None, TODAY)[1] == [], "a report shows its own sign-off"


def test_a_payload_that_is_no_text_is_reported(fresh, key):
    path = sign(fresh, key)
    edit(path, lambda envelope: envelope.update(payload=5))
    assert "no DSSE envelope" in problems(path, fresh.path, None, TODAY)[1][0]


@pytest.mark.parametrize(
    "forged",
    [
        "<script>alert(1)</script>",
        "<!--><style>h1 { display: none }</style>-->",  # a comment to Python, a style to a browser
        "<!-- x --!><style>h1 { display: none }</style>-->",
        '<div class="hide">',  # hides the rest of the page
        '<li class="whole" style="position: fixed">',
        '<li class="whole">',
        "</section></header><h1>PASS",
        '<time datetime="x"onclick="y">now</time>',
        "<strong",
    ],
)
def test_a_report_shows_nothing_beside_its_sign_offs(fresh, key, forged):
    path, page = sign(fresh, key), fresh.path / "report.html"
    page.write_text(page.read_text().replace("nobody yet", forged))
    assert " among its sign-offs" in problems(path, fresh.path, None, TODAY)[1][0]


FILES = {
    "artifact": "variants/int8/S1/s2/model.safetensors",
    "manifest": "variants/int8/S1/s0/manifest.json",
    "control": "variants/int8/S0/s1/model.safetensors",
    "fallback": "base/s0/model.safetensors",
    "data": "data/model.safetensors",
    "score": "records/score/int8/S1-s1.json",
    "cost": "records/cost/cpu/int8/S1-s0.json",
    "another record": "records/score/plain/CE-s0.json",
    "budget": "../../budget.yaml",
    "gate": "gate.json",
    "table": "table.md",
    "report": "report.html",
    "study": "study.yaml",
    "sign-off": "signoff/int8-cpu.json",
}


@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
def test_one_flipped_bit_is_found_and_named(judged_folder, key, name):
    run = Run(judged_folder)  # in its own place: the budget and the recipes are files with absolute paths
    path = sign(run, key)
    spoiled = (run.path / name).resolve()
    was = spoiled.stat()
    content = bytearray(spoiled.read_bytes())
    original = bytes(content)
    content[len(content) // 2] ^= 1
    spoiled.write_bytes(content)
    try:
        statement, faults = problems(path, run.path, None, TODAY)
    finally:
        spoiled.write_bytes(original)
        os.utime(spoiled, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert faults
    if name.startswith("signoff"):
        assert statement is None
    else:
        assert any(spoiled.name in text for text in faults), faults
    assert problems(path, run.path, None, TODAY)[1] == [], "repaired, it holds again"


def test_a_file_that_is_gone_or_came_later_is_named(fresh, key):
    path = sign(fresh, key)
    (fresh.path / "table.md").unlink()
    assert problems(path, fresh.path, None, TODAY)[1] == ["table.md is missing"]
    shutil.copy(fresh.path / "report.html", fresh.path / "variants/int8/S1/s0/extra")
    faults = problems(path, fresh.path, None, TODAY)[1]
    assert any("unrecorded file extra" in text for text in faults)
    fresh.cost("int8", 0.6, target="gpu")
    assert any("records/cost/gpu/int8/S1-s0.json" in t for t in problems(path, fresh.path, None, TODAY)[1])


def test_only_the_trusted_key_is_trusted(fresh, key, tmp_path):
    path = sign(fresh, key)
    other = new_key(tmp_path / "other")
    _, faults = problems(path, fresh.path, other, TODAY)
    assert "not the trusted" in faults[0]
    outside = json.loads(path.read_text())
    stolen = json.loads(sign(fresh, tmp_path / "other").read_text())
    outside["signatures"] = stolen["signatures"]
    path.write_text(json.dumps(outside, indent=1) + "\n")
    with pytest.raises(UserError, match="does not fit the bytes"):
        read_statement(path)


def test_what_did_not_pass_needs_a_waiver_which_ends(fresh, key):
    with pytest.raises(UserError, match="the verdict is FAIL"):
        sign(fresh, key, "half")
    for day in ("2026-06-01", "2025-01-01", "soon"):
        with pytest.raises(UserError, match="--expires"):
            sign(fresh, key, "half", waive="a demonstration", expires=day)
    with pytest.raises(UserError, match="the verdict is PASS"):
        sign(fresh, key, waive="why not", expires="2026-07-01")
    path = sign(fresh, key, "half", waive="a demonstration", expires="2026-07-01")
    assert problems(path, fresh.path, None, date(2026, 7, 1))[1] == []
    assert problems(path, fresh.path, None, date(2026, 7, 2))[1] == ["the waiver expired on 2026-07-01"]
    assert list_signoffs(fresh.path, date(2026, 7, 2))[0].problem == "the waiver expired on 2026-07-01"


def test_what_was_not_measured_cannot_be_signed(fresh, key):
    with pytest.raises(UserError, match=r"half was not measured on gpu: run python -m eval\.cost"):
        sign(fresh, key, "half", "gpu", waive="we have none", expires="2026-07-01")
    with pytest.raises(UserError, match="did you mean 'int8'"):
        sign(fresh, key, "int9")


def test_a_gate_that_the_records_do_not_give_is_refused(fresh, key):
    def better(value):
        row = next(row for row in value["variants"] if row["recipe"] == "half")
        row["verdict"] = "PASS"

    edit(fresh.path / "gate.json", better)
    with pytest.raises(UserError, match=r"verdict is 'PASS', the records give 'FAIL'"):
        sign(fresh, key, "half")


def test_a_report_of_an_older_gate_is_not_signed(fresh, key):
    os.utime(fresh.path / "table.md", (0, 0))
    with pytest.raises(UserError, match=r"table\.md: older than gate\.json"):
        sign(fresh, key)


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
            {"number": n, "time": "", "by": "Ada", "reason": None, "recipe": r, "verdict": v, "same": s}
            for n, (r, v, s) in enumerate(looks, start=1)
        ]
        on_test_set = OnTestSet(**nothing, **last, openings=len(looks), history=history)
        return signable_verdict(gate.model_copy(update={"test_set": on_test_set}), row)[0]

    assert signed(("int8", "FAIL", True)) == "FAIL"
    assert signed(("int8", "FAIL", True), ("half", "PASS", True)) == "FAIL", "hidden by a later look"
    assert signed(("int8", "FAIL", True), ("int8", "PASS", True)) == "FAIL", "looked at until it passed"
    assert signed(("int8", None, True), ("int8", "PASS", True)) == "PASS", "cut short, then finished"
    assert signed(("int8", None, True)) == "INCONCLUSIVE", "opened and not finished"
    assert signed(("int8", "PASS", True)) == "PASS"
    assert signed(("half", "FAIL", True)) == "PASS", "of another variant"
    assert signed(("int8", "FAIL", False)) == "PASS", "of earlier artifacts"


def test_a_clock_that_went_back_is_refused(fresh, key):
    with pytest.raises(UserError, match="set the clock"):
        sign(fresh, key, now=datetime(2025, 12, 31, tzinfo=UTC))


def test_a_sign_off_of_an_older_gate_is_shown_as_such(fresh, key):
    sign(fresh, key)
    (fresh.path / "gate.json").write_text("{}")
    assert list_signoffs(fresh.path, TODAY)[0].problem == "gate.json is not the one that was signed"


def test_the_command_line(judged_folder, tmp_path):
    run = Run(judged_folder)
    mine = tmp_path / "mine"
    done = command("-m", "eval.signoff", "--new-key", mine)
    assert done.returncode == 0, done.stderr
    secret = b"".join(mine.read_bytes().splitlines()[1:-1]).decode()
    given = ["-m", "eval.signoff", "--study", run.path]
    done = command(*given, "--variant", "int8", "--by", "Ada", "--key", mine)
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    done = command(*given, "--verify", "--public", tmp_path / "mine.pub")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS of int8 on cpu, signed by Ada" in done.stdout


def test_verify_says_what_is_broken(fresh, key, capsys):
    from rich.console import Console

    with pytest.raises(UserError, match="there are none"):
        verify(fresh.path, None, TODAY, Console())
    sign(fresh, key)
    sign(fresh, key, "half", waive="a demonstration", expires="2026-07-01")
    assert verify(fresh.path, None, TODAY, Console()) == []
    output = capsys.readouterr().out
    assert "give --public FILE" in output
    assert "waived until 2026-07-01: a demonstration" in output
    (fresh.path / "table.md").write_text("| int8 | FAIL |\n")
    broken = verify(fresh.path, None, TODAY, Console())
    assert len(broken) == 2
    assert all("table.md has sha256" in text for text in broken)
    assert "table.md has sha256" in capsys.readouterr().out
