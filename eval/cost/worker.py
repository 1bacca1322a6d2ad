"""What one fresh process measures of one variant; `eval.cost` or `eval.cost.load` starts it and waits.

It imports its engine, says that it is ready, waits for its order (so that several may start side by side
and then measure one after another), and answers. Each message is one line of JSON, on stdin and stdout;
anything else that is printed goes to stderr. Time is `time.perf_counter`: no clock that may be set back.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import Tensor

from eval.core.errors import UserError
from eval.core.records import Arrivals, Batched, Energy, Process, Server
from eval.core.records.measured import LEAST_SERVED
from eval.cost.meters import Meter, device_memory, open_meter
from eval.cost.orders import Answer, Order
from eval.engines import Engine, Writer, engine_module, load_engine
from eval.stats.queueing import poisson

TRIES = 100  # texts, one of which tells the time of a token
PATIENCE = 2  # times the duration of the arrivals: what was not served by then never is


Synchronize = Callable[[], None]  # waits until the device has done what it was given


def serve_request(engine: Engine, ids: Tensor, new_tokens: int, synchronize: Synchronize) -> list[float]:
    """Serves prompts [B, T]: perf_counter at the start and when each of the `new_tokens` is known, in s.

    Greedy; a step ends when its tokens [B] are known to the host, so the argmax is part of it. The first
    step, the prefill, is therefore the time to first token of a server that has nothing else to do.
    """
    if isinstance(engine, Writer):
        return write_whole(engine, ids, new_tokens, synchronize)
    synchronize()
    stamps = [time.perf_counter()]
    logits, state = engine.prefill(ids)
    tokens = logits.argmax(-1).cpu()
    for _ in range(new_tokens - 1):
        synchronize()
        stamps.append(time.perf_counter())
        logits, state = engine.decode(tokens, state)
        tokens = logits.argmax(-1).cpu()
    synchronize()
    return [*stamps, time.perf_counter()]


def write_whole(engine: Writer, ids: Tensor, new_tokens: int, synchronize: Synchronize) -> list[float]:
    """The same of an engine that writes whole texts: it is asked for one token, then for all.

    The time that all take beyond the first, by their number, is that of each: their mean. A text that ends
    before its second token says nothing of it, nor does one after a first token that was held up: both are
    written anew.
    """

    def timed(count: int) -> tuple[float, int]:
        synchronize()
        start = time.perf_counter()
        written = engine.write(ids, count)
        synchronize()
        return time.perf_counter() - start, written

    start = time.perf_counter()
    for _ in range(TRIES):
        (first, _), (whole, written) = timed(1), timed(new_tokens)
        if written > 1 and whole > first:
            break
    else:
        problem = f"in {TRIES} tries no text of {new_tokens} tokens took longer than its first token"
        raise UserError("teacher", problem, "set cost.new_tokens higher, or measure on a quieter machine")
    step = (whole - first) / (written - 1)
    return [start, *(start + first + step * place for place in range(new_tokens))]


def peak_memory(device: str) -> int:
    """Bytes: VmHWM of this process (Linux), or what torch reserved at most on CUDA.

    Not `ru_maxrss`: a child starts with that of its parent.
    """
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if not status.is_file():
        raise UserError("peak memory", "no /proc/self/status here", "measure on Linux")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def time_batches(
    engine: Engine, order: Order, size: int, synchronize: Synchronize, meter: Meter
) -> tuple[list[list[float]], Energy]:
    """[requests][new_tokens] milliseconds of each step of batches of `size` prompts, and their energy."""
    stream, steps, before = itertools.cycle(order.prompts), [], None
    for turn in range(len(order.prompts)):
        if turn == order.warmup:
            meter.update()
            before = meter.total
        ids = torch.tensor(list(itertools.islice(stream, size)))
        stamps = serve_request(engine, ids, order.new_tokens, synchronize)
        steps.append([1e3 * (b - a) for a, b in itertools.pairwise(stamps)])
        meter.update()
    tokens = (len(order.prompts) - order.warmup) * size * order.new_tokens
    return steps[order.warmup :], meter.spent(before, tokens)


def measure(engine: Engine, order: Order, synchronize: Synchronize, load_s: float) -> Process:
    """Times batches of each size, the smallest first: the peak of memory then is that of the size."""
    meter, batches = open_meter(order.device), []
    for size in order.batch_sizes:
        steps, energy = time_batches(engine, order, size, synchronize, meter)
        batched = Batched(
            batch_size=size,
            prefill_ms=[times[0] for times in steps],
            decode_ms=[step for times in steps for step in times[1:]],
            peak_memory_bytes=peak_memory(order.device),
            device_memory_bytes=device_memory(order.device),
            energy=energy,
        )
        batches.append(batched)
    single = batches[0].model_dump(exclude={"batch_size"})
    return Process(**single, load_s=load_s, batches=batches[1:], computed_in=engine.computed_in)


def serve_arrivals(
    arrivals: list[float], deadline: float, serve: Callable[[], list[float]]
) -> Iterator[tuple[float, float]]:
    """Serves each request when it has arrived and the one before is done; sleeps where there is none.

    Yields the seconds until the first and until the last token, both from the *intended* arrival: a request
    that had to wait shows it, and so does a late wake-up (no coordinated omission). Ends at the deadline.
    """
    start = time.perf_counter()
    for arrival in arrivals:
        now = time.perf_counter() - start
        if now > deadline:
            return
        if now < arrival:
            time.sleep(arrival - now)
        stamps = serve()
        yield stamps[1] - start - arrival, stamps[-1] - start - arrival


def serve_open_loop(engine: Engine, order: Order, synchronize: Synchronize) -> Server:
    """Requests back to back, then as they arrive at each rate, in real time."""
    load = order.load
    assert load is not None
    prompts = itertools.cycle(order.prompts)

    def serve() -> list[float]:
        return serve_request(engine, torch.tensor([next(prompts)]), order.new_tokens, synchronize)

    for _ in range(order.warmup):
        serve()
    services: list[float] = []
    end = time.perf_counter() + load.seconds
    while len(services) < LEAST_SERVED or time.perf_counter() < end:
        stamps = serve()
        services.append(1e3 * (stamps[-1] - stamps[0]))
    rates = []
    for place, rate in enumerate(load.rates):
        arrivals = poisson(rate, load.seconds, (load.seed, place)).tolist()
        served = list(serve_arrivals(arrivals, PATIENCE * load.seconds, serve))
        first, done = (1e3 * np.asarray(served).reshape(-1, 2)).T.tolist()
        rates.append(Arrivals(rate=rate, arrival_s=arrivals, first_ms=first, done_ms=done))
    return Server(service_ms=services, rates=rates, computed_in=engine.computed_in)


def carry_out(order: Order) -> Answer:
    """Loads the variant and measures what was ordered."""
    start = time.perf_counter()
    engine = load_engine(order.engine, Path(order.folder), order.threads, order.device)
    synchronize = torch.cuda.synchronize if order.device == "cuda" else (lambda: None)
    synchronize()
    load_s = time.perf_counter() - start
    if order.load is not None:
        return Answer(server=serve_open_loop(engine, order, synchronize))
    return Answer(process=measure(engine, order, synchronize, load_s))


def answer_orders(engine: str, orders: TextIO) -> Iterator[Answer]:
    """Ready, then the measurement; or the error that stood in the way of either."""
    try:
        engine_module(engine)
        yield Answer()
        if line := orders.readline():  # none: the parent is gone
            yield carry_out(Order.model_validate_json(line))
    except UserError as error:
        yield Answer(error=(error.thing, str(error.problem), error.fix))


def main() -> None:
    # transformers imports scikit-learn and scipy wherever they are installed (here for other commands), with
    # pandas: seconds and some 140 MB that no language model needs. None makes them look absent.
    for name in ("sklearn", "scipy"):
        sys.modules[name] = None  # type: ignore[assignment]
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        for answer in answer_orders(sys.argv[1], sys.stdin):
            print(answer.model_dump_json(), file=out, flush=True)


if __name__ == "__main__":
    main()
