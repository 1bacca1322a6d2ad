"""The interpreter of the tests' commands does what the plain one does."""

import signal
import sys

import pytest

from tests.helpers import complete
from tests.warm_python import is_warm, warm_python

ENDS = {
    "a code": ("sys.exit(3)", 3),
    "a text": ("sys.exit('no such file')", 1),
    "an exception": ("raise ValueError(7)", 1),
    "a signal": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "its end": ("print('done', *sys.argv[1:], Path.cwd().name, os.environ['ASKED'])", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_file_ends_as_under_the_plain_interpreter(tmp_path, end):
    program, code = ENDS[end]
    path = tmp_path / "program.py"
    path.write_text(f"import os, signal, sys\nfrom pathlib import Path\n{program}\n")
    answers = [
        complete([python, path, "--one", "2"], cwd=tmp_path, env={"ASKED": "yes"})
        for python in (warm_python(), sys.executable)
    ]
    warm, plain = answers
    assert warm.returncode == plain.returncode == code
    assert warm.stdout == plain.stdout
    assert warm.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


SHOW = """
import sys
from multiprocessing import get_context
def show(_): print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'distill', 'compress', 'eval', 'tests'}))
def main():
    show(0)
    with get_context('forkserver').Pool(1) as pool: pool.map(show, [0])
if __name__ == '__main__': main()
"""


def test_it_and_its_workers_have_imported_torch_and_nothing_of_the_project(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(SHOW)
    assert complete([warm_python(), path]).stdout.splitlines() == ["['torch']"] * 2
    plain = complete([warm_python(), path], env={"OMP_NUM_THREADS": "2"})  # torch reads it as it is imported
    assert plain.stdout.splitlines() == ["[]"] * 2


def test_what_measures_its_own_process_is_started_by_the_plain_interpreter():
    assert is_warm(["-m", "eval.cost"])
    assert is_warm(["distill/train.py", "--config", "tiny"])
    assert not is_warm(["-m", "eval.cost.worker"])
    assert not is_warm(["-c", "print(1)"])
