"""Fresh processes that measure one after another, alone, while this one sleeps."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from eval.core.config import ROOT
from eval.core.documents import free_bytes
from eval.core.errors import UserError
from eval.core.jobs import Job, Report, run_in_turn
from eval.cost.orders import Answer, Order
from eval.cost.plan import CostPlan, Variant

LIBRARIES = 2**30  # bytes that a process may hold which has imported its engine, at most
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Worker:
    """A fresh process for one variant."""

    variant: Variant
    process: subprocess.Popen[str]
    stderr: IO[str]

    def read_answer(self) -> Answer:
        """The next answer of the process, or its error raised here."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            answer = Answer.model_validate_json(line)
            if answer.error:
                raise UserError(*answer.error)
            return answer
        self.stderr.seek(0)
        last = (self.stderr.read().strip().splitlines() or ["no message"])[-1]
        end = f"the process ended with {self.process.wait()} ({last})"
        raise UserError(
            f"measuring {self.variant.folder}",
            end,
            "correct what it names, or free some memory; then run again",
        )

    def measure(self, order: Order) -> Answer:
        """Gives the order, sleeps until it is carried out and the process has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died: `read_answer` reports of what
            self.process.stdin.write(order.model_dump_json() + "\n")
            self.process.stdin.flush()
        answer = self.read_answer()
        self.process.wait()
        return answer


@contextmanager
def start_worker(variant: Variant, threads: int) -> Iterator[Worker]:
    """A process that has begun to import the variant's engine; it is gone at the end."""
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "eval.cost.worker", variant.subject.engine],
            cwd=ROOT,
            env={**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        try:
            yield Worker(variant, process, stderr)
        finally:
            process.kill()
            process.communicate()


def make_order(plan: CostPlan, variant: Variant) -> Order:
    """What a process is asked to measure of a variant: single requests and batches."""
    return Order(
        engine=variant.subject.engine,
        folder=str(variant.folder.resolve()),
        device=plan.device,
        threads=plan.cost.threads,
        prompts=plan.own_prompts.get(variant.label, plan.prompts),
        warmup=plan.cost.warmup,
        new_tokens=plan.cost.new_tokens,
        batch_sizes=plan.cost.batch_sizes,
    )


def measure_group(group: list[tuple[Variant, Order]], report: Report) -> dict[str, Answer]:
    """Label -> answer. Starts a process for each side by side, then lets one after another measure, alone."""
    with ExitStack() as stack:
        workers = [stack.enter_context(start_worker(variant, order.threads)) for variant, order in group]
        for worker in workers:
            worker.read_answer()
        answers: dict[str, Answer] = {}
        for worker, (variant, order) in zip(workers, group, strict=True):
            answers[variant.label] = worker.measure(order)
            report(len(answers) / len(group))
        return answers


def run_in_rounds(
    title: str, plan: CostPlan, rounds: int, order: Callable[[Variant, int], Order]
) -> dict[str, list[Answer]]:
    """Label -> one answer per round. Each round starts with another variant: none is always the first.

    The processes of a round import their engines side by side, as many as fit into memory: every core is busy
    until the first one measures.
    """
    jobs, variants = [], plan.variants
    size = max(1, min(len(variants), free_bytes() // LIBRARIES))
    for turn in range(rounds):
        shift = turn % len(variants)
        turned = [(v, order(v, turn)) for v in [*variants[shift:], *variants[:shift]]]
        for group in (turned[i : i + size] for i in range(0, len(turned), size)):
            name = f"round {turn + 1}, {' and '.join(v.name for v, _ in group)}"
            jobs.append(Job(name, measure_group, (group,), weight=len(group)))
    groups = run_in_turn(title, jobs).values()
    return {v.label: [answers[v.label] for answers in groups if v.label in answers] for v in variants}
