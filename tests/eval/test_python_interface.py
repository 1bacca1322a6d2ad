"""What a notebook calls in place of a command."""

from pathlib import Path

from eval.core.study import load_study
from eval.gate.decision import judge
from tests.eval.run_builder import Run
from tests.helpers import run, tiny_study


def test_a_path_is_taken_as_a_keyword(tmp_path):
    study = load_study(tiny_study(tmp_path), runs=tmp_path / "mine", recipes=[Path("a.yaml"), "int8"])
    assert (study.runs, study.recipes) == (str(tmp_path / "mine"), ["a.yaml", "int8"])


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
