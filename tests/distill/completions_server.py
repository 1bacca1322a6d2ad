"""A real server of completions around a real model, in a process of its own.

It speaks three forms: vLLM's `prompt_logprobs`, SGLang's `generate`, and `echo` with `logprobs`. Words of the path decide how it behaves:
below `/ids/v1` an echo names tokens by their ids, below `/content/v1` by id and text in OpenAI's
new form, below `/odd/v1` it spells them otherwise in rows with the id 300, below `/busy/v1` the first two requests are answered with 429, below
`/key/v1` the key is needed.
"""

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from threading import Lock

import torch

from eval.engines import load_tokenizer
from eval.engines.torch import load_model


class Server(ThreadingHTTPServer):
    def __init__(self, options):
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options, self.lock, self.asked, self.rows, self.busy = options, Lock(), 0, 0, 0
        self.model, self.tokenizer = load_model(options.folder), load_tokenizer(options.folder)
        self.size = 1 + max(self.tokenizer.get_vocab().values())

    @torch.no_grad()
    def log_probs(self, ids):
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)[:, : self.size]

    def entries(self, best, logs):
        return [{"id": i, "token": self.text(i), "logprob": float(logs[i])} for i in best.tolist()]

    def text(self, i):
        return self.tokenizer.decode([i])

    def by_id(self, ids, k):
        said = [None]
        for token, logs in zip(ids[1:], self.log_probs(ids)[:-1], strict=True):
            best = {*logs.topk(k).indices.tolist(), token}
            said.append({str(i): {"logprob": float(logs[i]), "decoded_token": self.text(i)} for i in best})
        return {"prompt_logprobs": said}

    def generated(self, ids, k):
        own, tops = [[None, ids[0], self.text(ids[0])]], [None]
        for token, logs in zip(ids[1:], self.log_probs(ids)[:-1], strict=True):
            own.append([float(logs[token]), token, self.text(token)])
            tops.append([[float(logs[i]), i, self.text(i)] for i in logs.topk(k).indices.tolist()])
        return {"text": "", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": tops}}

    def echoed(self, ids, k, path):
        odd = "/odd/" in path and 300 in ids
        name = (lambda i: f"token_id:{i}") if "/ids/" in path else lambda i: self.text(i) + "~" * odd
        logs = self.log_probs(ids)
        tops = [{name(i): float(one[i]) for i in reversed(one.topk(k).indices.tolist())} for one in logs]
        new = int(logs[-1].argmax())
        own = [None, *(float(one[i]) for one, i in zip(logs, [*ids[1:], new], strict=True))]
        tokens = [name(i) for i in [*ids, new]]
        if "/content/" in path:
            content = [
                {"id": i, "token": self.text(i), "bytes": [], "logprob": value, "top_logprobs": top}
                for i, value, top in zip(
                    [*ids, new], own, [[], *map(self.entries, logs.topk(k).indices, logs)], strict=True
                )
            ]
            return {"logprobs": {"content": content}}
        return {"logprobs": {"tokens": tokens, "token_logprobs": own, "top_logprobs": [None, *tops]}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message, **headers):
        self.answer(status, {"error": {"message": message}}, **headers)

    def do_GET(self):
        if "/v1/" not in self.path:
            self.refuse(404, "no such page")
        elif self.allowed():
            self.answer(200, {"data": [{"id": "large"}, {"id": "other"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        server, options = self.server, self.server.options
        with server.lock:
            server.asked += 1
            if "/busy/" in self.path and server.busy < 2:
                server.busy += 1
                return self.refuse(429, "busy", Retry_After="0")
            if options.die_after and server.asked > options.die_after:
                os._exit(9)
            prompts = body["input_ids" if self.path.endswith("/generate") else "prompt"]
            if any(options.refuse in prompt for prompt in prompts):
                return self.refuse(400, f"token {options.refuse} is not allowed")
            k = body.get("prompt_logprobs") or body.get("logprobs") or body["top_logprobs_num"]
            if k > 300:
                return self.refuse(
                    400, f"Requested prompt logprobs of {k}, which is greater than max allowed: 300"
                )
            server.rows += len(prompts)
            if options.count:
                options.count.write_text(str(server.rows))
            if self.path.endswith("/generate"):
                return self.answer(200, [server.generated(ids, k) for ids in prompts])
            choices = [
                server.by_id(ids, k) if "prompt_logprobs" in body else server.echoed(ids, k, self.path)
                for ids in prompts
            ]
            self.answer(200, {"choices": [{"index": i, **one} for i, one in enumerate(choices)][::-1]})

    def allowed(self):
        found, wanted = self.headers.get("Authorization", ""), self.server.options.key
        if "/key/" in self.path and found != f"Bearer {wanted}":
            self.refuse(401, f"wrong key: {found}")
            return False
        return True


@dataclass(frozen=True)
class Options:
    folder: Path
    port: int = 0
    key: str = ""
    die_after: int = 0  # the process ends in the request after these
    refuse: int = -1  # prompts with this id are answered with 400
    count: Path | None = None  # file for the number of rows answered


def serve(options, ready):
    torch.set_num_threads(1)
    server = Server(options)
    ready.send(server.server_address[1])
    server.serve_forever()


@contextmanager
def serving(folder, **options):
    """The port of a server. Not forked: it would hold the pipes of the test's own process open."""
    context = get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(Options(folder, **options), theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(60), "the server did not start"
        yield ours.recv()
    finally:
        process.kill()
        process.join()
