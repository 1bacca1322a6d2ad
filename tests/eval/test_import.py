"""Scores made elsewhere enter the same gate: exported documents come back as a record, or are refused by name."""

import json
import math
import subprocess
import sys
from importlib import import_module

import pytest

from eval.core.artifacts import read_manifest
from eval.core.config import ROOT
from eval.core.documents import read_documents
from eval.core.errors import UserError
from eval.core.records import read_scores
from eval.core.study import load_study
from eval.gate.decision import judge
from eval.score.scoring import score_folder
from tests.eval.run_builder import Run, change_score, fake_run

importing = import_module("eval.score.import")  # a keyword: `python -m` alone takes it


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eval.score.import", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run, what eval.score says of its student, and the same as a file of another program."""
    study, run = fake_run(tmp_path_factory.mktemp("import"), seeds=[0])
    exported = run.parent / "documents.jsonl"
    done = command("--study", run, "--export", exported)
    assert done.returncode == 0, done.stderr
    score_folder(run, load_study(study), run / "students/S1/s0")
    (own,) = read_scores(run)
    (run / "records/score/plain/S1-s0.json").unlink()
    rows = [json.loads(line) for line in exported.read_text().splitlines()]
    columns = own.documents
    bits = dict(zip(zip(columns.slice, columns.id, strict=True), columns.bits, strict=True))
    for row in rows:
        row["nats"] = bits[row["slice"], row["id"]] * math.log(2)
    return run, own, rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(run, **changes):
    artifact = read_manifest(run / "students/S1/s0").hash
    return {"arm": "S1", "seed": 0, "recipe": "plain", "artifact": artifact, "by": "vllm 0.11", **changes}


def test_what_another_program_scored_becomes_the_record_that_this_one_would_write(scored, tmp_path):
    run, own, rows = scored
    facts = given(run)
    words = [word for name in ("arm", "seed", "artifact", "by") for word in (f"--{name}", facts[name])]
    done = command("--study", run, *words, write(tmp_path / "s1.jsonl", reversed(rows)))
    assert done.returncode == 0, done.stderr
    (record,) = read_scores(run)
    (run / "records/score/plain/S1-s0.json").unlink()
    assert (record.by, record.engine, record.provenance.machine.host) == ("vllm 0.11", "torch", "elsewhere")
    theirs, ours = record.documents, own.documents
    assert (theirs.id, theirs.slice, theirs.bytes, theirs.cluster) == (
        ours.id,
        ours.slice,
        ours.bytes,
        ours.cluster,
    )
    assert theirs.bits == pytest.approx(ours.bits)
    assert record.provenance.artifact == own.provenance.artifact


def test_the_export_has_the_documents_that_decide_and_none_of_the_test_documents(scored):
    run, own, rows = scored
    assert [(row["slice"], row["id"]) for row in rows] == [
        *zip(own.documents.slice, own.documents.id, strict=True)
    ]
    assert not {row["text"] for row in rows} & {one.text for one in read_documents(run / "data", "test")}


def test_log_probabilities_and_samples_of_the_harness_are_the_same_scores(scored, tmp_path):
    run, own, rows = scored
    study = load_study(run)
    named = [{name: row[name] for name in ("slice", "id", "sha256", "text")} for row in rows]
    pieces = [
        {**doc, "logprobs": [None, -row["nats"] / 4, -row["nats"] * 3 / 4]}
        for doc, row in zip(named, rows, strict=True)
    ]
    samples = [
        {"doc_id": i, "doc": doc, "filtered_resps": [-row["nats"]]}
        for i, (doc, row) in enumerate(zip(named, rows, strict=True))
    ]
    for name, lines in {"pieces": pieces, "samples": samples}.items():
        record = importing.import_scores(study, write(tmp_path / f"{name}.jsonl", lines), **given(run))
        assert record.documents.bits == pytest.approx(own.documents.bits)
        if name == "pieces":
            assert set(record.documents.tokens) == {2}, "those that are predicted"


