"""`python scripts/bench_distill.py [--json FILE]`: a step against its bare parts, and the loss's memory.

What is compared runs in one process, in turn, and a round of both gives one ratio: the median is printed
with its 95 % interval (order statistics), so that a slow spell of the machine hits both. Memory is the peak
resident set of a fresh process (VmHWM) over what it held before, on a GPU torch's peak of allocated bytes.
On a machine with a GPU the same rows are measured there, and model-FLOP utilisation besides.

The bare step is plain PyTorch on tensors that lie ready, rows without padding: the teacher's forward pass,
the student's, cross-entropy of all its logits, backward, the same optimizer's step. Ours is all that a step
of `distill.trainer.loop.train` does: rows to tensors, teacher's checks, loss, clipping, optimizer.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distill.losses.teacher_output import Teacher
from distill.method import Plain
from distill.teachers.cache import CachedTeacher, link_shards, write_shards
from distill.teachers.codec import make_codec
from distill.teachers.local import LocalTeacher
from distill.trainer.loading import step_input
from distill.trainer.loop import accelerator, check_finite, step_loss
from distill.trainer.module import DistillationModule
from distill.trainer.optimizers import build_optimizers, set_learning_rate
from eval.core.artifacts import Key, build_artifact
from eval.core.commands import add_json, write_json
from eval.core.config import Frozen
from eval.core.documents import Row
from eval.core.errors import entry
from eval.core.records import machine
from eval.core.sections import Targets, Train
from scripts.bench_loss import (
    CUDA,
    DEVICE,
    Result,
    in_turn,
    loss_time_row,
    memory_row,
    ratio_row,
)

STUDENT, TEACHER = (256, 4), (384, 6)  # width, layers
LARGE = (1024, 16)  # of a student of about 300M parameters, on a GPU
CONTEXT, ROWS, POOL = 256, 4, 16  # tokens a row, rows a step, rows in all
LOSS_TOKENS = 4096


def model(shape: tuple[int, int], vocabulary: int, seed: int) -> LlamaForCausalLM:
    width, layers = shape
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=CONTEXT,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def pool(vocabulary: int) -> list[Row]:
    """Rows of random tokens, all of them full."""
    tokens_of_rows = torch.randint(1, vocabulary, (POOL, CONTEXT), generator=torch.Generator().manual_seed(0))
    return [Row(f"d{i}", "random", 0, tokens) for i, tokens in enumerate(tokens_of_rows.tolist())]


class Bare:
    """A training loop of plain PyTorch."""

    def __init__(
        self, vocabulary: int, config: Train, student: tuple[int, int], teacher: nn.Module | None
    ) -> None:
        self.model, self.teacher = model(student, vocabulary, 1).train(), teacher
        self.narrow, self.optimizers = config.precision == "bf16", build_optimizers(self.model, config)
        ids = torch.tensor([row.tokens for row in pool(vocabulary)], device=DEVICE)
        labels = F.pad(ids[:, 1:], (0, 1), value=-100)
        self.batches = list(zip(ids.split(ROWS), labels.split(ROWS), strict=True))

    def __call__(self, number: int) -> None:
        ids, labels = self.batches[number % len(self.batches)]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.narrow):
            if self.teacher is not None:
                with torch.no_grad():
                    self.teacher(input_ids=ids, use_cache=False)
            logits = self.model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Ours:
    """One step after the other as `distill.trainer.loop.train` makes them; the rows are gone round."""

    def __init__(
        self, student: PreTrainedModel, rows: list[Row], config: Train, teacher: Teacher | None
    ) -> None:
        self.acc, self.config, self.teacher, self.rows = accelerator(), config, teacher, rows
        plain = DistillationModule(student, config).train()
        self.learner, *self.optimizers = self.acc.prepare(plain, *build_optimizers(student, config))

    def __call__(self, number: int) -> None:
        start = number * self.config.rows % len(self.rows)
        rows = self.rows[start : start + self.config.rows]
        set_learning_rate(self.optimizers, 1.0)
        inputs = step_input(rows, self.config, self.acc, 0, self.teacher)
        check_finite(step_loss(self.learner, inputs, self.teacher, self.config, self.acc), number, rows)
        self.acc.clip_grad_norm_(self.learner.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def local_teacher(vocabulary: int, shape: tuple[int, int] = TEACHER) -> LocalTeacher:
    weights = model(shape, vocabulary, 2).eval().requires_grad_(False)
    return LocalTeacher(Plain(Frozen()), "plain", weights, vocabulary)


@contextmanager
def cached(teacher: LocalTeacher, rows: list[Row], draws: int = 50) -> Iterator[CachedTeacher]:
    """The teacher's draws for some rows, in a real cache on disk."""
    form = make_codec(Targets(form="sampled", draws=draws), teacher.vocabulary, 1.0)
    with TemporaryDirectory() as name:
        top = Path(name)
        write_shards(top / "shards", rows, teacher, form, pad=0, report=lambda share: None)
        with build_artifact(
            top / "t", kind="targets", name="t", key=Key(""), parents={}, facts=dict(form.facts)
        ) as temporary:
            link_shards(top / "shards", temporary, sum(row.predicted for row in rows))
        yield CachedTeacher(top / "t", rows, form, {})


