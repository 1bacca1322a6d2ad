"""Tasks: scores against the model asked one sample at a time, on every engine; bad files; the command line."""

import json
import shutil
import sys

import pytest
import torch
import yaml

from eval.core.documents import boundary_id
from eval.core.errors import UserError
from eval.core.records import read_task_scores
from eval.core.sections import Task
from eval.core.study import load_study
from eval.engines import load_engine
from eval.engines.torch import load_checkpoint
from eval.score.lm_eval import run_lm_eval, sample_scores
from eval.score.samples import Sample, check_tasks, read_samples, task_digest
from eval.score.task_scores import mean_task_scores, score_tasks, unscored_tasks
from eval.score.tasks import answer_text, choice_rows, choose, generate, run_task
from tests.eval.run_builder import CONTEXT, facts, fake_run, put, torch_model
from tests.helpers import text

ENGINES = ["torch", "openvino"]
CHOICES = [
    {
        "prompt": text("code", i, 3 + 4 * i),
        "choices": ["def self", " return", "quiet river stone"],
        "answer": i % 3,
    }
    for i in range(6)
]
ANSWERS = [{"id": f"a{i}", "prompt": text("prose", i, 2 + i % 3), "answer": "stone"} for i in range(7)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def engine(request, checkpoint, openvino_folder):
    return load_engine(request.param, {"torch": checkpoint, "openvino": openvino_folder}[request.param])


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_choices_are_those_of_one_forward_pass_each(engine, checkpoint, tmp_path):
    """Whatever the batch: the log-likelihood of a choice's tokens after its prompt, without padding."""
    task = Task(kind="multiple_choice", path=write(tmp_path / "t.jsonl", CHOICES))
    model, words = load_checkpoint(checkpoint)
    raw, even = [], []
    for sample in read_samples(task):
        sums = []
        for row in choice_rows(words, sample, "x", CONTEXT):
            with torch.no_grad():
                log_probs = model(input_ids=torch.tensor([row.tokens])).logits[0].double().log_softmax(-1)
            first = 1 + row.given
            sums.append(sum(log_probs[p - 1, row.tokens[p]].item() for p in range(first, len(row.tokens))))
        sizes = [len(choice) for choice in sample.choices]
        raw.append(float(sample.choices[sums.index(max(sums))] == sample.answers[0]))
        scaled = [s / n for s, n in zip(sums, sizes, strict=True)]
        even.append(float(sample.choices[scaled.index(max(scaled))] == sample.answers[0]))
    for size in (1, 40, 4096):
        scores = run_task(task, engine, CONTEXT, size)
        assert (scores.value, scores.raw) == (even, raw)
    assert scores.id == ["1", "2", "3", "4", "5", "6"]


def test_a_choice_is_predicted_to_its_last_letter(checkpoint):
    """The token that holds the end of the prompt and the start of the choice is predicted, not given."""
    _, words = load_checkpoint(checkpoint)
    sample = Sample("x", "class pri", ["nt lambda", "nt"], ["nt lambda", "nt"])
    for row, choice in zip(choice_rows(words, sample, "x", CONTEXT), sample.choices, strict=True):
        assert row.tokens[0] == boundary_id(words)
        given = words.decode(row.tokens[1 : 1 + row.given])
        assert sample.prompt.startswith(given)
        assert words.decode(row.tokens[1:]) == sample.prompt + choice
        assert words.decode(row.tokens[1 + row.given :]).endswith(choice)


def test_a_long_prompt_loses_its_start_and_a_long_choice_is_refused(checkpoint):
    _, words = load_checkpoint(checkpoint)
    long = text("code", 1, 60)
    row = next(choice_rows(words, Sample("x", long, ["def"], ["def"]), "x", 16))
    whole = words(long + "def", add_special_tokens=False)["input_ids"]
    assert row.tokens == [boundary_id(words), *whole[-15:]]
    with pytest.raises(UserError, match=r"sample 'x': choice .* tokens; at most 14 fit"):
        list(choice_rows(words, Sample("x", "def", [long], [long]), "x", 16))


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_generated_answers_are_the_library_s_own(engine, checkpoint, tmp_path):
    """Greedy, in batches of prompts of one length, against transformers' generate for one prompt at a time."""
    task = Task(kind="exact_match", path=write(tmp_path / "t.jsonl", ANSWERS), new_tokens=6)
    samples = read_samples(task)
    model, words = load_checkpoint(checkpoint)
    wanted = []
    for sample in samples:
        ids = [boundary_id(words), *words(sample.prompt, add_special_tokens=False)["input_ids"]]
        output = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=6, do_sample=False
        )
        wanted.append(answer_text(words.decode(output[0, len(ids) :], skip_special_tokens=True), sample))
    assert generate(samples, engine, 64, 30, 6) == wanted
    assert generate(samples, engine, 64, 4096, 6) == wanted
    right = [
        {**row, "answer": ["no", answer or "empty"]} for row, answer in zip(ANSWERS, wanted, strict=True)
    ]
    again = run_task(Task(kind="f1", path=write(tmp_path / "r.jsonl", right), new_tokens=6), engine, 64, 100)
    assert again.output == wanted
    assert again.value == [float(bool(answer)) for answer in wanted]


