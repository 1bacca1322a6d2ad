"""What a notebook calls in place of a command."""

import re
from pathlib import Path

import numpy as np
import pytest

from distill.train import distil
from eval.core.documents import Document
from eval.core.errors import UserError
from eval.core.study import load_study
from eval.gate.decision import judge
from eval.score.__main__ import missing_lines
from eval.score.scoring import score
from tests.eval.run_builder import Run, torch_model
from tests.helpers import run, tiny_study


def test_a_path_is_taken_as_a_keyword(tmp_path):
    study = load_study(tiny_study(tmp_path), runs=tmp_path / "mine", recipes=[Path("a.yaml"), "int8"])
    assert (study.runs, study.recipes) == (str(tmp_path / "mine"), [str(Path("a.yaml").absolute()), "int8"])


def test_a_run_is_judged_and_nothing_is_written(tmp_path):
    toy = Run(tmp_path).make()
    result = judge(toy.path)
    assert (result.verdict, result.recommended["cpu"]) == ("PASS", "int8")
    assert not (toy.path / "gate.json").exists()


def test_keywords_override_a_study(tmp_path):
    study = load_study(tiny_study(tmp_path), train__steps=50, title="Mine, é 😀", seeds=[7])
    assert (study.train.steps, study.title, study.seeds) == (50, "Mine, é 😀", [7])


def test_importing_an_entry_leaves_the_import_path_alone():
    script = "import sys; path = [*sys.path]; import distill.train, scripts.finished; print(sys.path == path)"
    assert run("-c", script).stdout == "True\n"


def test_a_variant_that_was_never_built_is_answered_with_the_command_that_builds_it(tmp_path):
    run = Run(tmp_path).make()
    (run.path / "records/score/int8/S1-s1.json").unlink()
    with pytest.raises(UserError, match=r"run absorb score"):
        judge(run.path)
    (run.path / "variants/int8/S1/s1/manifest.json").unlink()
    with pytest.raises(UserError, match=r"run absorb compress"):
        judge(run.path)
    assert missing_lines(load_study(run.path)) == [
        f"not there yet: variants/int8/S1/s1; run absorb compress --study {run.path}"
    ]


@pytest.mark.parametrize(
    ("texts", "context", "message"),
    [
        ("abc", 32, "texts: 'abc'; give a list of texts"),
        (None, 32, "texts: None; give a list of texts"),
        ([], 32, "texts: there are none; give one or more"),
        (["a", 3], 32, "texts[1]: 3; give a str or a Document"),
        (["a\ud800"], 32, "texts[0]: surrogates not allowed"),
        ([Document("0", "", "a", [{"content": "\ud800"}])], 32, "texts[0]: surrogates not allowed"),
        (["a", Document("0", "", "b")], 32, "texts: two have the same id"),
        (["a"], 0, "context: 0; give a whole number of tokens, 2 or more"),
        (["a"], 1, "context: 1; give a whole number of tokens, 2 or more"),
        (["a"], 32.0, "context: 32.0; give a whole number of tokens, 2 or more"),
        (["a"], 257, "context: 257; give 256 at most"),
    ],
)
def test_what_cannot_be_scored_is_refused(checkpoint, texts, context, message):
    with pytest.raises(UserError, match=re.escape(message)):
        score(checkpoint, texts, context)


def test_texts_are_scored_up_to_the_last_position_of_a_model(checkpoint):
    result = score(checkpoint, ["def f(x): return x\n" * 80, "a"], context=256)
    assert len(result.bits) == 2
    assert min(result.bits) > 0


def test_without_a_context_a_model_of_few_positions_is_scored_in_all_of_them(tmp_path):
    torch_model(max_position_embeddings=64)(tmp_path)
    texts = ["def f(x): return x\n" * 80]
    assert score(tmp_path, texts) == score(tmp_path, texts, context=64)


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json; give a folder in the transformers format"):
        score(tmp_path / "nope", ["a"], 32)


def test_what_cannot_be_trained_is_refused(tmp_path):
    study = load_study(tiny_study(tmp_path))
    with pytest.raises(UserError, match="until: 'student'; did you mean 'students'"):
        distil(study, until="student")
    with pytest.raises(UserError, match="study: 'tiny'; give what `load_study` returns"):
        distil("tiny")
    assert not study.folder.exists()


@pytest.mark.parametrize(
    ("key", "value"), [("train__steps", np.int64(3)), ("seeds", range(2)), ("title", b"")]
)
def test_an_override_of_no_plain_value_is_refused(key, value):
    with pytest.raises(UserError, match=rf"override {key.replace('__', '.')}: .*; give plain values"):
        load_study("tiny", **{key: value})


@pytest.mark.parametrize("where", ["", 3, "a" * 5000, "a\0b"])
def test_what_names_no_study_is_refused(where):
    for load in (load_study, judge):
        with pytest.raises(UserError, match="give a YAML file, a run folder or"):
            load(where)
