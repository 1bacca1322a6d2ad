"""A teacher that was asked elsewhere: a file of answers, checked before anything is trained, rows that miss counted."""

import json

import numpy as np
import pytest
import torch

from distill.checks import check_method
from distill.pipeline import base_jobs, make_student, prepare_inputs, student_jobs, teacher_jobs
from distill.teachers.file import token_hash
from distill.teachers.run import find_teacher_hash
from distill.teachers.target_source import check_target_source, open_target_source, target_source_inputs
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.records import each_score
from eval.core.study import load_study, make_run_folder
from eval.engines import load_tokenizer
from eval.engines.torch import load_model
from eval.score.scoring import score_documents
from tests.helpers import launch, tiny_model, tiny_study, tiny_tokenizer

K = 6


@pytest.fixture(scope="module")
def large():
    model = tiny_model(330, 7, hidden_size=96)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A study that has asked, and has no answers yet; the rows that it asks for."""
    folder = tmp_path_factory.mktemp("file")
    tiny_model(330).save_pretrained(folder / "small")
    tiny_tokenizer().save_pretrained(folder / "small")
    changes = {"base": {"path": str(folder / "small")}, "method": {"name": "larger_teacher"}, "seeds": [0]}
    teacher = {"file": str(folder / "answers.jsonl")}
    path = tiny_study(folder, teacher=teacher, targets={"form": "top_k", "k": K}, **changes)
    with pytest.raises(
        UserError, match=r"teacher.file: no such file: .*; ask the teacher for the rows in .*rows"
    ):
        start(path)
    return path, asked(folder / "runs/tiny")


def asked(run):
    return [json.loads(line) for line in (run / "rows.jsonl").read_text().splitlines()]


def start(path, *words):
    study = load_study(path, list(words))
    make_run_folder(study)
    return prepare_inputs(study, accelerator())


@torch.no_grad()
def answer(model, row, k=K + 2):
    """The line of a row with what a model says of it."""
    logs = model(torch.tensor([row["tokens"]])).logits[0, :-1, :320].log_softmax(-1)
    values, ids = logs.topk(k)
    own = logs.gather(1, torch.tensor(row["tokens"][1:])[:, None])[:, 0]
    return {**row, "ids": ids.tolist(), "log_probs": values.tolist(), "own": own.tolist()}


def write(path, lines):
    file = path.parent / "answers.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def lines(place, large):
    return [answer(large, row) for row in place[1]]


def test_what_is_asked(place):
    path, rows = place
    tokenizer = tiny_tokenizer()
    assert len([row for row in rows if not row["scored"]]) == 32
    assert {row["domain"] for row in rows} == {"code", "prose"}
    for row in rows:
        assert row["hash"] == token_hash(row["tokens"])
        assert row["text"] == tokenizer.decode(row["tokens"])
    assert len({(row["row"], row["hash"]) for row in rows}) == len(rows)
    del path


def changed(line, **changes):
    return {**line, **changes}


def shifted(line):
    """Its answers one place too late, as from a script that forgot what position predicts which token."""
    return changed(
        line, ids=line["ids"][1:] + line["ids"][:1], log_probs=line["log_probs"][1:] + line["log_probs"][:1]
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda line: changed(line, own=line["own"][1:]), r"line 3: \d+ numbers in own, \d+ lists in ids"),
        (
            lambda line: {k: v for k, v in line.items() if k != "ids"},
            "line 3: no answer to a row .KeyError: 'ids'",
        ),
        (
            lambda line: changed(line, **{n: line[n][1:] for n in ("ids", "log_probs", "own")}),
            r"line 3: answers for \d+ tokens, of a row with \d+ after the first",
        ),
        (
            shifted,
            r"line 3: token \d+ is -\d.* in log_probs and -\d.* in own; give of the token at place p \+ 1",
        ),
        (
            lambda line: changed(line, ids=[[i + 320 for i in ids] for ids in line["ids"]]),
            r"line 3, row .*: token 1 has an id outside of the 320 of the tokenizer",
        ),
        (
            lambda line: changed(line, log_probs=[[0.0 for _ in each] for each in line["log_probs"]]),
            "probabilities that sum to more than 1",
        ),
    ],
)
def test_a_line_that_is_no_answer_is_refused_before_training(place, lines, spoil, message):
    path, _ = place
    write(path, [*lines[:2], spoil(lines[2]), *lines[3:]])
    with pytest.raises(UserError, match=message) as error:
        start(path)
    assert "\n" not in str(error.value)


def test_a_scored_row_that_misses_is_refused_and_of_another_tokenizer_it_does(place, lines):
    path, rows = place
    scored = [i for i, row in enumerate(rows) if row["scored"]]
    write(path, [line for i, line in enumerate(lines) if i not in scored[:2]])
    with pytest.raises(UserError, match=rf"2 of {len(scored)} rows of scored documents have no answer: "):
        start(path)
    write(path, [changed(line, hash="0" * 32) for line in lines])
    with pytest.raises(UserError, match=rf"{len(scored)} of {len(scored)} rows of scored documents"):
        start(path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.name", "elsewhere"], "teacher.control_file: none, and T0 is no base of the study"),
        (["--teacher.control_file", "x.jsonl"], "teacher.control_file: given, and T0 is the base"),
        (
            ["--method", "{name: context, settings: {text: a, wrong: {text: b}}}"],
            "a file holds what was said",
        ),
        (["--targets.form", "dense"], "targets.form: dense, but teacher.file names the likeliest ids"),
        (["--targets.source", "online"], "targets.source: online, .* set it to cached"),
        (["--data.packing", "true"], "data.packing: true, but a file has every row by itself"),
        (["--teacher.path", "some/model"], "exactly one of `path`, `server`, `mix` and `file`"),
        (["--teacher", "{path: x, control_file: y}"], "`control_file` is beside a `file`"),
    ],
)
def test_what_a_file_cannot_do_is_refused(place, words, message):
    with pytest.raises(UserError, match=message):  # noqa: PT012
        study = load_study(place[0], words)
        check_method(study)
        check_target_source(study)


@pytest.fixture(scope="module")
def trained(place, lines):
    """Three of the 32 training rows have no answer; lines that nobody asked for stand in between."""
    path, rows = place
    learned = [i for i, row in enumerate(rows) if not row["scored"]]
    left_out = {rows[i]["row"] for i in (learned[1], learned[5], learned[-1])}
    other = changed(lines[0], row="nobody#0")
    write(path, [other, *(line for line in lines if line["row"] not in left_out), other])
    study = start(path)
    run_in_turn("file", [*base_jobs(study), *teacher_jobs(study)], quiet=True)
    return study, left_out


def test_targets_are_what_the_file_says(trained, large):
    study, left_out = trained
    tokenizer = load_tokenizer(study.folder / "base/s0")
    assert {row["row"] for row in asked(study.folder)} > left_out
    manifest = read_manifest(study.folder / "targets/T1/s0")
    assert manifest.facts["left_out"] == {"rows that the file has no answer to": 3}
    rows = {}
    for arm in ("S1", "S0", "CE"):
        with open_target_source(study, arm, 0, tokenizer) as source:
            rows[arm] = [row.id for row in source.rows]
            assert len(source.rows) == 29
            if arm == "S1":
                batch = collate(source.rows[:3], 0)
                target = source.teacher(batch)
    assert rows["S1"] == rows["S0"] == rows["CE"]
    assert not left_out & set(rows["S1"])
    with torch.no_grad():
        said = large(**batch.inputs).logits[..., :320].log_softmax(-1)[:, :-1][batch.mask]
    values = said.topk(K).values
    torch.testing.assert_close(said.gather(1, target.ids), values, msg="the likeliest, in their order")
    torch.testing.assert_close(target.log_probs, values, atol=1e-2, rtol=1e-3)  # kept in fp16
    assert target_source_inputs(study, "CE", 0)[0] == sorted(left_out), (
        "in the key of a student without a teacher too"
    )


def test_the_teacher_is_scored_by_what_the_file_says_of_the_texts(trained, large):
    study, _ = trained
    record = next(score for score in each_score(study.folder) if score.arm == "T1")

    def predict(batch):
        with torch.no_grad():
            return large(**batch.inputs).logits[..., :320].log_softmax(-1)

    tokenizer = load_tokenizer(study.folder / "base/s0")
    wanted = score_documents(predict, study.folder / "data", tokenizer, study.data.context)
    np.testing.assert_allclose(record.documents.bits, wanted.bits, rtol=1e-4)
    assert record.documents.correct == wanted.correct


def test_too_many_rows_without_an_answer_are_refused(trained):
    study, _ = trained
    strict = load_study(study.folder, ["--data.max_dropped", "0.05", "--targets.k", "5"])
    with pytest.raises(
        UserError, match=r"targets of T1: 3 of 32 training rows are rows that the file has no answer"
    ):
        run_in_turn("file", [job for job in teacher_jobs(strict) if "T1" in job.name], quiet=True)


@pytest.mark.slow
def test_other_answers_teach_anew_and_all_arms_learn_from_the_same_rows(trained, large):
    """By the command line; then with a second file for the teacher without the method."""
    study, _ = trained
    before = find_teacher_hash(study, "S1", 0)
    result = launch(study.folder)
    assert result.returncode == 0, result.stderr
    assert "T1 of seeds 0: left out 3 rows that the file has no answer to" in result.stdout
    for arm in ("S1", "S0", "CE"):
        manifest = read_manifest(study.folder / f"students/{arm}/s0")
        assert manifest.facts["training_rows"]["left_out"] == 3
    assert "teacher of the study: " in (study.folder / "students/S1/s0/README.md").read_text()
    rows = asked(study.folder)
    control = study.folder.parent / "control.jsonl"
    small = load_model(study.folder / "base/s0")
    control.write_text("".join(json.dumps(answer(small, row)) + "\n" for row in rows))
    file = study.folder.parent.parent / "answers.jsonl"
    file.write_text("".join(json.dumps(answer(large, row)) + "\n" for row in rows))
    both = start(study.folder, "--method.name", "elsewhere", "--teacher.control_file", str(control))
    run_in_turn("both", teacher_jobs(both), quiet=True)
    assert find_teacher_hash(both, "S1", 0) != before
    for arm in ("S1", "S0"):
        make_student(both, arm, 0, lambda share, tokens=0: None)
    students = [load_model(both.folder / f"students/{arm}/s0") for arm in ("S1", "S0")]
    assert not torch.equal(*(student.model.embed_tokens.weight for student in students))
    assert "left_out" not in read_manifest(both.folder / "students/S1/s0").facts["training_rows"]
    assert [job.name for job in student_jobs(both)] == ["S1 s0", "S0 s0", "CE s0"]
