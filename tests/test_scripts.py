"""Every script starts as a file and as a module, from wherever one stands."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

QUICK = "simulate_gate"  # stands for the others in the fast suite
# A file without this line is a module that scripts import, not a command.
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_a_script_runs_as_a_file_and_as_a_module(name, tmp_path):
    path = str(ROOT / "scripts" / f"{name}.py")
    starts = ([path], tmp_path), (["-m", f"scripts.{name}"], ROOT)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [
        subprocess.Popen([sys.executable, *words, "--help"], cwd=place, **pipes) for words, place in starts
    ]
    for process in running:
        out, error_text = process.communicate(timeout=300)
        assert process.returncode == 0, error_text
        assert "usage:" in out


def test_numbers_that_make_no_sense_are_refused(tmp_path):
    for path in {*(ROOT / "scripts").glob("*.py")} - {
        ROOT / "scripts" / "bench_trl.py"
    }:  # another Python too
        assert "type=int" not in (text := path.read_text()), f"{path}: take `count` of eval.core.commands"
        assert "type=float" not in text, f"{path}: take `positive` of eval.core.commands"
    words = [sys.executable, str(ROOT / "scripts" / "simulate_gate.py"), "--draws", "0"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "found '0', expected a whole number, 1 or more" in done.stderr
