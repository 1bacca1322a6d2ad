"""lm-evaluation-harness for real, on tasks made of local files; skipped where it is not installed."""

import json
from importlib.util import find_spec

import pytest
import yaml

from eval.core.errors import UserError
from eval.core.sections import Harness, Task
from eval.engines import load_engine
from eval.score.lm_eval import run_lm_eval
from eval.score.samples import read_samples
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


def test_settings_of_the_harness_are_for_its_tasks_alone():
    with pytest.raises(ValueError, match="`harness` is for `kind: lm_eval`"):
        Task(kind="f1", path="a.jsonl", harness=Harness(shots=2))
