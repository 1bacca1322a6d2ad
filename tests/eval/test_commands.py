"""What all commands share: a log that may fail, and a result that `--json` writes where it is wanted."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from eval.core.commands import LOG, add_json, write_json
from eval.core.errors import UserError
from tests.helpers import ROOT, run

LOGGED = """
import sys
from pathlib import Path
from eval.core.commands import start_log
from eval.core.errors import entry

@entry
def main():
    start_log(Path(sys.argv[1]))
    print("judged")
    print("bad \\udcff", file=sys.stderr)
    if "--fail" in sys.argv:
        raise RuntimeError("the library's own words")
    return 2

main()
"""
OBSTACLES = [
    pytest.param(lambda path: path.symlink_to("/dev/full"), id="disk full"),
    pytest.param(lambda path: path.mkdir(), id="cannot be opened"),  # as on a read-only disk
]


def test_a_lone_surrogate_is_logged_with_its_number(tmp_path):
    done = run("-c", LOGGED, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "judged\n", "bad \\udcff\n")
    assert (tmp_path / LOG).read_text().splitlines()[-1].endswith(" bad \\udcff")


@pytest.mark.parametrize("obstruct", OBSTACLES)
def test_a_log_that_cannot_be_written_costs_one_warning_and_changes_no_exit_code(tmp_path, obstruct):
    obstruct(tmp_path / LOG)
    done = run("-c", LOGGED, tmp_path)
    warning, *rest = done.stderr.splitlines()
    assert warning.startswith(f"warning: {tmp_path / LOG}: ")
    assert warning.endswith("; this command goes on without its log")
    assert (done.returncode, done.stdout, rest) == (2, "judged\n", ["bad \\udcff"])


@pytest.mark.parametrize("obstruct", OBSTACLES)
def test_without_a_log_a_traceback_is_printed(tmp_path, obstruct):
    obstruct(tmp_path / LOG)
    done = run("-c", LOGGED, tmp_path, "--fail")
    assert done.returncode == 3
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.count("warning") == 1


def test_a_disk_that_is_full_only_when_the_traceback_comes_loses_none_of_it(tmp_path):
    fill = "logging.getLogger('absorb').handlers[0].setStream(open('/dev/full', 'w'))"
    code = "import logging\n" + LOGGED.replace("    if", f"    {fill}\n    if")
    done = run("-c", code, tmp_path, "--fail")
    assert done.returncode == 3
    assert done.stderr.count("Traceback") == done.stderr.count("warning") == 1


def json_path(path):
    parser = argparse.ArgumentParser()
    add_json(parser)
    return parser.parse_args(["--json", str(path)]).json


def test_a_result_is_written_into_a_pipe_and_never_in_place_of_it(tmp_path):
    """Nor into a device: these tests may run as root, so that none names one that a fault could delete."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as reader:
        for path in (pipe, link):
            write_json(json_path(path), {"a": 1})
            assert json.loads(reader.read()) == {"a": 1}
    assert link.is_symlink()
    assert pipe.is_fifo()


def test_a_result_reaches_the_file_behind_a_link_whether_it_exists_or_not(tmp_path):
    target, link = tmp_path / "deep" / "result.json", tmp_path / "link.json"
    link.symlink_to(target)
    for value in (1, 2):
        path = json_path(link)
        assert not target.exists()  # that of an earlier run
        write_json(path, {"a": value})
        assert link.is_symlink()
        assert json.loads(target.read_text()) == {"a": value}


def test_a_folder_is_no_file_for_a_result(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the path of a file"):
        json_path(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_result_on_standard_output_follows_what_was_printed(tmp_path, kind):
    code = """
import argparse
from eval.core.commands import add_json, write_json

parser = argparse.ArgumentParser()
add_json(parser)
args = parser.parse_args()
print("judged")
write_json(args.json, {})
"""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # what /dev/stdout is
    words = [sys.executable, "-c", code, "--json", str(tmp_path / "stdout")]
    if kind == "pipe":
        text = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    else:
        with (tmp_path / "out.txt").open("w") as out:
            subprocess.run(words, cwd=ROOT, stdout=out, check=True)
        text = (tmp_path / "out.txt").read_text()
    assert text == "judged\n{}\n"


WORKER = """
from pathlib import Path
import sys
from eval.core.commands import start_log
from eval.core.jobs import Job, run_jobs
from tests.eval.light_jobs import say
if __name__ == "__main__":
    start_log(Path(sys.argv[1]))
    run_jobs("work", [Job("a", say)], workers=1)
"""


def test_what_a_worker_prints_is_in_the_log_of_the_run(tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    done = run(tmp_path / "script.py", tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert "said by a worker" in done.stdout
    assert re.search(r"^\S+ \S+ \d+ said by a worker$", (tmp_path / "log.txt").read_text(), re.MULTILINE)


SWALLOWED = """
import signal
from contextlib import suppress
from eval.core.errors import entry
@entry
def main():
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    raise ImportError("cannot be imported")
try:
    main()
finally:
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_what_a_library_makes_of_an_interrupt_is_an_interrupt():
    """Some turn it into an error of their import. In a process of its own: a library may hold the signal here."""
    done = run("-c", SWALLOWED, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (130, "True\n"), done.stderr
    assert done.stderr == "stopped; the same command goes on where it was\n"


def test_an_interrupt_is_one_line_at_any_moment(tmp_path):
    for delay in (2.0, 4.0):  # earlier, the interpreter itself may still be starting
        words = [sys.executable, "distill/train.py", "--config", "tiny", "--runs", str(tmp_path)]
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            start_new_session=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the command's processes
        _, text = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT)
        assert text.splitlines()[-1] == "stopped; the same command goes on where it was"
        assert "Traceback" not in text
