"""Jobs side by side: their order, their errors, and no life after their parent."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.core.errors import UserError
from eval.core.jobs import Job, lock_folder, run_in_turn, run_jobs
from tests.helpers import ROOT, run


def note(folder, name, report):
    import torch

    report(0.5)
    with (Path(folder) / "log").open("a") as out:
        out.write(f"{name} ")
    return name, torch.get_num_threads(), os.getpid()


def refuse(report):
    raise UserError("thing", "found", "fix")


def double(number, report):
    return 2 * number


def vanish(report):
    os.kill(os.getpid(), signal.SIGKILL)


def test_jobs_wait_for_what_they_need_and_run_in_one_thread_workers(tmp_path, capsys):
    jobs = [
        Job("last", note, (tmp_path, "last"), after=("first", "second")),
        Job("first", note, (tmp_path, "first")),
        Job("second", note, (tmp_path, "second"), after=("first", "elsewhere")),
    ]
    found = run_jobs("work", jobs, workers=2)
    assert (tmp_path / "log").read_text().split() == ["first", "second", "last"]
    assert all(threads == 1 and pid != os.getpid() for _, threads, pid in found.values())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "3 of 3" in lines[-1]
    assert "left" in lines[-1]


def learn(report):
    for step in range(3):
        time.sleep(0.01)
        report(step / 3, tokens=100)


def test_progress_tells_tokens_per_second(capsys):
    run_in_turn("work", [Job("a", learn)])
    found = re.search(r"a done, 1 of 1, ([\d,]+) tokens/s", capsys.readouterr().err)
    assert 0 < int(found[1].replace(",", "")) <= 100 / 0.01


def test_in_turn_gives_the_same(tmp_path):
    jobs = [Job("a", note, (tmp_path, "a")), Job("b", note, (tmp_path, "b"), after=("a",))]
    assert [run_in_turn("work", jobs)[name][0] for name in "ab"] == ["a", "b"]


def test_the_first_error_ends_the_rest_whole(tmp_path):
    jobs = [Job("bad", refuse), Job("after", note, (tmp_path, "after"), after=("bad",))]
    with pytest.raises(UserError) as told:
        run_jobs("work", jobs, workers=2)
    assert (told.value.thing, told.value.found, told.value.fix) == ("thing", "found", "fix")
    assert not (tmp_path / "log").exists()


def dawdle(report):
    time.sleep(120)


def vanish_later(report):
    time.sleep(2)
    vanish(report)


@pytest.mark.parametrize("after", [(), ("quick",)])
def test_a_killed_worker_ends_the_others_that_work(tmp_path, after):
    """They must not go on for long, nor, told twice to end (by the pool and by us), wait for a job for ever.

    The second worker's death is seen by us alone before the first result, and by the pool after it.
    """
    jobs = [Job("quick", note, (tmp_path, "quick"))] * len(after)
    jobs += [Job("gone", vanish_later), Job("slow", dawdle, after=after)]
    start = time.monotonic()
    with pytest.raises(UserError, match="a worker of all: was killed"):
        run_jobs("all", jobs, 2)
    assert time.monotonic() - start < 60


def test_a_killed_worker_is_told():
    with pytest.raises(UserError, match="a worker of work: was killed; free some memory"):
        run_jobs("work", [Job("gone", vanish)], workers=1)


SLEEPER = """
import sys, time
from pathlib import Path
from eval.core.jobs import Job, run_jobs

def sleep(folder, report):
    (Path(folder) / "started").touch()
    time.sleep(2)
    (Path(folder) / "survived").touch()

if __name__ == "__main__":
    run_jobs("sleep", [Job("sleep", sleep, (sys.argv[1],))], 1)
"""


def test_workers_die_with_their_parent(tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(words, env=env, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        process.kill()
    time.sleep(2.5)
    assert not (tmp_path / "survived").exists()


def test_a_run_folder_is_held_by_one_process(tmp_path):
    with (
        lock_folder(tmp_path),
        pytest.raises(UserError, match=f"held by process {os.getpid()}"),
        lock_folder(tmp_path),
    ):
        pass
    with lock_folder(tmp_path):
        pass


UNWINDING = """
import atexit, signal, sys, time, weakref
from pathlib import Path
from eval.core.jobs import _end

class Held:
    pass

def late(folder):
    (folder / "late").touch()
    time.sleep(1)
    (folder / "swept").touch()

folder, held = Path(sys.argv[1]), Held()
weakref.finalize(held, late, folder)
signal.signal(signal.SIGTERM, _end)
(folder / "started").touch()
time.sleep(60)
"""


def test_a_second_signal_does_not_break_the_sweeping(tmp_path):
    words = [sys.executable, "-c", UNWINDING, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for mark in ("started", "late"):
            while not (tmp_path / mark).exists():
                time.sleep(0.05)
            process.terminate()
        assert process.stderr.read() == ""
    assert process.returncode == 143
    assert (tmp_path / "swept").exists()


def test_a_long_folder_for_temporary_files_is_no_trouble(tmp_path):
    """A socket's path has at most 107 bytes, and a batch system's folder may take them all."""
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    code = "import sys; sys.path.insert(0, '.')\nfrom tests.eval.test_workers import double\n"
    code += "from eval.core.jobs import Job, run_jobs\n"
    code += "if __name__ == '__main__': print(run_jobs('a', [Job('a', double, (3,))], 1))"
    path = tmp_path / "main.py"
    path.write_text(code)
    done = run(path, TMPDIR=str(deep), PYTHONPATH=".")
    assert done.stdout.strip() == "{'a': 6}", done.stderr


def test_workers_run_the_code_that_started_them(tmp_path):
    """Another checkout in the current folder is not it."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise RuntimeError('another checkout')")
    path = tmp_path / "main.py"
    path.write_text(
        f"import sys; sys.path[0] = {str(ROOT)!r}\nfrom tests.eval.test_workers import double\n"
        "from eval.core.jobs import Job, run_jobs\n"
        "if __name__ == '__main__': print(run_jobs('a', [Job('a', double, (3,))], 1))"
    )
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "{'a': 6}", done.stderr
