"""Jobs side by side: their order, their errors, and no life after their parent."""

import logging
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


def vanish(report):
    os.kill(os.getpid(), signal.SIGKILL)


def test_jobs_wait_for_what_they_need_and_run_in_one_thread_workers(tmp_path, capsys):
    jobs = [
        Job("last", note, (tmp_path, "last"), after=("first", "second")),
        Job("first", note, (tmp_path, "first")),
        Job("second", note, (tmp_path, "second"), after=("first", "elsewhere")),
    ]
    results = run_jobs("work", jobs, workers=2)
    assert (tmp_path / "log").read_text().split() == ["first", "second", "last"]
    assert all(threads == 1 and pid != os.getpid() for _, threads, pid in results.values())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "3 of 3" in lines[-1]
    assert "left" in lines[-1]


def learn(report):
    for step in range(3):
        time.sleep(0.01)
        report(step / 3, tokens=100)


def test_progress_shows_tokens_per_second(capsys):
    run_in_turn("work", [Job("a", learn)])
    match = re.search(r"a done, 1 of 1, ([\d,]+) tokens/s", capsys.readouterr().err)
    assert 0 < int(match[1].replace(",", "")) <= 100 / 0.01


def test_in_turn_gives_the_same(tmp_path):
    jobs = [Job("a", note, (tmp_path, "a")), Job("b", note, (tmp_path, "b"), after=("a",))]
    assert [run_in_turn("work", jobs)[name][0] for name in "ab"] == ["a", "b"]


def test_the_first_error_ends_the_rest_whole(tmp_path):
    jobs = [Job("bad", refuse), Job("after", note, (tmp_path, "after"), after=("bad",))]
    with pytest.raises(UserError) as caught:
        run_jobs("work", jobs, workers=2)
    assert (caught.value.thing, caught.value.problem, caught.value.fix) == ("thing", "found", "fix")
    assert not (tmp_path / "log").exists()


def dawdle(report):
    time.sleep(120)


def vanish_later(report):
    time.sleep(2)
    vanish(report)


@pytest.mark.parametrize("after", [(), ("quick",)])
def test_a_killed_worker_ends_the_others_that_work(tmp_path, after):
    """They must not go on for long, whether a job has finished before the death or not."""
    jobs = [Job("quick", note, (tmp_path, "quick"))] * len(after)
    jobs += [Job("gone", vanish_later), Job("slow", dawdle, after=after)]
    start = time.monotonic()
    with pytest.raises(UserError, match="a worker of all: was killed"):
        run_jobs("all", jobs, 2)
    assert time.monotonic() - start < 60


class SlowToGo:
    def __del__(self):
        time.sleep(0.3)


def make_garbage(folder, report):
    """Is nearly always in a finalizer, which would take the exception of a signal with it."""
    try:
        while True:
            SlowToGo()
            time.sleep(0.1)
    finally:
        (Path(folder) / "unwound").touch()


def refuse_late(report):
    time.sleep(0.8)
    raise UserError("thing", "found", "fix")


def test_a_signal_that_meets_a_finalizer_still_unwinds_the_job(tmp_path, capfd):
    jobs = [Job("garbage", make_garbage, (tmp_path,)), Job("refusing", refuse_late)]
    with pytest.raises(UserError, match="thing: found; fix"):
        run_jobs("work", jobs, workers=2)
    assert (tmp_path / "unwound").is_file(), "the exception was lost, and the worker killed"
    assert "Traceback" not in capfd.readouterr().err


def test_a_killed_worker_is_reported():
    message = "a worker of work: was killed; free some memory or give --workers 1; run again to continue"
    with pytest.raises(UserError, match=message):
        run_jobs("work", [Job("gone", vanish)], workers=1)


