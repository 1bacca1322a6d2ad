"""The HTTP side of the server: bodies, answers, the log of requests."""

import asyncio
import json
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from eval.serve.router import Ask, Outcome, Refused, Router, Unanswered
from eval.watch.routing import now

LATER = {"Retry-After": "1"}  # seconds
REMEMBERED = 100_000  # answers that may still be rewarded


class Body(BaseModel):
    """What both kinds of requests hold."""

    model_config = ConfigDict(extra="forbid")

    key: str | None = Field(None, min_length=1, max_length=1000)  # none: each request is one of its own
    domain: str = ""
    tenant: str = ""


class Generate(Body):
    prompt: str
    new_tokens: int = Field(32, ge=1, le=4096)
    stream: bool = False


class Score(Body):
    text: str = Field(min_length=1)


class Rewarded(BaseModel):
    """What an answer was worth to a user, or by a label."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1, max_length=100)  # that came with the answer
    reward: float = Field(ge=0, le=1)


class Log:
    """The log of requests that `eval.watch.rollout step` reads; no text is kept.

    Every request that was dealt and not refused is in it, however it ended: were those left out whose clients
    gave up, a release that is too slow would show neither errors nor latencies.
    """

    def __init__(self, path: Path | None) -> None:
        self.stream = path.open("a", encoding="utf-8", buffering=1) if path else None
        self.waiting: OrderedDict[str, None] = OrderedDict()  # ids that were logged and not rewarded

    def write(self, ask: Ask, outcome: Outcome) -> None:
        if self.stream is not None and outcome.stage and not outcome.refused:
            row = {"key": ask.key, "id": ask.id, "time": now(), **vars(outcome), **outcome.result}
            del row["result"], row["refused"]
            about = {"domain": ask.domain, "tenant": ask.tenant, "prompt_bytes": ask.prompt_bytes}
            self.stream.write(json.dumps(row | about) + "\n")
            self.waiting[ask.id] = None
            if len(self.waiting) > REMEMBERED:
                self.waiting.popitem(last=False)

    def reward(self, id: str, reward: float) -> bool:
        """Adds a line for a request of this log; False: none of that id is waiting for a reward."""
        if self.stream is None or id not in self.waiting:
            return False
        del self.waiting[id]
        self.stream.write(json.dumps({"reward_of": id, "reward": reward, "time": now()}) + "\n")
        return True


def facts(ask: Ask, outcome: Outcome) -> dict[str, Any]:
    """What a client gets beside the answer."""
    return {
        "id": ask.id,
        "arm": outcome.arm,
        "served_by": outcome.served_by,
        "fallback_ms": outcome.fallback_ms,
        **outcome.result,
    }


async def departure(client: Request) -> None:
    """Waits until the client has closed its connection."""
    while (await client.receive())["type"] != "http.disconnect":
        pass


class Server:
    def __init__(self, router: Router, log: Log, most: int, golden_every: float) -> None:
        self.router, self.log, self.most, self.golden_every = router, log, most, golden_every

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """The models and what looks after them, for as long as the server runs."""
        router = self.router
        router.read_rollout()
        jobs = [child.supervise() for child in router.children.values()]
        jobs += [router.follow_rollout(), router.check_golden(self.golden_every)]
        tasks = [asyncio.create_task(job) for job in jobs]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def ask(self, body: Body, **what: Any) -> tuple[Ask, Outcome]:
        starting = not all(child.facts for child in self.router.children.values())
        if starting or self.router.in_flight >= self.most:
            why = "models are being loaded" if starting else f"{self.most} requests are open"
            raise HTTPException(503, why, headers=LATER)
        ask = Ask(body.key or uuid.uuid4().hex, what, body.domain, body.tenant)
        return ask, Outcome(*self.router.deal(ask))

    async def logged(self, ask: Ask, outcome: Outcome) -> AsyncGenerator[str, None]:
        """The pieces of an answer; what became of it is logged when it ends, is cut off or fails."""
        try:
            async with aclosing(self.router.answer(ask, outcome)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self.log.write(ask, outcome)

    async def joined(self, ask: Ask, outcome: Outcome) -> str:
        return "".join([piece async for piece in self.logged(ask, outcome)])

    async def whole(self, ask: Ask, outcome: Outcome, client: Request) -> str:
        """The answer in one piece; where the client leaves before, nobody works on it any longer."""
        answer = asyncio.create_task(self.joined(ask, outcome))
        left = asyncio.create_task(departure(client))
        try:
            await asyncio.wait((answer, left), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise HTTPException(499, "the client left")
            return answer.result()
        except Refused as error:
            raise HTTPException(413, str(error)) from error
        except Unanswered as error:
            raise HTTPException(503, str(error), headers=LATER) from error
        finally:
            for task in (answer, left):
                task.cancel()
            await asyncio.gather(answer, left, return_exceptions=True)

    async def lines(self, ask: Ask, outcome: Outcome) -> AsyncIterator[str]:
        """An answer as JSON Lines, a line a token."""
        try:
            async with aclosing(self.logged(ask, outcome)) as pieces:
                async for piece in pieces:
                    yield json.dumps({"text": piece}) + "\n"
            yield json.dumps({"done": True, **facts(ask, outcome)}) + "\n"
        except (Refused, Unanswered) as error:
            yield json.dumps({"error": str(error)}) + "\n"

    async def generate(self, body: Generate, client: Request) -> Any:
        ask, outcome = self.ask(body, prompt=body.prompt, new_tokens=body.new_tokens)
        if body.stream:
            return StreamingResponse(self.lines(ask, outcome), media_type="application/x-ndjson")
        return {"text": await self.whole(ask, outcome, client), **facts(ask, outcome)}

    async def score(self, body: Score, client: Request) -> dict[str, Any]:
        ask, outcome = self.ask(body, text=body.text)
        await self.whole(ask, outcome, client)
        return facts(ask, outcome)

    async def reward(self, body: Rewarded) -> dict[str, Any]:
        if not self.log.reward(body.id, body.reward):
            raise HTTPException(404, "no answer of this id waits for a reward")
        return {"id": body.id, "reward": body.reward}

    async def healthz(self, response: Response) -> dict[str, Any]:
        children = self.router.children
        response.status_code = 200 if self.router.ready else 503
        listed = {
            name: {**child.facts, "ready": child.ready.is_set(), "pid": child.pid}
            for name, child in children.items()
        }
        return {"ready": self.router.ready, "status": self.router.status, "children": listed}

    async def metrics(self) -> Response:
        return Response(self.router.metrics(), media_type="text/plain; version=0.0.4")

    def app(self) -> FastAPI:
        app = FastAPI(title="absorb", lifespan=self.lifespan)
        app.post("/generate", response_model=None)(self.generate)
        app.post("/score")(self.score)
        app.post("/reward")(self.reward)
        app.get("/healthz")(self.healthz)
        app.get("/metrics", response_model=None)(self.metrics)
        return app
