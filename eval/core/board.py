"""The progress of jobs on the terminal, with speed and time left."""

import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Speed:
    """Tokens per second over the last seconds."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds = seconds
        self.reports: deque[tuple[float, int]] = deque()  # (time, tokens since the report before)

    def add(self, tokens: int) -> None:
        self.reports.append((time.monotonic(), tokens))

    def __str__(self) -> str:
        now = time.monotonic()
        while self.reports and self.reports[0][0] < now - self.seconds:
            self.reports.popleft()
        if len(self.reports) < 2:
            return ""
        total = sum(tokens for _, tokens in list(self.reports)[1:])  # the first's came before its time
        return f"{total / max(now - self.reports[0][0], 1e-9):,.0f} tokens/s"


class Board:
    """What people see: one bar with the time left, or a plain line per finished job off a terminal.

    Args:
        weights: name -> expected cost of every job.
    """

    def __init__(self, title: str, weights: dict[str, float]) -> None:
        self.weights = weights
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
        self.speed = Speed()
        self.task = self.bar.add_task(title, total=sum(self.weights.values()) or 1.0, now="", speed="")

    def update(self, name: str, share: float, tokens: int = 0) -> None:
        self.shares[name] = share
        if tokens:
            self.speed.add(tokens)
        done = sum(self.weights[n] * s for n, s in self.shares.items())
        running = ", ".join(n for n, s in self.shares.items() if s < 1)
        self.bar.update(self.task, completed=round(done), now=running, speed=str(self.speed))

    def finish(self, name: str) -> None:
        self.update(name, 1.0)
        self.done += 1
        if self.console.is_terminal:
            return
        elapsed = time.monotonic() - self.started
        share = sum(self.weights[n] * s for n, s in self.shares.items()) / sum(self.weights.values())
        left = elapsed / share - elapsed if share else 0.0
        speed = f"{self.speed}, " if str(self.speed) else ""
        finished = f"{self.title}: {name} done, {self.done} of {len(self.weights)}"
        line = f"{finished}, {speed}{elapsed:.0f} s, about {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)
