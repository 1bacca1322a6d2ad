"""Who answers a request: release or fallback, by the rollout; the fallback where the release does not.

Every request is answered or refused, whatever becomes of the release's process: what it has already sent is
kept, and the fallback goes on after it.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
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

    @property
    def prompt_bytes(self) -> int:
        return len(self.body.get("prompt", self.body.get("text", "")).encode())


@dataclass
class Outcome:
    """What became of a request, as it is logged."""

    arm: Arm
    stage: int
    served_by: str = ""
    error: bool = False  # its arm did not answer
    why: str = ""
    fallback_ms: float | None = None  # from the failure of the release to the fallback's first word
    latency_ms: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)


class Refused(ValueError):
    """The release's contract does not hold for such a request."""


class Router:
    def __init__(
        self,
        release: Child,
        fallback: Child,
        root: Path,
        target: str,
        rollout: Path | None,
        key: Public | None,
    ) -> None:
        self.children = {"release": release, "fallback": fallback}
        self.root, self.target, self.rollout, self.rollout_key = root, target, rollout, key
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
            check_arm("release", self.rollout, self.root, self.target, self.rollout_key)
            state = read_json(self.rollout / ROLLOUT)
            state.pop("log", None)
            self.state, why = State.model_validate(state), ""
        except (ReleaseError, ValueError) as error:
            why = " ".join(str(error).split())
        if why != self.stopped:
            log.warning("the fallback answers: %s", why) if why else log.warning("the rollout goes on")
        self.stopped = why

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
        return self.stopped or self.golden

    @property
    def ready(self) -> bool:
        """Both models have been there once, and the fallback is."""
        return bool(self.children["release"].facts) and self.children["fallback"].ready.is_set()

    def deal(self, ask: Ask) -> tuple[Arm, int]:
        """The arm of a request, and the stage in which it was dealt."""
        if self.rollout is None or (self.state is not None and self.state.status == "complete"):
            return "release", self.state.stage if self.state else 1
        if self.state is None or self.stopped:
            return "fallback", self.state.stage if self.state else 1
        plan, stage = self.state.plan, self.state.stage
        return arm_of(plan, stage, ask.key, ask.domain, ask.tenant, ask.prompt_bytes), stage

    async def answer(self, ask: Ask, outcome: Outcome) -> AsyncIterator[str]:
        """The pieces of an answer; `outcome` then holds what became of it.

        Raises:
            Refused: no model of this release answers such a request.
        """
        begin, sent = time.perf_counter(), list[str]()
        failed: float | None = None
        self.in_flight += 1
        try:
            if outcome.arm == "release":
                release = self.children["release"]
                off = self.off
                if release.ready.is_set() and release.facts["fallback"]:
                    off = off or release.facts["reason"]
                try:
                    if off:
                        raise ChildDied(off)
                    async for piece in self._from(release, ask.body, sent, outcome):
                        yield piece
                    outcome.served_by = "release"
                    return
                except ChildDied as error:
                    outcome.error, outcome.why, failed = True, str(error), time.perf_counter()
            async for piece in self._from_fallback(ask.body, sent, outcome):
                if failed is not None:
                    self._fell_back(outcome, failed)
                    failed = None
                yield piece
            if failed is not None:
                self._fell_back(outcome, failed)
            outcome.served_by = "fallback"
        finally:
            self.in_flight -= 1
            spent = time.perf_counter() - begin
            outcome.latency_ms = 1e3 * spent
            how = "failed over" if outcome.error else "answered" if outcome.served_by else "not answered"
            self.counts[outcome.arm, outcome.served_by or "nobody", how] += 1
            self.seconds += spent
            self.histogram.update(limit for limit in BUCKETS if spent <= limit)

    def _fell_back(self, outcome: Outcome, failed: float) -> None:
        outcome.fallback_ms = 1e3 * (time.perf_counter() - failed)
        self.longest_fallback_ms = max(self.longest_fallback_ms, outcome.fallback_ms)

    async def _from(
        self, child: Child, body: dict[str, Any], sent: list[str], outcome: Outcome
    ) -> AsyncIterator[str]:
        """What one child says, after what was said already."""
        if "prompt" in body:
            left = body["new_tokens"] - len(sent)
            if left <= 0:
                return
            body = {"prompt": body["prompt"] + "".join(sent), "new_tokens": left}
        async for message in child.ask(body):
            if "refused" in message:
                raise Refused(message["refused"])
            if "piece" in message:
                sent.append(message["piece"])
                yield message["piece"]
            else:
                outcome.result = {name: message[name] for name in ("bits", "bytes") if name in message}

    async def _from_fallback(
        self, body: dict[str, Any], sent: list[str], outcome: Outcome
    ) -> AsyncIterator[str]:
        fallback = self.children["fallback"]
        for attempt in range(1, ATTEMPTS + 1):
            await asyncio.wait_for(fallback.ready.wait(), fallback.patience)
            try:
                async for piece in self._from(fallback, body, sent, outcome):
                    yield piece
                return
            except ChildDied:
                if attempt == ATTEMPTS:
                    raise

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