def test_a_rolling_likelihood_of_a_document_with_a_prompt_is_refused(tmp_path):
    """The harness has no prompt there: its bits would count, or the text would be scored without it."""
    path, run = fake_run(tmp_path, seeds=[0])
    texts = run / "data/validation.jsonl"
    documents = [json.loads(line) for line in texts.read_text().splitlines()]
    write(texts, [{**documents[0], "prompt": "what is asked: "}, *documents[1:]])
    study, named = load_study(path), ("slice", "id", "sha256")
    rows = [json.loads(line) for line in importing.export_lines(load_study(path))]
    samples = [{"doc": row, "filtered_resps": [-1.0]} for row in rows]
    with pytest.raises(
        UserError, match=r"line 1: document .*: loglikelihood_rolling of a document with a pr"
    ):
        importing.read_columns(run, study, write(tmp_path / "samples.jsonl", samples))
    scored = [{**{name: row[name] for name in named}, "nats": 1.0} for row in rows]
    assert importing.read_columns(run, study, write(tmp_path / "s1.jsonl", scored)).bits[0] == 1 / math.log(2)


def without_nats(row, **fields):
    return {name: value for name, value in row.items() if name != "nats"} | fields


def test_who_scored_must_be_said(scored, tmp_path):
    run, _, rows = scored
    facts = given(run) | {"by": " "}
    words = [word for name in ("arm", "seed", "artifact", "by") for word in (f"--{name}", facts[name])]
    done = command("--study", run, *words, write(tmp_path / "s1.jsonl", rows))
    assert (done.returncode, "no by; give them" in done.stderr) == (3, True)


@pytest.mark.parametrize(
    ("spoil", "changes", "words"),
    [
        (lambda rows: rows[1].update(sha256="0" * 64), {}, r"line 2: document .* its text has sha256 000000"),
        (lambda rows: rows.pop(), {}, "no score of 1, first"),
        (lambda rows: rows.append(rows[0]), {}, "a second score of it"),
        (lambda rows: rows[0].update(id="nobody"), {}, "the run scores none of that name"),
        (lambda rows: rows[0].update(slice="test"), {}, "the run scores none of that name"),
        (lambda rows: rows[0].update(nats=-1.0), {}, "line 1: nats: -1.0"),
        (lambda rows: rows[0].update(nats=math.nan), {}, "line 1: nats: nan"),
        (lambda rows: rows[0].update(bits=1.0), {}, "2 of them given"),
        (lambda rows: rows[0].update(nats=10**400), {}, "line 1: nats: 1000"),
        (lambda rows: rows.__setitem__(0, without_nats(rows[0], logprobs=["a"])), {}, "line 1: logprobs"),
        (lambda rows: rows.__setitem__(0, without_nats(rows[0], logprobs=[-9.0, 5.0])), {}, "1: logprobs"),
        (lambda rows: rows[0].update(doc={}, filtered_resps=[]), {}, "no sample of loglikelihood_rolling"),
        (lambda rows: rows[0].update(doc={}, filtered_resps=[[]]), {}, "no sample of loglikelihood_roll"),
        (lambda rows: rows[0].update(doc={}, filtered_resps=["x"]), {}, "no sample of loglikelihood_roll"),
        (lambda rows: rows[0].update(doc=5, filtered_resps=[-1.0]), {}, "no sample of loglikelihood_roll"),
        (lambda rows: None, {"artifact": "0" * 64}, "--artifact: 000000000000 was scored"),
        (lambda rows: None, {"seed": 7}, "--seed: 7; the study has"),
        (lambda rows: None, {"recipe": "int9"}, "did you mean 'int8'"),
        (lambda rows: None, {"arm": "B", "recipe": "int8"}, "variants are of S1, S0"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_with_the_line(scored, tmp_path, spoil, changes, words):
    run, _, rows = scored
    copies = [dict(row) for row in rows]
    spoil(copies)
    with pytest.raises(UserError, match=words):
        importing.import_scores(
            load_study(run), write(tmp_path / "s1.jsonl", copies), **given(run, **changes)
        )
    assert read_scores(run) == []


def test_the_verdict_says_that_scores_were_made_elsewhere(tmp_path):
    run = Run(tmp_path, recipes={"int8": ("openvino", 1.0, 0.6)}).make()
    change_score(lambda record: record.update(by="vllm 0.11"))(run)
    (note,) = [note for note in judge(run.path).notes if "elsewhere" in note]
    assert note.startswith("scores were made elsewhere (1 by vllm 0.11, first S1/s1/plain)")
    assert "scored by different programs" in note