class TwoPartError(Exception):
    """Pickles, but cannot be unpickled: its arguments are not those of its constructor."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")


def raise_two_part_error(report):
    raise TwoPartError(7, "no kernel")


def raise_local_error(report):
    class LocalError(Exception):
        """Cannot be pickled: no other process can import it."""

    raise LocalError("two\nlines")


def open_missing(path, report):
    return Path(path).read_text()


def return_lambda(report):
    return lambda: None


@pytest.fixture
def log_records():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("absorb")
    log.addHandler(handler)
    yield records
    log.removeHandler(handler)


@pytest.mark.parametrize(
    ("function", "text"),
    [(raise_two_part_error, "TwoPartError: 7: no kernel"), (raise_local_error, "LocalError: two lines")],
)
def test_an_error_that_cannot_be_unpickled_becomes_one_line(log_records, function, text):
    with pytest.raises(UserError) as caught:
        run_jobs("work", [Job("bad", function)], workers=1)
    assert str(caught.value) == f"job bad: {text}; the traceback is in the run's log"
    assert f"in {function.__name__}" in log_records[0].getMessage()


def test_an_error_that_can_be_unpickled_arrives_as_it_was(log_records, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        run_jobs("work", [Job("bad", open_missing, (tmp_path / "missing",))], workers=1)
    assert caught.value.filename == str(tmp_path / "missing")
    assert "in open_missing" in log_records[0].getMessage()


def test_a_user_error_is_not_logged(log_records):
    with pytest.raises(UserError):
        run_jobs("work", [Job("bad", refuse)], workers=1)
    assert log_records == []


def test_without_a_log_nothing_is_printed_and_the_traceback_is_the_cause(capfd, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        run_jobs("work", [Job("bad", open_missing, (tmp_path / "missing",))], workers=1)
    assert "in open_missing" in str(caught.value.__cause__)
    assert capfd.readouterr().err == ""


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_job(log_records):
    with pytest.raises(Exception, match="return_lambda"):
        run_jobs("work", [Job("bad", return_lambda)], workers=1)


def throw(error, report):
    raise error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SystemExit(), "SystemExit"),
        (SystemExit(0), "SystemExit: 0"),
        (SystemExit(1), "SystemExit: 1"),
        (GeneratorExit(), "GeneratorExit"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_job_that_ends_its_process_is_an_error_of_the_job(error, text):
    """Raised here, such an exception would end the command as if it had passed, failed or been stopped."""
    message = f"job bad: {text}; the traceback is in the run's log"
    with pytest.raises(UserError) as caught:
        run_jobs("work", [Job("bad", throw, (error,))], workers=1)
    assert str(caught.value) == message
    if not isinstance(error, KeyboardInterrupt):  # in this process it is the user's
        with pytest.raises(UserError) as caught:
            run_in_turn("work", [Job("bad", throw, (error,))])
        assert str(caught.value) == message


class MuteError(Exception):
    def __str__(self):
        raise TypeError("no text")


def test_an_error_without_a_text_is_reported_by_its_type():
    with pytest.raises(UserError) as caught:
        run_jobs("work", [Job("bad", throw, (MuteError(),))], workers=1)
    assert str(caught.value) == "job bad: MuteError; the traceback is in the run's log"


def make_bytes(count, report):
    report(0.5)
    return b"x" * count


def test_a_result_larger_than_the_pipe_arrives_whole():
    results = run_jobs("work", [Job("large", make_bytes, (3_000_000,))], workers=1)
    assert results["large"] == b"x" * 3_000_000


def leave(code, report):
    os._exit(code)


@pytest.mark.parametrize("code", [0, 5])
def test_a_worker_that_leaves_without_a_result_is_reported(code):
    with pytest.raises(UserError, match=f"job gone: its process ended with exit code {code} and no result"):
        run_jobs("work", [Job("gone", leave, (code,))], workers=1)


PACKAGE_MAIN = """
from eval.core.jobs import Job, run_jobs

def work(report):
    pass

if __name__ == "__main__":
    run_jobs("work", [Job("a", work)], 1)
"""


def test_a_function_of_a_package_s_main_module_is_refused(tmp_path):
    """Workers do not import that module again, so that they would not find the function."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "__init__.py").touch()
    (tmp_path / "room" / "__main__.py").write_text(PACKAGE_MAIN)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "room"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "AssertionError: job a: work is defined in room.__main__" in done.stderr


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
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # as on a read-only disk, where even root cannot write
    with pytest.raises(UserError, match=r"run folder .*: Is a directory; copy it"), lock_folder(tmp_path):
        pass


UNWINDING = """
import atexit, signal, sys, time, weakref
from pathlib import Path
from eval.core.jobs import _unwind_once

class Held:
    pass

def late(folder):
    (folder / "late").touch()
    time.sleep(1)
    (folder / "swept").touch()

folder, held = Path(sys.argv[1]), Held()
weakref.finalize(held, late, folder)
signal.signal(signal.SIGTERM, _unwind_once)
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
    code = "import sys; sys.path.insert(0, '.')\nfrom tests.eval.light_jobs import double\n"
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
        f"import sys; sys.path[0] = {str(ROOT)!r}\nfrom tests.eval.light_jobs import double\n"
        "from eval.core.jobs import Job, run_jobs\n"
        "if __name__ == '__main__': print(run_jobs('a', [Job('a', double, (3,))], 1))"
    )
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "{'a': 6}", done.stderr
