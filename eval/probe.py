"""What one fresh process measures of one variant; `eval.cost` starts it and waits.

It imports its engine, says that it is ready, waits for its order (so that several may start side by side
and then measure one after another), and answers. Each message is one line of JSON, on stdin and stdout;
anything else that is printed goes to stderr.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TextIO

import torch

from eval.engines import Engine, engine_module, load_engine
from eval.errors import UserError
from eval.records import Process
from eval.sections import Frozen


class Order(Frozen):
    """What to measure."""

    engine: str
    folder: str
    device: str
    threads: int
    prompts: list[list[int]]  # one request each; all of one length
    warmup: int  # so many of the first requests are not counted
    new_tokens: int


class Answer(Frozen):
    """Ready (neither field), measured, or failed."""

    process: Process | None = None
    error: tuple[str, str, str] | None = None  # thing, found, mend


def timed_request(
    engine: Engine, prompt: list[int], new_tokens: int, synchronize: Callable[[], None]
) -> list[float]:
    """Milliseconds of the prefill and of each of the `new_tokens - 1` greedy decode steps.

    A step ends when its token is known: the argmax is part of it.
    """
    ids, times = torch.tensor([prompt]), []
    synchronize()
    start = time.perf_counter()
    logits, state = engine.prefill(ids)
    token = int(logits.argmax())
    for _ in range(new_tokens - 1):
        synchronize()
        now = time.perf_counter()
        times.append(now - start)
        start = now
        logits, state = engine.decode(token, state)
        token = int(logits.argmax())
    synchronize()
    times.append(time.perf_counter() - start)
    return [1e3 * seconds for seconds in times]


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


def measure(order: Order) -> Process:
    """Loads the variant and times its requests."""
    start = time.perf_counter()
    engine = load_engine(order.engine, Path(order.folder), order.threads, order.device)
    synchronize = torch.cuda.synchronize if order.device == "cuda" else (lambda: None)
    synchronize()
    load_s = time.perf_counter() - start
    requests = [timed_request(engine, p, order.new_tokens, synchronize) for p in order.prompts]
    counted = requests[order.warmup :]
    return Process(
        prefill_ms=[times[0] for times in counted],
        decode_ms=[step for times in counted for step in times[1:]],
        load_s=load_s,
        peak_memory_bytes=peak_memory(order.device),
    )


def answers(engine: str, orders: TextIO) -> Iterator[Answer]:
    """Ready, then the measurement; or the error that stood in the way of either."""
    try:
        engine_module(engine)
        yield Answer()
        if line := orders.readline():  # none: the parent is gone
            yield Answer(process=measure(Order.model_validate_json(line)))
    except UserError as error:
        yield Answer(error=(error.thing, str(error.found), error.mend))


def main() -> None:
    # transformers imports scikit-learn wherever it is installed (here for nncf), with scipy and pandas:
    # seconds and some 140 MB that no model needs. None makes it look absent.
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        for answer in answers(sys.argv[1], sys.stdin):
            print(answer.model_dump_json(), file=out, flush=True)


if __name__ == "__main__":
    main()
