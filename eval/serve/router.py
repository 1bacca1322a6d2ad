"""Who answers a request: release or fallback, by the rollout; the fallback where the release does not.

Whatever becomes of the release's process, what it has already sent is kept, and the fallback goes on after
it. A request belongs to the arm of its key, whoever answers it: where its arm did not, that is an error.
"""

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eval.release.load_release import ROLLOUT, Public, ReleaseError, check_arm, read_json
from eval.serve.children import Child, ChildDied
from eval.watch.chain import State
from eval.watch.routing import arm_of

log = logging.getLogger("absorb.serve")

Arm = Literal["release", "fallback", "outside"]
EVERY = 0.5  # seconds between two looks at rollout.json
ATTEMPTS = 5  # at the fallback, which is started again when it dies
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


@dataclass
class Ask:
    """One request."""

    key: str
    body: dict[str, Any]  # `prompt` and `new_tokens`, or `text`
    domain: str = ""
    tenant: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def prompt_bytes(self) -> int:
        return len(self.body.get("prompt", self.body.get("text", "")).encode())


@dataclass
class Outcome:
    """What became of a request, as it is logged."""

    arm: Arm
    stage: int  # 0 where no rollout was read yet: such a request says nothing of an arm
    served_by: str = ""
    error: bool = False  # its arm did not answer, or not before the client gave up
    refused: bool = False
    why: str = ""
    fallback_ms: float | None = None  # from the failure of the release to the fallback's first word
    latency_ms: float = 0.0  # until the answer was whole, or nobody waited for it any longer
    result: dict[str, Any] = field(default_factory=dict)


class Refused(ValueError):
    """The release's contract does not hold for such a request."""


class Unanswered(RuntimeError):
    """Neither the release nor the fallback could answer."""


