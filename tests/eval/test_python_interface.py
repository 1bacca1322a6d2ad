"""What a notebook calls in place of a command."""

from pathlib import Path

import pytest

from eval.core.errors import UserError
from eval.core.study import load_study
from eval.gate.decision import judge
from eval.score.__main__ import missing_lines
from tests.eval.run_builder import Run
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
    study = load_study(tiny_study(tmp_path), train__steps=50, title="Mine", seeds=[7])
    assert (study.train.steps, study.title, study.seeds) == (50, "Mine", [7])


def test_importing_an_entry_leaves_the_import_path_alone():
    script = "import sys; path = [*sys.path]; import distill.train, scripts.finished; print(sys.path == path)"
    assert run("-c", script).stdout == "True\n"


def test_a_variant_that_was_never_built_is_answered_with_the_command_that_builds_it(tmp_path):
    run = Run(tmp_path).make()
    (run.path / "records/score/int8/S1-s1.json").unlink()
    with pytest.raises(UserError, match=r"run python -m eval\.score"):
        judge(run.path)
    (run.path / "variants/int8/S1/s1/manifest.json").unlink()
    with pytest.raises(UserError, match=r"run python -m compress\.run"):
        judge(run.path)
    assert missing_lines(load_study(run.path)) == [
        f"not there yet: variants/int8/S1/s1; run python -m compress.run --study {run.path}"
    ]