def test_an_answer_has_as_many_lines_as_the_accepted_ones():
    one, two = Sample("x", "p", ["a"], []), Sample("x", "p", ["a", "b\nc"], [])
    assert answer_text("\n  a \nb\nc", one) == "a"
    assert answer_text("\n  a \nb\nc", two) == "a \nb"


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file is empty"),
        (["{"], "line 1: not JSON"),
        ([GOOD, [1]], "line 2: expected a JSON object, found list; write one JSON object"),
        ([{**GOOD, "anser": 1}], "unknown field: 'anser'; did you mean 'answer'"),
        ([{**GOOD, "prompt": " "}], "line 1: prompt: ' '; give a text that"),
        ([{**GOOD, "choices": ["a"]}], "choices: .* at least two"),
        ([{**GOOD, "choices": ["a", "a"]}], "choices: .* must differ"),
        ([{**GOOD, "answer": 2}], "answer: 2; give one of the choices, or an index below 2"),
        ([{**GOOD, "answer": True}], "answer: True"),
        ([{**GOOD, "id": "x"}, {**GOOD, "id": "x"}], "two samples have the id 'x'"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, rows, message):
    path = tmp_path / "t.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    with pytest.raises(UserError, match=message):
        check_tasks({"mine": Task(kind="multiple_choice", path=str(path))})


def test_files_names_and_the_harness_are_checked_before_any_model(tmp_path, monkeypatch):
    task = Task(kind="f1", path=write(tmp_path / "t.jsonl", [{"prompt": "p", "answer": []}]))
    with pytest.raises(UserError, match="line 1: answer"):
        check_tasks({"mine": task})
    with pytest.raises(UserError, match="no such file"):
        check_tasks({"mine": Task(kind="f1", path="nowhere.jsonl")})
    with pytest.raises(UserError, match=r"'\.\./x': not a name"):
        check_tasks({"../x": task})
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    harness = Task(kind="lm_eval", path="lm_eval:arc_easy")
    for refuse in (lambda: check_tasks({"arc": harness}), lambda: run_lm_eval(harness, "torch", tmp_path)):
        with pytest.raises(
            UserError,
            match=r"task lm_eval:arc_easy: needs lm_eval, which is not installed; .*pip install lm-eval",
        ):
            refuse()


def test_a_changed_file_or_setting_is_another_source(tmp_path):
    path = write(tmp_path / "t.jsonl", ANSWERS)
    one = task_digest(Task(kind="f1", path=path))
    assert task_digest(Task(kind="f1", path=path)) == one
    assert task_digest(Task(kind="f1", path=path, new_tokens=3)) != one
    write(tmp_path / "t.jsonl", ANSWERS[1:])
    assert task_digest(Task(kind="f1", path=path)) != one


def test_the_sample_log_of_the_harness_becomes_scores():
    """The shape that lm_eval 0.4.13 logs: a row per document and filter."""

    def row(doc, name, acc):
        return {"doc_id": doc, "filter": name, "metrics": ["acc", "acc_norm"], "acc": 1.0, "acc_norm": acc}

    log = {"arc": [row(1, "none", 0.0), row(0, "none", 1.0), row(0, "strict", 0.0)]}
    samples, metric = sample_scores(log)
    assert (metric, samples.id, samples.value) == ("acc_norm", ["arc:0", "arc:1"], [1.0, 0.0])
    with pytest.raises(UserError, match="'acc_norm' is not between 0 and 1"):
        sample_scores({"ppl": [row(0, "none", 17.2)]})


def test_every_plain_model_is_scored_on_tasks_once(tmp_path, openvino_folder):
    choices, answers = write(tmp_path / "c.jsonl", CHOICES), write(tmp_path / "a.jsonl", ANSWERS)
    study, folder = fake_run(tmp_path)
    put(
        folder,
        "variants/int8/S1/s0",
        lambda to: shutil.copytree(openvino_folder, to, dirs_exist_ok=True),
        **facts("S1", "int8", "openvino"),
    )
    config = yaml.safe_load(study.read_text())
    config["data"]["tasks"] = {
        "pick": {"kind": "multiple_choice", "path": choices},
        "write": {"kind": "exact_match", "path": answers, "new_tokens": 4, "limit": 3},
    }
    study.write_text(yaml.safe_dump(config))  # after training: tasks may come and go
    loaded = load_study(study)
    assert loaded.hash() == load_study(folder).hash(), "tasks change no model and no score"
    for place, names in unscored_tasks(folder, loaded).items():
        score_tasks(folder, loaded, place, names)
    records = {(r.task, r.recipe, r.arm): r for r in read_task_scores(folder)}
    models = {("plain", "B"), ("plain", "S1"), ("plain", "S0"), ("int8", "S1")}
    assert set(records) == {(task, *model) for task in ("pick", "write") for model in models}
    assert len(records["write", "plain", "B"].samples.id) == 3
    assert set(mean_task_scores(list(records.values()))) == models
    engine = load_engine("openvino", openvino_folder)
    again = choose(read_samples(loaded.data.tasks["pick"]), engine, CONTEXT, 512)
    assert records["pick", "int8", "S1"].samples == again
    assert unscored_tasks(folder, loaded) == {}
    put(folder, "students/S0/s0", torch_model(seed=9), **facts("S0"))
    write(tmp_path / "a.jsonl", ANSWERS[1:])
    missing = unscored_tasks(folder, loaded)
    assert missing.pop(folder / "students/S0/s0") == ["pick", "write"]
    assert set(missing) == {folder / "base/s0", folder / "students/S1/s0", folder / "variants/int8/S1/s0"}
    assert all(names == ["write"] for names in missing.values())