class Router:
    def __init__(
        self,
        release: Child,
        fallback: Child,
        root: Path,
        target: str,
        rollout: Path | None,
        keys: Public | None,
    ) -> None:
        self.children = {"release": release, "fallback": fallback}
        self.root, self.target, self.rollout, self.rollout_keys = root, target, rollout, keys
        self.state: State | None = None
        self.stopped = ""  # why the fallback answers everything
        self.golden = ""  # the same, once golden answers were not those of the release
        self.in_flight = 0
        self.counts: Counter[tuple[str, str, str]] = Counter()  # arm, served by, outcome
        self.histogram: Counter[float] = Counter()
        self.seconds = 0.0
        self.longest_fallback_ms = 0.0

    def read_rollout(self) -> None:
        """Obeys `rollout.json`; where it is damaged or says so, the fallback answers everything."""
        if self.rollout is None:
            return
        try:
            self.state, why = self._checked_state(self.rollout), ""
        except (ReleaseError, ValueError) as error:
            why = " ".join(str(error).split())
        if why != self.stopped:
            log.warning("the fallback answers: %s", why) if why else log.warning("the rollout goes on")
        self.stopped = why

    def _checked_state(self, rollout: Path) -> State:
        """The very state that was checked: where a step is written meanwhile, the new one is checked too."""
        state: dict[str, Any] | None = None
        while state != (current := read_json(rollout / ROLLOUT)):
            state = current
            check_arm("release", rollout, self.root, self.target, self.rollout_keys)
        return State.model_validate({name: value for name, value in state.items() if name != "log"})

    async def follow_rollout(self) -> None:
        while True:
            self.read_rollout()
            await asyncio.sleep(EVERY)

    async def check_golden(self, every: float) -> None:
        """Asks the release again and again for what it must say; after another answer it is off."""
        while not self.golden:
            await asyncio.sleep(every)
            if not self.children["release"].ready.is_set():
                continue
            try:
                async for message in self.children["release"].ask({"check": True}):
                    if "failed" in message:
                        self.golden = message["failed"]
                        log.warning("the fallback answers: %s", self.golden)
            except ChildDied as error:
                log.warning("golden answers were not asked for: %s", error)

    @property
    def off(self) -> str:
        """Why the release is asked nothing; empty where it is."""
        release = self.children["release"]
        is_fallback = release.ready.is_set() and release.facts["fallback"]  # its loader found something off
        return self.stopped or self.golden or (release.facts["reason"] if is_fallback else "")

    @property
    def status(self) -> str:
        """The same for who looks after the server."""
        return f"release is off: {self.off}" if self.off else "release is on"

    @property
    def ready(self) -> bool:
        """Both models have been there once, and the fallback is."""
        return bool(self.children["release"].facts) and self.children["fallback"].ready.is_set()

    def deal(self, ask: Ask) -> tuple[Arm, int]:
        """The arm of a request, by the hash alone, and the stage in which it was dealt.

        A release that is off is asked nothing, but what is dealt to it stays its own.
        """
        if self.rollout is None:
            return "release", 1
        if self.state is None:
            return "outside", 0
        plan, stage = self.state.plan, self.state.stage
        if self.state.status == "complete":
            return "release", stage
        return arm_of(plan, stage, ask.key, ask.domain, ask.tenant, ask.prompt_bytes), stage

    async def answer(self, ask: Ask, outcome: Outcome) -> AsyncGenerator[str, None]:
        """The pieces of an answer; `outcome` then holds what became of it, also where it was cut off.

        Raises:
            Refused: no model of this release answers such a request.
            Unanswered: neither process is there.
        """
        begin, how = time.perf_counter(), "not answered"
        self.in_flight += 1
        try:
            async with aclosing(self._answer(ask, outcome)) as pieces:
                async for piece in pieces:
                    yield piece
            how = "failed over" if outcome.error else "answered"
        except Refused:
            outcome.refused, how = True, "refused"
            raise
        except Unanswered as error:
            outcome.why = str(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome.why = "the client gave up, or the server ended"
            raise
        finally:
            self.in_flight -= 1
            spent = time.perf_counter() - begin
            outcome.latency_ms = 1e3 * spent
            outcome.error = outcome.error or how == "not answered"
            self.counts[outcome.arm, outcome.served_by or "nobody", how] += 1
            self.seconds += spent
            self.histogram.update(limit for limit in BUCKETS if spent <= limit)

    async def _answer(self, ask: Ask, outcome: Outcome) -> AsyncGenerator[str, None]:
        """The pieces by the release where it is its turn, and from where it fails by the fallback."""
        sent = list[str]()
        failed: float | None = None
        if outcome.arm == "release":
            release = self.children["release"]
            try:
                if self.off:
                    raise ChildDied(self.off)
                async with aclosing(self._from(release, ask.body, sent, outcome)) as pieces:
                    async for piece in pieces:
                        yield piece
                outcome.served_by = "release"
                return
            except ChildDied as error:
                outcome.error, outcome.why, failed = True, str(error), time.perf_counter()
        async with aclosing(self._from_fallback(ask.body, sent, outcome)) as pieces:
            async for piece in pieces:
                if failed is not None:
                    self._fell_back(outcome, failed)
                    failed = None
                yield piece
        if failed is not None:
            self._fell_back(outcome, failed)
        outcome.served_by = "fallback"

    def _fell_back(self, outcome: Outcome, failed: float) -> None:
        outcome.fallback_ms = 1e3 * (time.perf_counter() - failed)
        self.longest_fallback_ms = max(self.longest_fallback_ms, outcome.fallback_ms)

    async def _from(
        self, child: Child, body: dict[str, Any], sent: list[str], outcome: Outcome
    ) -> AsyncGenerator[str, None]:
        """What one child says, after what was said already."""
        if "prompt" in body:
            left = body["new_tokens"] - len(sent)
            if left <= 0:
                return
            body = {"prompt": body["prompt"] + "".join(sent), "new_tokens": left}
        async with aclosing(child.ask(body)) as messages:
            async for message in messages:
                if "refused" in message:
                    raise Refused(message["refused"])
                if "piece" in message:
                    sent.append(message["piece"])
                    yield message["piece"]
                else:
                    outcome.result = {name: message[name] for name in ("bits", "bytes") if name in message}

    async def _from_fallback(
        self, body: dict[str, Any], sent: list[str], outcome: Outcome
    ) -> AsyncGenerator[str, None]:
        fallback = self.children["fallback"]
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await asyncio.wait_for(fallback.ready.wait(), fallback.patience)
            except TimeoutError as error:
                why = f"the fallback was not ready for {fallback.patience:g} s"
                raise Unanswered(why) from error
            try:
                async with aclosing(self._from(fallback, body, sent, outcome)) as pieces:
                    async for piece in pieces:
                        yield piece
                return
            except ChildDied as error:
                if attempt == ATTEMPTS:
                    raise Unanswered(f"{error}, {ATTEMPTS} times") from error

    def metrics(self) -> str:
        """The text format of Prometheus."""
        lines = ["# TYPE absorb_requests_total counter"]
        lines += [
            f'absorb_requests_total{{arm="{arm}",served_by="{by}",outcome="{outcome}"}} {count}'
            for (arm, by, outcome), count in sorted(self.counts.items())
        ]
        total = sum(self.counts.values())
        lines.append("# TYPE absorb_request_seconds histogram")
        lines += [
            f'absorb_request_seconds_bucket{{le="{limit:g}"}} {self.histogram[limit]}' for limit in BUCKETS
        ]
        lines += [
            f'absorb_request_seconds_bucket{{le="+Inf"}} {total}',
            f"absorb_request_seconds_count {total}",
        ]
        lines.append(f"absorb_request_seconds_sum {self.seconds:.6f}")
        gauges = {
            "absorb_in_flight": self.in_flight,
            "absorb_rollout_stage": self.state.stage if self.state else 0,
            "absorb_release_is_off": int(bool(self.off)),
            "absorb_longest_fallback_seconds": self.longest_fallback_ms / 1e3,
        }
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        lines.append("# TYPE absorb_child_ready gauge")
        lines += [
            f'absorb_child_ready{{child="{n}"}} {int(c.ready.is_set())}' for n, c in self.children.items()
        ]
        lines.append("# TYPE absorb_child_starts_total counter")
        lines += [f'absorb_child_starts_total{{child="{n}"}} {c.starts}' for n, c in self.children.items()]
        return "\n".join(lines) + "\n"
