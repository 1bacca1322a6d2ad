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
from eval.core.errors import UserError
from eval.core.jobs import Job, Report, run_in_turn
from eval.cost.plan import CostPlan, Variant
from eval.cost.worker import Answer, Order

QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Probe:
    """A fresh process for one variant."""

    variant: Variant
    process: subprocess.Popen[str]
    said: IO[str]  # what it wrote on stderr

    def hear(self) -> Answer:
        """The next answer of the process, or its error raised here."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            answer = Answer.model_validate_json(line)
            if answer.error:
                raise UserError(*answer.error)
            return answer
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or ["it said nothing"])[-1]
        found = f"the process ended with {self.process.wait()} ({last})"
        raise UserError(f"measuring {self.variant.folder}", found, "fix that, or free some memory; run again")

    def measure(self, order: Order) -> Answer:
        """Gives the order, sleeps until it is carried out and the process has ended."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died: `hear` tells of what
            self.process.stdin.write(order.model_dump_json() + "\n")
            self.process.stdin.flush()
        answer = self.hear()
        self.process.wait()
        return answer


@contextmanager
def started(variant: Variant, threads: int) -> Iterator[Probe]:
    """A process that has begun to import the variant's engine; it is gone at the end."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "eval.cost.worker", variant.subject.engine],
            cwd=ROOT,
            env={**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            yield Probe(variant, process, said)
        finally:
            process.kill()
            process.communicate()


def order_of(bench: CostPlan, variant: Variant) -> Order:
    """What a process is asked to measure of a variant: single requests and batches."""
    return Order(
        engine=variant.subject.engine,
        folder=str(variant.folder.resolve()),
        device=bench.device,
        threads=bench.cost.threads,
        prompts=bench.prompts,
        warmup=bench.cost.warmup,
        new_tokens=bench.cost.new_tokens,
        batch_sizes=bench.cost.batch_sizes,
    )


def measure_group(group: list[tuple[Variant, Order]], report: Report) -> dict[str, Answer]:
    """Label -> answer. Starts a process for each side by side, then lets one after another measure, alone."""
    with ExitStack() as stack:
        probes = [stack.enter_context(started(variant, order.threads)) for variant, order in group]
        for probe in probes:
            probe.hear()
        done: dict[str, Answer] = {}
        for probe, (variant, order) in zip(probes, group, strict=True):
            done[variant.label] = probe.measure(order)
            report(len(done) / len(group))
        return done


def in_rounds(
    title: str, bench: CostPlan, rounds: int, order: Callable[[Variant, int], Order]
) -> dict[str, list[Answer]]:
    """Label -> one answer per round. Each round starts with another variant: none is always the first."""
    jobs, wanted, size = [], bench.wanted, bench.workers
    for turn in range(rounds):
        shift = turn % len(wanted)
        turned = [(v, order(v, turn)) for v in [*wanted[shift:], *wanted[:shift]]]
        for group in (turned[i : i + size] for i in range(0, len(turned), size)):
            name = f"round {turn + 1}, {' and '.join(v.name for v, _ in group)}"
            jobs.append(Job(name, measure_group, (group,), weight=len(group)))
    done = run_in_turn(title, jobs).values()
    return {v.label: [found[v.label] for found in done if v.label in found] for v in wanted}
