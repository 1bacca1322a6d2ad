"""Jobs with dependencies, run side by side in one-thread processes, with progress and time left.

One thread adds up in one order: a result does not depend on the schedule.
"""

import fcntl
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from eval.core.board import Board
from eval.core.errors import UserError

# Imported once, by the process from which all workers are forked.
HEAVY = ["transformers.modeling_utils", "pydantic", "scipy.special"]
GRACE = 20.0  # seconds that a worker has to end in, before it is killed
_SIGTERM_CODE = 128 + signal.SIGTERM
REPORT_INTERVAL = 0.2  # s, of a worker
Report = Callable[[float], None]  # takes the share of the job that is done, 0 to 1


class Progress(Protocol):
    """A report that also takes the tokens learned from since the last one."""

    def __call__(self, share: float, tokens: int = 0) -> None: ...


@dataclass(frozen=True)
class Job:
    """One piece of work: `run(*args, report)` in a process of its own, after the jobs named in `after`."""

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()
    weight: float = 1.0  # expected cost, for the time left


@dataclass(frozen=True)
class _Failure:
    """An exception of a job on its way to the parent, which may be unable to unpickle it."""

    pickled: bytes  # empty where it cannot be pickled
    summary: str  # its type and text, in one line
    traceback: str

    @classmethod
    def describe(cls, error: BaseException) -> "_Failure":
        pickled, summary = b"", type(error).__name__
        with suppress(Exception):  # it has no text, or refers to what only its library knows
            summary = _summarize(error)
            pickled = pickle.dumps(error)
        return cls(pickled, summary, traceback.format_exc())

    def restore(self, job: Job) -> Exception:
        """The exception as it was, or a UserError with its text; its traceback goes to the log.

        SystemExit and its like become a UserError too: they would end the command with another exit code.
        """
        error: Exception | None = None
        with suppress(Exception):  # its constructor takes other arguments, or its module is unknown here
            loaded = pickle.loads(self.pickled)
            error = loaded if isinstance(loaded, Exception) and _summarize(loaded) == self.summary else None
        if isinstance(error, UserError):
            return error
        error = error or UserError(f"job {job.name}", self.summary, "the traceback is in the run's log")
        log = logging.getLogger("absorb")
        if log.handlers:
            log.error("job %s failed:\n%s", job.name, self.traceback)
        else:
            error.__cause__ = RuntimeError(f"in job {job.name}:\n{self.traceback}")
        return error


