"""Every script starts as a file and as a module, from wherever one stands."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

QUICK = "finished"  # stands for the others in the fast suite
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize(
    "name", [name if name == QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_a_script_runs_as_a_file_and_as_a_module(name, tmp_path):
    path = str(ROOT / "scripts" / f"{name}.py")
    starts = ([path], ROOT), ([path], tmp_path), (["-m", f"scripts.{name}"], ROOT)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [
        subprocess.Popen([sys.executable, *words, "--help"], cwd=place, **pipes) for words, place in starts
    ]
    for process in running:
        out, error_text = process.communicate(timeout=300)
        assert process.returncode == 0, error_text
        assert "usage:" in out
