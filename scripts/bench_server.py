"""Is a request lost when the release's process is killed under load? A real server, an open loop, real kills.

`python -m scripts.bench_server --release FOLDER [--seconds 300] [--kills 3] [--json FILE]` starts the server,
finds the knee (the highest rate of Poisson arrivals whose 95th percentile stays within five times the idle
one), and sends half of it for so long, while the release's process is killed so many times. Latency counts
from the intended arrival.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import httpx
import numpy as np

from eval.core.commands import add_json, count, new_parser, positive, write_json
from eval.core.errors import UserError, entry
from eval.core.records import machine

IDLE, FACTOR, STEP, RATES = 30, 5.0, 1.3, 25  # requests one by one; times their p95; from rate to rate
START = 600.0  # seconds that a server may take to load
PROMPT = "def return self None import for in if"


@dataclass
class Answer:
    ms: float  # from the intended arrival
    ok: bool
    served_by: str = ""
    fallback_ms: float | None = None
    why: str = ""


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


async def ask(client: httpx.AsyncClient, due: float, new_tokens: int) -> Answer:
    try:
        reply = await client.post("/generate", json={"prompt": PROMPT, "new_tokens": new_tokens})
        body = reply.json()
    except (httpx.HTTPError, ValueError) as error:
        return Answer(1e3 * (time.perf_counter() - due), False, why=f"{type(error).__name__}: {error}")
    ms = 1e3 * (time.perf_counter() - due)
    if reply.status_code != 200 or not body.get("text"):
        return Answer(ms, False, why=f"{reply.status_code}: {body}")
    return Answer(ms, True, body["served_by"], body["fallback_ms"])


async def send(
    client: httpx.AsyncClient, rate: float, seconds: float, new_tokens: int, rng: np.random.Generator
) -> list[Answer]:
    """Poisson arrivals: each is sent when it is due, whatever became of those before."""
    tasks, begin, due = [], time.perf_counter(), 0.0
    while (due := due + rng.exponential(1 / rate)) < seconds:
        await asyncio.sleep(max(begin + due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(ask(client, begin + due, new_tokens)))
    return list(await asyncio.gather(*tasks))


def percentiles(answers: list[Answer]) -> tuple[float, float, float]:
    ms = [one.ms for one in answers if one.ok]
    p50, p95, p99 = np.percentile(ms, [50, 95, 99]) if ms else [np.nan] * 3
    return float(p50), float(p95), float(p99)


async def wait_ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> None:
    begin = time.monotonic()
    while time.monotonic() - begin < START:
        if server.poll() is not None:
            raise UserError("server", f"ended with {server.returncode}", "see what it printed above")
        try:
            if (await client.get("/healthz")).status_code == 200:
                return
        except httpx.HTTPError:
            await asyncio.sleep(0.5)  # it does not listen yet
        await asyncio.sleep(0.2)
    raise UserError("server", f"not ready after {START:g} s", "try a smaller release")


async def find_knee(
    client: httpx.AsyncClient, args: Any, rng: np.random.Generator
) -> tuple[float, list[Any]]:
    """Requests per second up to which the latency stays near the idle one, and what was seen on the way."""
    idle = [await ask(client, time.perf_counter(), args.new_tokens) for _ in range(IDLE)]
    p50, p95, _ = percentiles(idle)
    print(f"idle: p50 {p50:.1f} ms, p95 {p95:.1f} ms, {IDLE} requests one by one")
    rate, knee, seen = 0.25e3 / p50, 0.0, []
    for _ in range(RATES):
        answers = await send(client, rate, args.probe, args.new_tokens, rng)
        _, high, _ = percentiles(answers)
        follows = all(one.ok for one in answers) and high <= FACTOR * p95
        seen.append({"rate": rate, "requests": len(answers), "p95_ms": high, "follows": follows})
        said = "follows" if follows else "does not"
        print(f"{rate:8.1f} requests/s: {len(answers)} requests, p95 {high:.1f} ms, {said}")
        if not follows:
            break
        knee, rate = rate, rate * STEP
    if knee == 0:
        raise UserError("knee", f"none at {rate:.2f} requests/s", "use a quieter machine or --probe 20")
    return knee, seen


async def kill(client: httpx.AsyncClient, times: list[float]) -> int:
    """Kills the release's process at these seconds from now, where it lives."""
    begin, done = time.perf_counter(), 0
    for at in times:
        await asyncio.sleep(max(begin + at - time.perf_counter(), 0))
        child = (await client.get("/healthz")).json()["children"]["release"]
        os.kill(child["pid"], signal.SIGKILL)
        done += 1
        state = "ready" if child["ready"] else "loading"
        print(f"{at:6.1f} s: killed process {child['pid']}, which was {state}", flush=True)
    return done


async def bench(args: Any, port: int, server: subprocess.Popen[bytes]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=120) as client:
        await wait_ready(client, server)
        knee, seen = await find_knee(client, args, rng)
        rate = knee / 2
        print(f"knee {knee:.1f} requests/s; {rate:.1f} for {args.seconds:g} s, {args.kills} kills")
        times = [args.seconds * (i + 1) / (args.kills + 1) for i in range(args.kills)]
        answers, killed = await asyncio.gather(
            send(client, rate, args.seconds, args.new_tokens, rng), kill(client, times)
        )
        text = (await client.get("/metrics")).text
    lost = [one for one in answers if not one.ok]
    over = [one for one in answers if one.fallback_ms is not None]
    waits = [one.fallback_ms for one in over if one.fallback_ms is not None]
    p50, p95, p99 = percentiles(answers)
    starts = next(
        line for line in text.splitlines() if line.startswith('absorb_child_starts_total{child="release"')
    )
    for one in lost[:5]:
        print(f"lost: {one.why}")
    result = {
        "knee": knee, "rate": rate, "seconds": args.seconds, "requests": len(answers), "lost": len(lost),
        "killed": killed, "release_starts": int(starts.split()[-1]), "failed_over": len(over),
        "by_release": sum(one.served_by == "release" for one in answers),
        "fallback_ms_median": float(np.median(waits)) if waits else None,
        "fallback_ms_most": max(waits, default=None),
        "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "probes": seen,
        "machine": machine().cpu, "cores": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(f"{len(answers):,} requests, {len(lost)} lost; {killed} kills, {result['release_starts']} starts")
    print(f"p50 {p50:.1f} ms, p95 {p95:.1f} ms, p99 {p99:.1f} ms")
    if waits:
        print(
            f"{len(over):,} answered by the fallback in place of the release: "
            f"after {np.median(waits):.1f} ms (median), {max(waits):.1f} ms (most)"
        )
    return result


@entry
def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--release", required=True, type=Path, help="a folder that `eval.release` made")
    parser.add_argument("--seconds", type=positive, default=300.0, help="at half the knee")
    parser.add_argument("--kills", type=count, default=3, help="of the release's process")
    parser.add_argument(
        "--probe", type=positive, default=8.0, help="seconds at each rate on the way to the knee"
    )
    parser.add_argument("--new-tokens", type=count, default=8, help="of each request")
    add_json(parser)
    args = parser.parse_args()
    port = free_port()
    words = [sys.executable, "-m", "eval.serve", "--release", str(args.release), "--port", str(port)]
    with subprocess.Popen([*words, "--open", "100000"]) as server:
        try:
            result = asyncio.run(bench(args, port, server))
        finally:
            server.terminate()
    write_json(args.json, result)
    return int(result["lost"] > 0 or (result["fallback_ms_most"] or 0) > 1e3)


if __name__ == "__main__":
    main()