def _summarize(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Terminated(SystemExit):
    """The parent has sent SIGTERM to its worker."""


def _unwind_once(*_: Any) -> None:
    """Raises, so that temporary files are removed; a second signal must not interrupt the removal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated(_SIGTERM_CODE)


def _terminate_again(unraisable: Any) -> None:
    """A finalizer that ran when SIGTERM came took the exception with it: the signal is sent once more."""
    if isinstance(unraisable.exc_value, _Terminated):
        signal.signal(signal.SIGTERM, _unwind_once)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
    else:
        sys.__unraisablehook__(unraisable)


class _Reporter:
    """Sends the progress of a job to the parent, a few times per second at most."""

    def __init__(self, sender: Connection) -> None:
        self.sender = sender
        self.sent_at = 0.0
        self.unsent_tokens = 0

    def __call__(self, share: float, tokens: int = 0) -> None:
        self.unsent_tokens += tokens
        if time.monotonic() - self.sent_at > REPORT_INTERVAL:
            self.sent_at = time.monotonic()
            self.sender.send_bytes(pickle.dumps((share, self.unsent_tokens)))
            self.unsent_tokens = 0


def _run_job(pickled: bytes, sender: Connection) -> None:
    """Runs one job on one thread, and ends when its parent does (kill -9 leaves no orphan).

    Sends (share, tokens) any number of times, then (result,) or a _Failure.
    """
    import torch  # takes a second: not for the help of commands

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C: the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _unwind_once)
    sys.unraisablehook = _terminate_again
    try:
        start_log, job = pickle.loads(pickled)  # here, so that a failing import is an error of the job
        if start_log is not None:
            start_log()
        message = pickle.dumps((job.run(*job.args, _Reporter(sender)),))
    except _Terminated:
        raise
    except BaseException as error:
        message = pickle.dumps(_Failure.describe(error))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sender.send_bytes(message)


@dataclass(frozen=True)
class _Worker:
    """A process that runs one job, seen from the parent."""

    job: Job
    process: BaseProcess
    receiver: Connection

    @classmethod
    def start(cls, context: BaseContext, job: Job) -> "_Worker":
        receiver, sender = context.Pipe(duplex=False)
        handler = next(iter(logging.getLogger("absorb").handlers), None)
        start_log = getattr(handler, "start_in_worker", None)
        parts = pickle.dumps((start_log, job)), sender
        process = context.Process(target=_run_job, args=parts)  # type: ignore[attr-defined]
        process.start()
        sender.close()  # the worker's is the only one now: its death ends the pipe
        return cls(job, process, receiver)

    def read(self, title: str, board: "Board") -> tuple[Any] | None:
        """Passes the progress on; returns (result,) once the job is done, None before.

        Raises:
            UserError: the worker ended without a result.
            Exception: what the job raised.
        """
        while self.receiver.poll():
            try:
                received = self.receiver.recv_bytes()
            except (EOFError, OSError):  # OSError: it ended in the middle of a message
                raise self._death(title) from None
            message = pickle.loads(received)
            if isinstance(message, _Failure):
                raise message.restore(self.job)
            if len(message) == 1:
                return (message[0],)
            board.update(self.job.name, *message)
        if not self.process.is_alive() and not self.receiver.poll():
            raise self._death(title)
        return None

    def _death(self, title: str) -> UserError:
        """Says how the worker ended without a result."""
        self.process.join(GRACE)
        code, fix = self.process.exitcode, "free some memory or give --workers 1; run again to continue"
        if code is None or code < 0 or code == _SIGTERM_CODE:
            return UserError(f"a worker of {title}", "was killed", fix)
        problem = f"its process ended with exit code {code} and no result"
        return UserError(f"job {self.job.name}", problem, "see its output above; run again to continue")


def _end_processes(workers: list[_Worker], terminate: bool) -> None:
    """Ends the processes of workers. They leave temporary folders, which the next run removes."""
    for worker in workers if terminate else []:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.receiver.close()


def run_in_turn(title: str, jobs: list[Job], quiet: bool = False) -> dict[str, Any]:
    """Runs every job in this process, in the given order, which must respect `after`.

    Raises:
        UserError: a job called `sys.exit()`.
    """
    board = Board(title, {job.name: job.weight for job in jobs})
    board.bar.disable = board.bar.disable or quiet
    results: dict[str, Any] = {}
    with board.bar:
        for job in jobs:
            try:
                results[job.name] = job.run(*job.args, partial(board.update, job.name))
            except (Exception, KeyboardInterrupt):
                raise
            except BaseException as error:
                raise _Failure.describe(error).restore(job) from error
            if not quiet:
                board.finish(job.name)
    return results


def run_jobs(title: str, jobs: list[Job], workers: int) -> dict[str, Any]:
    """Runs every job side by side; returns the results by name. The first error ends the rest.

    Raises:
        UserError: a worker was killed, or a job raised what cannot be unpickled here or is no Exception.
        Exception: what a job raised.
    """
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names), "job names are unique"
    for job in jobs:
        _assert_importable(job)
    if not jobs:
        return {}
    context = _context()
    board = Board(title, {job.name: job.weight for job in jobs})
    results, waiting, running = dict[str, Any](), list(jobs), list[_Worker]()
    try:
        with board.bar:
            while waiting or running:
                ready = [j for j in waiting if all(a in results or a not in names for a in j.after)]
                for job in ready[: max(0, workers - len(running))]:
                    waiting.remove(job)
                    board.update(job.name, 0.0)
                    running.append(_Worker.start(context, job))
                assert running, f"jobs wait for each other: {[j.name for j in waiting]}"
                wait([w.receiver for w in running] + [w.process.sentinel for w in running])
                for worker in list(running):
                    result = worker.read(title, board)
                    if result is not None:
                        results[worker.job.name] = result[0]
                        _end_processes([worker], terminate=False)
                        running.remove(worker)
                        board.finish(worker.job.name)
    finally:
        _end_processes(running, terminate=True)
    return results


def _assert_importable(job: Job) -> None:
    """Workers import a script's or module's `__main__` again, but not that of a package."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name.endswith(".__main__"):
        function = getattr(job.run, "__name__", job.run)
        assert job.run.__module__ != "__main__", (
            f"job {job.name}: {function} is defined in {spec.name}, which workers do not import; "
            "define it in another module"
        )


def _context() -> BaseContext:
    """Fresh processes; where forking is safe, from one that has imported heavy libraries and none of ours."""
    # The name of its socket, below the folder for temporary files, has at most 107 bytes.
    if sys.platform != "linux" or len(tempfile.gettempdir()) > 70:
        return multiprocessing.get_context("spawn")
    forkserver.set_forkserver_preload(HEAVY)
    resource_tracker.ensure_running()  # its own start would unblock the signal below
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C in its imports would be a traceback
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return multiprocessing.get_context("forkserver")


def find_holder(folder: Path) -> str:
    """The process that holds a run folder, by its number; empty if none does."""
    path = folder / ".lock"
    if not path.is_file():
        return ""
    with path.open(errors="replace") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "unknown"
    return ""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process alone.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    try:
        lock = (folder / ".lock").open("a+", errors="replace")
    except OSError as error:
        fix = "copy it to a place where you may write"
        raise UserError(f"run folder {folder}", error.strerror, fix) from error
    with lock as stream:
        for seconds in (0.1, None):  # `find_holder` may hold it for a moment
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if seconds is None:
                    stream.seek(0)
                    holder = f"held by process {stream.read().strip() or 'unknown'}"
                    raise UserError(f"run folder {folder}", holder, "wait for it, or end it") from error
                time.sleep(seconds)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