def step_rows(vocabulary: int, rounds: int) -> list[Result]:
    """The whole step over its parts; the step from a cache over CE steps, the bare one and our own."""
    config = Train(rows=ROWS)
    teacher, rows = local_teacher(vocabulary), pool(vocabulary)
    with cached(teacher, rows) as cached_teacher:
        seconds = in_turn(
            {
                "whole": Ours(model(STUDENT, vocabulary, 1), rows, config, teacher),
                "parts": Bare(vocabulary, config, STUDENT, teacher.model),
                "cached": Ours(model(STUDENT, vocabulary, 1), rows, config, cached_teacher),
                "ce": Bare(vocabulary, config, STUDENT, None),
                "our ce": Ours(model(STUDENT, vocabulary, 1), rows, config, None),
            },
            rounds,
        )
    size = f"V = {vocabulary}"
    return [
        ratio_row(f"whole step / bare parts, {size}", seconds["whole"], seconds["parts"], 1.05),
        ratio_row(f"step from cached targets / bare CE step, {size}", seconds["cached"], seconds["ce"], 1.10),
        ratio_row(
            f"step from cached targets / our CE step, {size}", seconds["cached"], seconds["our ce"], 1.10
        ),
    ]


def worker(rank: int, size: int, threads: int, port: int, steps: int, pipe: Any) -> None:
    """A process of a group of `size`: on each word it trains `steps` steps and answers with the seconds."""
    torch.set_num_threads(threads)
    if size > 1:
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in where.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    ours = Ours(model(STUDENT, 2000, 1), pool(2000), Train(rows=ROWS), local_teacher(2000))
    while pipe.recv():
        start = time.perf_counter()
        for number in range(steps):
            ours(number)
        pipe.send(time.perf_counter() - start)


def processes_row(rounds: int, steps: int) -> Result:
    """Tokens per second of two processes of one thread over those of one process of two threads."""
    context, port = torch.multiprocessing.get_context("spawn"), 20000 + os.getpid() % 20000
    groups: dict[str, list[Any]] = {"two": [], "one": []}
    running = []
    for name, size, threads in (("two", 2, 1), ("one", 1, 2)):
        for rank in range(size):
            parent_end, worker_end = context.Pipe()
            running.append(
                context.Process(
                    target=worker, args=(rank, size, threads, port, steps, worker_end), daemon=True
                )
            )
            running[-1].start()
            groups[name].append(parent_end)

    def run_group(pipes: list[Any], number: int) -> None:
        for pipe in pipes:
            pipe.send(True)
        for pipe in pipes:
            pipe.recv()

    seconds = in_turn({name: partial(run_group, pipes) for name, pipes in groups.items()}, rounds)
    for process in running:
        process.terminate()
        process.join()
    what = "two processes of one thread / one process of two threads, tokens/s, V = 2000"
    return ratio_row(what, seconds["one"], seconds["two"], 0.9, at_least=True)


def utilisation_rows(rounds: int) -> list[Result]:
    """Tokens per second and model-FLOP utilisation of a large student in bf16, on a GPU alone.

    FLOP a token: 6 per weight of the student that is in a product, 2 per weight of the teacher, and for their
    attention 16 x layers x width x context. The peak is that of a square product in bf16, measured here.
    """
    vocabulary, rows = 32000, []
    teacher = local_teacher(vocabulary, LARGE)
    side = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    peak = 2 * 8192**3 / statistics.median(in_turn({"product": lambda n: side @ side}, 20)["product"])
    for compiled in (False, True):
        config = Train(rows=ROWS, precision="bf16", compile=compiled)
        ours = Ours(model(LARGE, vocabulary, 1), pool(vocabulary), config, teacher)
        seconds = statistics.median(in_turn({"step": ours}, rounds)["step"])
        weights = sum(p.numel() for p in ours.learner.parameters()) - vocabulary * LARGE[0]
        flop = 8 * weights + 16 * LARGE[1] * LARGE[0] * CONTEXT
        rate = ROWS * CONTEXT / seconds
        what = (
            f"tokens/s, {weights / 1e6:.0f}M student and teacher, bf16, {'compiled' if compiled else 'eager'}"
        )
        rows.append({"what": what, "value": rate, "utilisation": rate * flop / peak, "rounds": rounds})
    return rows


def format_row(row: Result) -> str:
    spread = f"[{row['low']:.3f}, {row['high']:.3f}]" if row.get("low") is not None else ""
    met = {True: "met", False: "MISSED"}[row["met"]] if "met" in row else ""
    return f"{row['what']:<76} {row['value']:8.3f} {spread:<16} {row.get('limit', ''):<8} {met}"


def measure(quick: bool) -> Iterator[Result]:
    rounds = 2 if quick else 20
    for vocabulary in (500,) if quick else (2000, 32000):
        yield from step_rows(vocabulary, rounds)
    for vocabulary, tokens in ((2000, 512),) if quick else ((32000, LOSS_TOKENS), (152000, LOSS_TOKENS)):
        yield memory_row(vocabulary, tokens, 1 if quick else 3)
        yield loss_time_row(vocabulary, tokens, 2 if quick else 8)
    if not CUDA:
        yield processes_row(rounds, 1 if quick else 5)
    else:
        yield from utilisation_rows(rounds)


@entry
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few rounds: does it run?")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if CUDA else machine().cpu
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    facts = {"device": where, "threads": torch.get_num_threads(), **versions}
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    for row in measure(args.quick):
        rows.append(row)
        print(format_row(row), flush=True)
    write_json(args.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
