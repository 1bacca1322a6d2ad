"""One model of a release in a process of its own: requests in, a JSON line each, and answers out.

In:  {"id": 1, "prompt": "...", "new_tokens": 8}, {"id": 2, "text": "..."} to score, {"id": 3, "check": 1}, or
     {"cancel": 1} where nobody waits for that answer any longer; ids grow
Out: {"ready": ...} once, then {"id": 1, "piece": "..."} for each token, and at last {"id": 1, "done": true}
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from eval.release.load_release import (
    INDEX,
    Info,
    Model,
    ReleaseError,
    check_golden_answers,
    load_release,
    read_json,
)

Message = dict[str, Any]


def pieces(model: Model, prompt: str, new_tokens: int) -> Iterator[str]:
    """The text of each token, the likeliest one; half a character waits for its other half."""
    row, ids, shown = model._read(model.encode(prompt), first=True), list[int](), ""
    while len(ids) < new_tokens and (token := int(row.argmax())) not in model.ends:
        ids.append(token)
        text = model.tokenizer.decode(ids)
        whole = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(shown) :]
        shown += whole
        yield whole
        if len(ids) < new_tokens:
            row = model._read([token], first=False)


def bits_of(model: Model, text: str) -> float:
    """Bits of a text after the boundary token."""
    ids = model.encode(text)
    logits = model.logits(ids)[:-1].astype(np.float64)
    top = logits.max(-1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float((log_sum - chosen).sum() / np.log(2))


def answers(model: Model, info: Info, golden: list[Message], request: Message) -> Iterator[Message]:
    """What is said to one request."""
    if "check" in request:
        check_golden_answers(model, golden)
        yield {"done": True}
        return
    text = request["text"] if "text" in request else request["prompt"]
    if (length := len(model.encode(text)) + request.get("new_tokens", 0)) > info.context:
        yield {"refused": f"{length} tokens, the contract holds for {info.context}"}
    elif "text" in request:
        yield {"done": True, "bits": bits_of(model, text), "bytes": len(text.encode())}
    else:
        for piece in pieces(model, text, request["new_tokens"]):
            yield {"piece": piece}
        yield {"done": True}


class Inbox:
    """Requests in their order, read by a thread: one can be cancelled while it is answered."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.queue: SimpleQueue[Message | None] = SimpleQueue()
        self.cancelled, self.answered = set[int](), -1
        Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            message = json.loads(line)
            if "cancel" not in message:
                self.queue.put(message)
            elif message["cancel"] > self.answered:
                self.cancelled.add(message["cancel"])
        self.queue.put(None)

    def __iter__(self) -> Iterator[Message]:
        while (request := self.queue.get()) is not None:
            yield request
            self.answered = request["id"]
            self.cancelled.discard(self.answered)

    def until_cancelled(self, id: int, messages: Iterator[Message]) -> Iterator[Message]:
        """Messages for as long as somebody waits for them."""
        while id not in self.cancelled and (message := next(messages, None)) is not None:
            yield message


def main() -> None:
    given = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def say(message: Message) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    release, arm = Path(given["release"]), given["arm"]
    public = None if given["public"] is None else [key.encode() for key in given["public"]]
    model, info = load_release(release, given["target"], public_key=public, arm=arm)
    index = read_json(release / INDEX)
    golden = (index["fallback"] if info.fallback else index["targets"][given["target"]])["golden_answers"]
    say({"ready": True, "fallback": info.fallback, "reason": info.reason, "release": info.release})
    inbox = Inbox(sys.stdin)
    for request in inbox:
        try:
            for message in inbox.until_cancelled(request["id"], answers(model, info, golden, request)):
                say({"id": request["id"], **message})
        except ReleaseError as error:  # golden answers: whoever asked decides
            say({"id": request["id"], "failed": str(error)})


if __name__ == "__main__":
    main()
