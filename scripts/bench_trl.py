"""`python scripts/bench_trl.py --trl-python VENV/bin/python [--json FILE]`: our trainer beside TRL's.

Both train one student from one teacher (the same files of weights) on a CPU, in float32, on the same
documents of unequal length, four to a step, with AdamW of the same settings, clipping and divergence: the
forward KL, `beta=0, lmbda=0` of GKD. What is compared is valid tokens per second: those that carry loss.

Each side is a process in an environment of its own and runs its trainer's own loop: `GKDTrainer.train` there,
`distill.trainer.loop.train` here. At the end of a step it waits for the word to go on, so that rounds
go from side to side and a slow spell hits all. A turn starts with a step off the clock and the first two
rounds are left out: memory that the system took back is slow at first. The clock runs from the end of one
step to that of another, so that all of it counts. A round gives one ratio: printed is the median with its
95 % interval (order statistics).

What they do differently: TRL forms the logits of padded places too, all [B, T, V] of student and teacher at
once; ours forms those of valid tokens, chunk by chunk. `padded` takes the very batches that TRL takes, and
its first loss must be TRL's. `packed` lays documents end to end (`data.packing`), four such rows to a step;
GKDTrainer cannot: it hands its models no positions. `cached` reads 50 draws of the teacher per token from
disk in place of running it: an unbiased estimate of the same divergence; the time to write them is printed,
not counted.

In TRL's favour: no gradient checkpointing (its default), no chat template in its collator, no key-value cache
of the teacher, its fused AdamW (ours is not). Nothing is logged, saved or evaluated on either side.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

CONTEXT, SHORTEST, DOCUMENTS, ROWS = 256, 64, 48, 4  # tokens a row; tokens; in all; rows a step
LR, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
WARM, LEFT_OUT, STEPS = 2, 2, {8000: 4, 32000: 3, 49152: 2}  # steps; rounds; vocabulary -> steps a turn
LIMITS = {
    8000: {"online": 1.0, "cached": 1.5},
    32000: {"online": 1.3, "cached": 1.5},
    49152: {"online": 1.5, "cached": 1.5},  # the vocabulary of SmolLM2
}
SIDES = ("trl", "padded online", "padded cached", "packed online", "packed cached")
Facts = dict[str, Any]
PIPES: Facts = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
Rates = dict[str, list[float]]  # side -> valid tokens per second, an entry per round


def documents(vocabulary: int) -> list[list[int]]:
    """Random tokens after a boundary token; lengths log-uniform from SHORTEST to CONTEXT."""
    rng = random.Random(0)
    lengths = [round(SHORTEST * (CONTEXT / SHORTEST) ** rng.random()) for _ in range(DOCUMENTS)]
    return [[1, *(rng.randrange(3, vocabulary) for _ in range(length - 1))] for length in lengths]


class Pace:
    """Lets a trainer make as many steps as a word says, then answers with their seconds and valid tokens."""

    def __init__(self, words: Iterator[str], answer: Callable[[Facts], None]) -> None:
        self.words, self.answer = words, answer
        self.left, self.tokens, self.losses, self.since = WARM, 0, list[float](), time.perf_counter()

    def __call__(self, tokens: int, loss: float) -> None:
        """At the end of every step. Raises SystemExit when no more is wanted."""
        self.tokens, self.left = self.tokens + tokens, self.left - 1
        self.losses.append(loss)
        if self.left:
            return
        seconds = time.perf_counter() - self.since
        self.answer({"seconds": seconds, "tokens": self.tokens, "loss": self.losses[0]})
        word = next(self.words, "")
        if not word:
            raise SystemExit
        self.left, self.tokens, self.since = int(word), 0, time.perf_counter()


def trl_settings(folder: Path, steps: int) -> Facts:
    silent = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    optimizer = {"learning_rate": LR, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "max_grad_norm": CLIP}
    plain = {"lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    rows = {"per_device_train_batch_size": ROWS, "max_steps": steps, "train_sampling_strategy": "sequential"}
    return {
        **silent,
        **optimizer,
        **plain,
        **rows,
        "lmbda": 0.0,
        "beta": 0.0,
        "output_dir": str(folder / "trl"),
    }


def trl_side(folder: Path, vocabulary: int, steps: int, pace: Pace) -> None:
    """TRL's trainer as it is, on rows laid out in the order that ours draws."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    class Counted(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            self.valid = int((inputs["labels"][:, 1:] != -100).sum())
            self.step_loss = super().training_step(model, inputs, *rest)
            return self.step_loss

    class Paced(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace(trainer.valid, float(trainer.step_loss))

    rows = documents(vocabulary)
    ordered = [rows[i] for step in json.loads((folder / "order.json").read_text()) for i in step]
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher").requires_grad_(False)
    teacher.config.use_cache = False
    words = Tokenizer(models.WordLevel({"</s>": 0}))
    trainer = Counted(
        model=LlamaForCausalLM.from_pretrained(folder / "student"),
        teacher_model=teacher,
        args=GKDConfig(**trl_settings(folder, steps)),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
        train_dataset=Dataset.from_dict({"input_ids": ordered, "labels": ordered}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>", eos_token="</s>"),
        callbacks=[Paced()],
    )
    trainer.train()


def cached(folder: Path, rows: list[Any], teacher: Any, vocabulary: int) -> Any:
    """A teacher that reads its draws from disk, where they are put first."""
    from distill.teachers.cache import CachedTeacher, link_shards, write_shards
    from distill.teachers.codec import make_codec
    from eval.core.artifacts import Key, build_artifact
    from eval.core.sections import Targets

    form = make_codec(Targets(form="sampled", draws=50), vocabulary, 1.0)
    write_shards(folder / "shards", rows, teacher, form, pad=0, report=lambda share: None)
    artifact: Facts = {
        "kind": "targets",
        "name": "t",
        "key": Key(""),
        "parents": {},
        "facts": dict(form.facts),
    }
    with build_artifact(folder / "t", **artifact) as temporary:
        link_shards(folder / "shards", temporary, sum(row.predicted for row in rows))
    return CachedTeacher(folder / "t", rows, form, {})


def our_side(kind: str, folder: Path, vocabulary: int, steps: int, pace: Pace) -> None:
    """Our trainer as it is, with a teacher that runs or one that is read from disk."""
    from transformers import LlamaForCausalLM

    from distill.method import Plain
    from distill.teachers.local import LocalTeacher
    from distill.trainer.loop import train
    from eval.core.config import Frozen
    from eval.core.documents import Row, pack
    from eval.core.sections import Loss, Optimizer, Train

    rows = [Row(f"d{i}", "random", 0, tokens) for i, tokens in enumerate(documents(vocabulary))]
    rows = list(pack(rows, CONTEXT)) if "packed" in kind else rows
    model = LlamaForCausalLM.from_pretrained(folder / "teacher").eval().requires_grad_(False)
    teacher: Any = LocalTeacher(Plain(Frozen()), "plain", model, vocabulary)
    if "cached" in kind:
        since = time.perf_counter()
        teacher = cached(folder / kind, rows, teacher, vocabulary)
        pace.answer({"cache_s": time.perf_counter() - since})
        del model
    adam, loss = Optimizer(name="adamw", lr=LR, betas=BETAS), Loss(weight=1)  # of the divergence
    schedule: Facts = {"steps": steps, "checkpoint_every": steps, "warmup": 0, "decay": 0}
    train(
        LlamaForCausalLM.from_pretrained(folder / "student"),
        rows,
        Train(rows=ROWS, optimizer=adam, loss=loss, clip=CLIP, **schedule),
        pad=0,
        seed=0,
        teacher=teacher,
        scratch=folder / f"{kind} scratch",
        report=lambda step: pace(step.tokens, step.loss),
    )


def work(args: argparse.Namespace) -> None:
    """One side: words on standard input, answers on standard output, all else on standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(args.threads)
    names = ["torch", "transformers", "accelerate"] + ["trl"] * (args.side == "trl")
    pace = Pace(iter(sys.stdin.readline, ""), lambda facts: print(json.dumps(facts), file=answers))
    pace.answer({"python": platform.python_version(), **{name: version(name) for name in names}})
    run = trl_side if args.side == "trl" else partial(our_side, args.side)
    run(args.folder, args.vocabulary, args.steps, pace)


class Side:
    """A running process of one side, warmed up."""

    def __init__(self, kind: str, folder: Path, words: list[str], args: argparse.Namespace) -> None:
        threads, python = str(args.threads), args.trl_python if kind == "trl" else sys.executable
        env = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.log = folder / f"{kind}.log"
        with self.log.open("w") as log:
            command = [python, __file__, "--side", kind, "--folder", folder, "--threads", threads, *words]
            self.process = subprocess.Popen(command, stderr=log, env=os.environ | env, **PIPES)
        self.versions = self.read_answer()
        self.cache_seconds = self.read_answer()["cache_s"] if "cached" in kind else None
        self.loss = self.read_answer()["loss"]

    def read_answer(self) -> Facts:
        from eval.core.errors import UserError

        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(self.log.stem, self.log.read_text().strip()[-400:], "fix that side first")
        return json.loads(line)

    def rate(self, steps: int) -> float:
        """Valid tokens per second of so many steps, after one that is not counted."""
        for number in (1, steps):
            print(number, file=self.process.stdin, flush=True)
            answer = self.read_answer()
        return answer["tokens"] / answer["seconds"]


def run_start(vocabulary: int, args: argparse.Namespace, rates: Rates) -> Facts:
    """Adds the rates of one start of all sides, whose first losses must agree; returns its facts."""
    from distill.trainer.loop import row_order
    from eval.core.errors import UserError
    from eval.engines import silenced
    from scripts.bench_distill import STUDENT, TEACHER, model

    steps = WARM + (args.rounds + LEFT_OUT + 1) * (1 + STEPS[vocabulary])
    words = ["--vocabulary", str(vocabulary), "--steps", str(steps)]
    with TemporaryDirectory() as name, silenced("transformers"), ExitStack() as stack:
        folder, sides = Path(name), {}
        model(STUDENT, vocabulary, 1).save_pretrained(folder / "student")
        model(TEACHER, vocabulary, 2).save_pretrained(folder / "teacher")
        (folder / "order.json").write_text(json.dumps(row_order(DOCUMENTS, steps, ROWS, seed=0)))
        for kind in SIDES:
            sides[kind] = Side(kind, folder, words, args)
            stack.callback(sides[kind].process.communicate)  # it reads the end of its input, and goes
        losses = {kind: side.loss for kind, side in sides.items()}
        if not math.isclose(losses["trl"], losses["padded online"], rel_tol=1e-4):
            raise UserError("first loss", losses, "both sides must train the same")
        for number in range(args.rounds + LEFT_OUT):
            for kind in SIDES[:: -1 if number % 2 else 1]:
                rate = sides[kind].rate(STEPS[vocabulary])
                rates[kind] += [rate] if number >= LEFT_OUT else []
    cache_seconds = {kind: side.cache_seconds for kind, side in sides.items() if side.cache_seconds}
    versions = {kind: sides[kind].versions for kind in SIDES[:2]}
    return {"first_loss": losses, "cache_s": cache_seconds, "versions": versions}


def rows_of(vocabulary: int, rates: Rates) -> list[Facts]:
    """A row for each side of ours: its rate over TRL's, round by round."""
    from scripts.bench_loss import ratio_row

    rows = []
    for kind in SIDES[1:]:
        limit = LIMITS[vocabulary][kind.split()[1]]
        what = f"{kind} / TRL, valid tokens/s, V = {vocabulary}"
        row = ratio_row(what, rates[kind], rates["trl"], limit, at_least=True)
        row["ours_per_s"], row["trl_per_s"] = (
            row.pop("seconds"),
            row.pop("bare_seconds"),
        )  # it was given rates
        rows.append(row)
    return rows


def compare(args: argparse.Namespace) -> None:
    from eval.core.records import machine
    from scripts.bench_distill import format_row

    facts: Facts = {"device": machine().cpu, "threads": args.threads, "rows": []}
    print(f"{facts['device']}, {args.threads} threads, {args.starts} starts of {args.rounds} rounds")
    for vocabulary in LIMITS:
        rates: Rates = {kind: [] for kind in SIDES}
        for _ in range(args.starts):
            start = run_start(vocabulary, args, rates)
        facts[str(vocabulary)] = {**start, "rates": rates}
        for row in rows_of(vocabulary, rates):
            facts["rows"].append(row)
            print(format_row(row), f" {row['ours_per_s']:.0f} / {row['trl_per_s']:.0f}", flush=True)
        print("  ", *(f"{name} {value}\n  " for name, value in start.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", help="of an environment that has TRL 1.16 or later")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    for name, default in (("threads", 2), ("starts", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, kind in (("side", str), ("folder", Path), ("vocabulary", int), ("steps", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.threads, args.starts, args.rounds) < 1:
        parser.error("--threads, --starts and --rounds are 1 or more")
    if not (args.side or args.trl_python):
        parser.error("--trl-python is needed")
    (work if args.side else compare)(args)


if __name__ == "__main__":
    from eval.core.errors import entry  # of the standard library alone: TRL's environment has it too

    entry(main)()
