"""Models as supervised child processes: one that dies is started again, and who waits learns it at once."""

import asyncio
import itertools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

log = logging.getLogger("absorb.serve")

LIVED = 10.0  # seconds after which a child counts as one that could run
LONGEST = 30.0  # seconds between two attempts at most
LINE = 2**22  # bytes of an answer
ODD = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OSError,
)  # a line is no message or too long; no process


class ChildDied(RuntimeError):
    """A child ended, or is not there, before its answer was whole."""


class Child:
    """One process of `eval.serve.worker`."""

    def __init__(self, name: str, given: dict[str, Any], patience: float) -> None:
        self.name, self.patience = name, patience
        self.words = [sys.executable, "-m", "eval.serve.worker", json.dumps(given)]
        self.ready = asyncio.Event()
        self.facts: dict[str, Any] = {}  # what it said when it was ready
        self.process: asyncio.subprocess.Process | None = None
        self.starts = 0
        self.waiting: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self.numbers = itertools.count()

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    async def supervise(self) -> None:
        """Runs for ever: starts the process, hands out what it says, starts it again."""
        failures = 0
        while True:
            begin = time.monotonic()
            try:
                await self._live()
            except ODD as error:
                log.warning("%s: %s: %s", self.name, type(error).__name__, error)
            failures = 0 if time.monotonic() - begin > LIVED else failures + 1
            delay = min(2.0 ** (failures - 1), LONGEST) if failures > 1 else 0.0
            log.warning("%s ended; it is started again in %g s", self.name, delay)
            await asyncio.sleep(delay)

    async def _live(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*self.words, stdin=pipe, stdout=pipe, limit=LINE)
        self.starts += 1
        assert self.process.stdout is not None
        try:
            async for line in self.process.stdout:
                message = json.loads(line)
                if "ready" in message:
                    self.facts = message
                    self.ready.set()
                elif (queue := self.waiting.get(message.pop("id"))) is not None:
                    queue.put_nowait(message)
        finally:
            self.ready.clear()
            for queue in self.waiting.values():
                queue.put_nowait(None)
            self.waiting.clear()
            if self.process.returncode is None:  # Popen.kill would take its exit code from asyncio
                with suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGKILL)
            await self.process.wait()

    async def ask(self, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The messages of one answer; where it is closed before its end, the process is told to stop.

        Raises:
            ChildDied: the process ended, was not there, or said nothing for so long that it was ended.
        """
        if not self.ready.is_set() or self.process is None or self.process.stdin is None:
            raise ChildDied(f"{self.name} is not ready")
        number = next(self.numbers)
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.waiting[number], stdin, whole = queue, self.process.stdin, False
        try:
            stdin.write(json.dumps({"id": number, **request}).encode() + b"\n")
            while True:
                try:
                    message = await asyncio.wait_for(queue.get(), self.patience)
                except TimeoutError as error:
                    with suppress(ProcessLookupError):
                        self.process.kill()
                    raise ChildDied(f"{self.name} said nothing for {self.patience:g} s") from error
                if message is None:
                    raise ChildDied(f"{self.name} ended")
                whole = "piece" not in message
                yield message
                if whole:
                    return
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChildDied(f"{self.name} ended") from error
        finally:
            waited = self.waiting.pop(number, None) is not None  # else the process ended
            if waited and not whole:
                stdin.write(json.dumps({"cancel": number}).encode() + b"\n")
