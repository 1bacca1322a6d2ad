"""What is signed, read by the in-toto Attestation Framework's own classes (protobuf): no parser of ours."""

import base64
import json

import pytest
from google.protobuf.json_format import ParseDict, ParseError
from in_toto_attestation.predicates.test_result.v0 import test_result_pb2 as result_pb2
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message

from eval.core.gate_file import read_gate


def payload(line: str) -> dict:
    return json.loads(base64.b64decode(json.loads(line)["payload"]))


def read(text: dict) -> Message:
    """As its library reads and validates a statement; a field that the framework does not have is refused."""
    statement = Statement.copy_from_pb(ParseDict(text, Message()))
    statement.validate()
    return statement.pb


def test_a_sign_off_is_two_statements_and_the_second_a_test_result(released_run):
    lines = (released_run.path / "signoff/small@cpu.intoto.jsonl").read_text().splitlines()
    ours, theirs = (read(payload(line)) for line in lines)
    assert [one.name for one in ours.subject] == [one.name for one in theirs.subject]
    assert all(len(one.digest["sha256"]) == 64 for one in theirs.subject)
    assert theirs.predicate_type == "https://in-toto.io/attestation/test-result/v0.1"
    result = ParseDict(payload(lines[1])["predicate"], result_pb2.TestResult())
    parts = next(v for v in read_gate(released_run.path).variants if v.recipe == "small").parts
    assert result.result == "PASSED"
    assert list(result.passed_tests) == [part.name for part in parts]
    assert not [*result.warned_tests, *result.failed_tests]
    (budget,) = result.configuration
    assert (budget.name, dict(budget.digest)) == (
        "test", {"sha256": read_gate(released_run.path).budget["hash"]},
    )  # fmt: skip
    with pytest.raises(ParseError, match='no field named "figures"'):
        ParseDict({**payload(lines[1])["predicate"], "figures": {}}, result_pb2.TestResult())


def test_the_signature_of_a_release_is_a_statement_of_all_its_files(release):
    signed = read(payload((release / "signature.json").read_text()))
    named = {one.name: one.digest["sha256"] for one in signed.subject}
    listed = json.loads((release / "manifest.json").read_text())["files"]
    assert set(named) == {*listed, "manifest.json"}
    assert all(named[name] == entry["sha256"] for name, entry in listed.items())
