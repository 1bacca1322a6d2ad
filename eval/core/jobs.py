"""Jobs with dependencies, run side by side in one-thread processes, with progress and time left.

On a few cores, one-thread processes side by side finish independent work sooner than one process with
many threads; and one thread adds up in one order, so that a result does not depend on the schedule.
"""

import fcntl
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait as wait_for_sentinel
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from eval.core.errors import UserError

HEAVY = ["transformers.modeling_utils"]  # imported once, by the process from which all workers are forked
Report = Callable[[float], None]  # tells the share of the job that is done, 0 to 1


class Progress(Protocol):
    """A report that also takes the tokens learned from since the last one."""

    def __call__(self, share: float, tokens: int = 0) -> None: ...


@dataclass(frozen=True)
class Job:
    """One piece of work: `run(*args, report)` in some worker, after the jobs named in `after`."""

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...] = ()
    after: tuple[str, ...] = ()
    weight: float = 1.0  # expected cost, for the time left


GRACE = 20.0  # seconds to unwind in


@dataclass
class _Worker:
    queue: Any = None
    last: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # learned from, and not yet told


_WORKER = _Worker()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_sentinel([parent.sentinel])
    os._exit(1)


class _Told(SystemExit):
    """The parent asks the worker to end."""


def _end(*_: Any) -> None:
    """Unwinds, so that what lies aside is swept; once, for a broken pool sends a second signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Told(143)


def _start(queue: Any) -> None:
    """A worker's first act: one thread, and no life after its parent's (kill -9 leaves no orphan)."""
    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _WORKER.queue = queue


def _call(job: Job) -> Any:
    signal.signal(signal.SIGTERM, _end)  # only here: a worker without a job may die as it is

    def report(share: float, tokens: int = 0) -> None:
        _WORKER.tokens += tokens
        if time.monotonic() - _WORKER.last.get(job.name, 0.0) > 0.2:
            _WORKER.last[job.name] = time.monotonic()
            _WORKER.queue.put((job.name, share, _WORKER.tokens))
            _WORKER.tokens = 0

    try:
        return job.run(*job.args, report)
    except _Told:  # and unwound; the pool would take it for a result and wait for more
        os._exit(143)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Speed:
    """Tokens per second over the last seconds."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self.seen: deque[tuple[float, int]] = deque()

    def add(self, tokens: int) -> None:
        self.seen.append((time.monotonic(), tokens))

    def __str__(self) -> str:
        now = time.monotonic()
        while self.seen and self.seen[0][0] < now - self.seconds:
            self.seen.popleft()
        if len(self.seen) < 2:
            return ""
        counted = list(self.seen)[1:]  # the first one's tokens came before its time
        rate = sum(tokens for _, tokens in counted) / max(now - self.seen[0][0], 1e-9)
        return f"{rate:,.0f} tokens/s"


class _Board:
    """What people see: one bar with the time left, or a plain line per finished job off a terminal."""

    def __init__(self, title: str, jobs: list[Job]) -> None:
        self.weights = {job.name: job.weight for job in jobs}
        self.done = 0
        self.shares: dict[str, float] = {}
        self.started = time.monotonic()
        self.title = title
        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]} {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.speed = _Speed()
        self.task = self.bar.add_task(title, total=sum(self.weights.values()) or 1.0, now="", speed="")

    def update(self, name: str, share: float, tokens: int = 0) -> None:
        self.shares[name] = share
        if tokens:
            self.speed.add(tokens)
        done = sum(self.weights[n] * s for n, s in self.shares.items())
        running = [n for n, s in self.shares.items() if s < 1]
        self.bar.update(self.task, completed=round(done), now=", ".join(running), speed=str(self.speed))

    def finish(self, name: str) -> None:
        self.update(name, 1.0)
        self.done += 1
        if self.console.is_terminal:
            return
        spent = time.monotonic() - self.started
        share = sum(self.weights[n] * s for n, s in self.shares.items()) / sum(self.weights.values())
        left = spent / share - spent if share else 0.0
        speed = f"{self.speed}, " if str(self.speed) else ""
        print(
            f"{self.title}: {name} done, {self.done} of {len(self.weights)}, "
            f"{speed}{spent:.0f} s, about {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )


def run_in_turn(title: str, jobs: list[Job], quiet: bool = False) -> dict[str, Any]:
    """Runs every job in this process, in the given order, which must respect `after`."""
    board = _Board(title, jobs)
    board.bar.disable = board.bar.disable or quiet
    results: dict[str, Any] = {}
    with board.bar:
        for job in jobs:
            results[job.name] = job.run(*job.args, partial(board.update, job.name))
            if not quiet:
                board.finish(job.name)
    return results


def run_jobs(title: str, jobs: list[Job], workers: int) -> dict[str, Any]:
    """Runs every job side by side; returns the results by name. The first error ends the rest."""
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names), "job names are unique"
    if not jobs:
        return {}
    context = _context()
    queue = context.Queue()
    board = _Board(title, jobs)
    results: dict[str, Any] = {}
    waiting, running = list(jobs), dict[Future[Any], Job]()
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start, initargs=(queue,))
    try:
        with board.bar:
            while waiting or running:
                ready = [j for j in waiting if all(a in results or a not in names for a in j.after)]
                for job in ready[: max(0, workers - len(running))]:
                    waiting.remove(job)
                    board.update(job.name, 0.0)
                    running[pool.submit(_call, job)] = job
                assert running, f"jobs wait for each other: {[j.name for j in waiting]}"
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                # a pool that has just begun a worker may not watch it before its next result
                if not finished and wait_for_sentinel([p.sentinel for p in _processes(pool)], 0):
                    raise BrokenProcessPool
                while not queue.empty():
                    name, share, tokens = queue.get()
                    if name not in results:
                        board.update(name, share, tokens)
                for future in finished:
                    job = running.pop(future)
                    results[job.name] = future.result()
                    board.finish(job.name)
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker of {title}",
            "was killed",
            "free some memory or give --workers 1; run again to continue",
        ) from error
    finally:
        _stop(pool)
    return results


def _context() -> BaseContext:
    """Fresh processes; where forking is safe, from one that has imported the heavy libraries.

    That one looks for modules in the current folder first, so it imports none of ours; and its socket below
    the folder for temporary files must have a name of at most 107 bytes.
    """
    if sys.platform != "linux" or len(tempfile.gettempdir()) > 70:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def _processes(pool: ProcessPoolExecutor) -> list[Any]:
    return list((pool._processes or {}).values())


def _stop(pool: ProcessPoolExecutor) -> None:
    """Ends the workers at once: what they were writing lies aside and is swept by the next run."""
    processes = _processes(pool)
    for process in processes:
        process.terminate()
    late = time.monotonic() + GRACE
    for process in processes:
        if not wait_for_sentinel([process.sentinel], max(0.0, late - time.monotonic())):
            process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process alone.

    Raises:
        UserError: another process holds it.
    """
    with (folder / ".lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise UserError(
                f"run folder {folder}", f"held by process {holder}", "wait for it, or end it"
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
