"""The chunked loss against the plain one: extra peak memory and time; `bench_distill.py` prints the rows.

Run as `python scripts/bench_loss.py KIND VOCABULARY TOKENS` it prints the extra bytes of one loss: a fresh
process for each, so that no allocator has kept anything of the one before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
import torch.nn.functional as F

from distill.losses.chunked import chunked_loss
from distill.losses.teacher_output import States
from distill.models.lm_head import Head
from eval.core.commands import count
from eval.core.errors import UserError, entry
from eval.core.sections import Loss
from eval.stats.quantiles import quantile_bounds

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
STUDENT, TEACHER = 256, 384  # widths
WEIGHT = 0.9  # of the divergence
PLAIN_TENSORS = 5.5  # [tokens, vocabulary] in float32 that the plain loss holds at its peak, no more
Result = dict[str, Any]


def read_clock() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(runs: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round; every other round goes backwards, the first two are left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            start = read_clock()
            runs[name](number)
            seconds[name].append(read_clock() - start)
    return {name: values[2:] for name, values in seconds.items()}


def ratio_row(
    what: str, ours: list[float], bare: list[float], limit: float, at_least: bool = False
) -> Result:
    """The median of the rounds' ratios, its interval and whether the limit is met."""
    ratios = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
    low, high = quantile_bounds(ratios, 0.5, 0.025)
    value = statistics.median(ratios)
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    row = {
        "what": what,
        "value": value,
        "low": low,
        "high": high,
        "rounds": len(ratios),
        "limit": f"{sign} {limit}",
    }
    return {**row, "met": met, "seconds": statistics.median(ours), "bare_seconds": statistics.median(bare)}


class LossOnly:
    """Hidden states and heads of student and teacher, and the loss and gradient of 4,096 tokens."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, STUDENT, device=DEVICE).requires_grad_()
        self.weight = (torch.randn(vocabulary, STUDENT, device=DEVICE) / 16).requires_grad_()
        states, other = torch.randn(tokens, TEACHER), torch.randn(vocabulary, TEACHER) / 20
        self.target = States([states.to(DEVICE)], [Head(other.to(DEVICE))])
        self.labels = torch.randint(vocabulary, (tokens,), device=DEVICE)

    def run(self, kind: str, _: int = 0) -> None:
        """(1 - w) CE + w KL with its gradient; the plain one is what plain PyTorch does with all logits."""
        if kind == "plain":
            with torch.no_grad():
                teacher = F.linear(self.target.hidden[0], self.target.heads[0].weight).log_softmax(-1)
            student = F.linear(self.hidden, self.weight).log_softmax(-1)
            hard = F.nll_loss(student, self.labels, reduction="sum")
            soft = F.kl_div(student, teacher, reduction="sum", log_target=True)
            loss = (1 - WEIGHT) * hard + WEIGHT * soft
        else:
            loss = chunked_loss(self.hidden, Head(self.weight), self.labels, self.target, Loss(weight=WEIGHT))
        loss.backward()
        self.hidden.grad = self.weight.grad = None


def status_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def extra_bytes(kind: str, vocabulary: int, tokens: int) -> int:
    """Peak memory of one loss over what was held before it; in a fresh process, on a CPU."""
    LossOnly(1000, 8).run(kind)  # what is loaded at first use
    losses = LossOnly(vocabulary, tokens)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        losses.run(kind)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = status_bytes("VmRSS")
    losses.run(kind)
    return status_bytes("VmHWM") - before


def run_fresh(*words: object) -> Any:
    """What another process of this script prints as JSON."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"bench {words}", done.stderr.strip()[-300:], "look at that part alone")
    return json.loads(done.stdout)


def fit_tokens(vocabulary: int, tokens: int) -> int:
    """So many tokens, or as many halves less as let the plain loss have most of the free memory."""
    free = (
        torch.cuda.mem_get_info()[0] if CUDA else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    while PLAIN_TENSORS * 4 * vocabulary * tokens > 0.75 * free:
        tokens //= 2
    return tokens


def memory_row(vocabulary: int, requested: int, rounds: int) -> Result:
    tokens = fit_tokens(vocabulary, requested)
    what = f"extra peak memory of the chunked / the plain loss, {tokens} tokens x V = {vocabulary}"
    sizes = {k: [run_fresh(k, vocabulary, tokens) for _ in range(rounds)] for k in ("chunked", "plain")}
    values = [mine / plain for mine, plain in zip(sizes["chunked"], sizes["plain"], strict=True)]
    row = {"what": what, "value": statistics.median(values), "low": min(values), "high": max(values)}
    megabytes = {f"{kind}_mib": round(statistics.median(size) / 2**20) for kind, size in sizes.items()}
    return {**row, **megabytes, "rounds": rounds, "limit": "<= 0.15", "met": row["value"] <= 0.15}


def loss_time_row(vocabulary: int, requested: int, rounds: int) -> Result:
    tokens = fit_tokens(vocabulary, requested)
    losses = LossOnly(vocabulary, tokens)
    seconds = in_turn({kind: partial(losses.run, kind) for kind in ("chunked", "plain")}, rounds)
    what = f"time of the chunked / the plain loss, {tokens} tokens x V = {vocabulary}"
    return ratio_row(what, seconds["chunked"], seconds["plain"], 1.10)


@entry
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("chunked", "plain"), help="which loss")
    parser.add_argument("vocabulary", type=count, help="size of the vocabulary")
    parser.add_argument("tokens", type=count, help="tokens with a loss")
    args = parser.parse_args()
    print(extra_bytes(args.kind, args.vocabulary, args.tokens))


if __name__ == "__main__":
    main()
