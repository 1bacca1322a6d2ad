"""lm-evaluation-harness for real, on tasks made of local files; skipped where it is not installed."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
import yaml

from eval.core.documents import Document
from eval.core.errors import UserError
from eval.core.sections import Harness, Task
from eval.engines import load_engine, load_tokenizer
from eval.score.lm_eval import run_lm_eval
from eval.score.samples import read_samples
from eval.score.scoring import score
from eval.score.tasks import choose
from tests.eval.run_builder import CONTEXT, torch_model
from tests.helpers import text

installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
FOREIGN = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), installed]  # warnings of the harness


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch_model(seed=3)(folder)
    return folder


def task_file(folder, name, **changes):
    """A task of the harness over a JSONL file, and that file."""
    rows = [
        {"prompt": text("code", i, 5), "choices": [" def self", " return", " quiet river"], "answer": i % 3}
        for i in range(12)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",  # the choices begin with their own space
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path, data


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}],
}
WRITTEN = {
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3, "do_sample": False},
}


@pytest.mark.parametrize("case", [pytest.param("bos", marks=FOREIGN)])
def test_the_harness_chooses_as_this_project_does(model, tmp_path, case):
    """With BOS in front, as here, by the plain likelihood."""
    path, data = task_file(tmp_path, "local_choice", **CHOICE)
    task = Task(kind="lm_eval", path=str(path), harness=Harness(bos=True))
    scores, metric = run_lm_eval(task, "torch", model)
    samples = read_samples(Task(kind="multiple_choice", path=str(data)))
    own = choose(samples, load_engine("torch", model), CONTEXT, 512)
    assert metric == "acc"
    assert scores.value == own.raw
    assert 0 < sum(own.raw) < len(own.raw), "some are right and some are not"


@pytest.mark.parametrize("case", [pytest.param("shots", marks=FOREIGN)])
def test_shots_limits_and_settings_of_generation_reach_the_harness(model, tmp_path, case):
    path, _ = task_file(tmp_path, "local_words", **WRITTEN)
    asked = {"harness": Harness(shots=1, generation={"max_gen_toks": 2}), "limit": 5}
    scores, metric = run_lm_eval(Task(kind="lm_eval", path=str(path), **asked), "torch", model)
    assert (metric, len(scores.id)) == ("exact_match", 5)
    wrong = Task(kind="lm_eval", path=str(path), harness=Harness(chat_template=True))
    with pytest.raises(UserError, match="has no chat template"):
        run_lm_eval(wrong, "torch", model)


TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"


def by_hand(folder, name, lay_out, engine="torch", model=None):
    """The choices of this project, of prompts that are laid out here."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({**row, "prompt": lay_out(row["prompt"])}) + "\n" for row in rows))
    samples = read_samples(Task(kind="multiple_choice", path=str(path)))
    return choose(samples, load_engine(engine, model), 200, 512).raw


@pytest.mark.parametrize("case", [pytest.param("chat", marks=FOREIGN)])
def test_a_chat_template_and_shots_are_laid_out_as_they_should_be(model, tmp_path, case):
    chat = shutil.copytree(model, tmp_path / "chat")
    words = load_tokenizer(chat)
    words.chat_template = TEMPLATE
    words.save_pretrained(chat)
    path, _ = task_file(tmp_path, "local_chat", **CHOICE)
    task = Task(kind="lm_eval", path=str(path), harness=Harness(chat_template=True, bos=True))
    scores, _ = run_lm_eval(task, "torch", chat)
    assert scores.value == by_hand(tmp_path, "chat", lambda p: f"[user] {p}\n[assistant]", model=chat)
    first = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    path, _ = task_file(tmp_path, "local_shots", **CHOICE, **first)
    task = Task(kind="lm_eval", path=str(path), harness=Harness(shots=1, bos=True))
    scores, _ = run_lm_eval(task, "torch", model)
    shot = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    before = f"{shot['prompt']}{shot['choices'][shot['answer']]}\n\n"
    assert scores.value == by_hand(tmp_path, "shots", lambda p: before + p, model=model)


@pytest.mark.parametrize("case", [pytest.param("openvino", marks=FOREIGN)])
def test_openvino_computes_in_the_harness_in_the_precision_of_this_project(
    openvino_folder, tmp_path, monkeypatch, case
):
    """By its defaults the runtime rounds to 16 bits on some machines."""
    logs = []
    monkeypatch.setattr("eval.score.lm_eval.sample_scores", logs.append)
    path, data = task_file(tmp_path, "local_openvino", **CHOICE)
    run_lm_eval(Task(kind="lm_eval", path=str(path), harness=Harness(bos=True)), "openvino", openvino_folder)
    said = [resp for sample in logs[0]["local_openvino"] for resp, _ in sample["filtered_resps"]]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    pairs = [(row["prompt"], choice) for row in rows for choice in row["choices"]]
    documents = [  # white space before a choice is of the choice there
        Document(str(i), "", prompt[len(prompt.rstrip()) :] + choice, prompt.rstrip())
        for i, (prompt, choice) in enumerate(pairs)
    ]
    own = [-math.log(2) * bits for bits in score(openvino_folder, documents, 200, "openvino").bits]
    assert said == pytest.approx(own, abs=1e-4)


def test_settings_of_the_harness_are_for_its_tasks_alone():
    with pytest.raises(ValueError, match="`harness` is for `kind: lm_eval`"):
        Task(kind="f1", path="a.jsonl", harness=Harness(shots=2))
