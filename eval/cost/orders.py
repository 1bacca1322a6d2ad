"""What the command orders of a worker process, and what it answers: one line of JSON each."""

from eval.core.config import Frozen
from eval.core.records import Process, Server


class OpenLoop(Frozen):
    """Requests that arrive whether or not the one before is done."""

    rates: list[float]  # per second
    seconds: float  # of arrivals, at each rate; and of requests back to back, before them
    seed: int  # of the arrivals: that of the round


class Order(Frozen):
    """What to measure: the cost of single requests and batches, or an open loop."""

    engine: str
    folder: str
    device: str
    threads: int
    prompts: list[list[int]]  # one request each; all of one length
    warmup: int  # so many of the first requests are not counted
    new_tokens: int
    batch_sizes: list[int]  # ascending
    load: OpenLoop | None = None


class Answer(Frozen):
    """Ready (no field), measured, or failed."""

    process: Process | None = None
    server: Server | None = None
    error: tuple[str, str, str] | None = None  # thing, problem, fix
