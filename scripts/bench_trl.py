"""`python scripts/bench_trl.py --trl-python VENV/bin/python [--json FILE]`: our trainer beside TRL's.

Both train one student from one teacher (the same files of weights), in float32, on the same documents of
unequal length, eight to a step, with AdamW of the same settings, clipping and divergence: the forward KL,
which is `beta=0, lmbda=0` of GKD. What is compared is valid tokens per second: those that carry loss.

Each side is a process in an environment of its own, and runs its trainer's own loop: `GKDTrainer.train`
there, `distill.loop.train` here. At the end of a step it waits until it is told to go on, so that rounds go
from side to side and a slow spell hits all; the clock runs from the end of one step to that of another, and
so counts all that a step does. A round gives one ratio: printed is the median with its 95 % interval (order
statistics). All sides are started afresh `--starts` times.

What they do differently: TRL forms the logits of padded places too, all [B, T, V] of student and teacher at
once; ours forms those of valid tokens, chunk by chunk. `padded` takes the very batches that TRL takes, and
its first loss must be TRL's. `packed` lays documents end to end (`data.packing`), eight such rows to a
step; GKDTrainer cannot, for it hands no positions to its models. `cached` reads 50 draws of the teacher per
token from disk in place of running it: an unbiased estimate of the same divergence, whose making is told
and not counted.

In TRL's favour: no gradient checkpointing (its default, which computes everything twice), no chat template
in its collator, no key-value cache of the teacher. Nothing is logged, saved or evaluated on either side.
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
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, SHORTEST, DOCUMENTS, ROWS = 256, 64, 96, 8  # tokens a row; tokens; in all; rows a step
LR, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
WARM, STEPS = 2, {8000: 4, 32000: 2}  # steps before the clock runs; vocabulary -> steps a round
LIMITS = {8000: {"online": 1.0, "cached": 1.5}, 32000: {"online": 1.3, "cached": 1.5}}
SIDES = ("trl", "padded online", "padded cached", "packed online", "packed cached")
Found = dict[str, Any]
Rates = dict[str, list[float]]  # side -> valid tokens per second, an entry per round


def documents(vocabulary: int) -> list[list[int]]:
    """Random tokens after a boundary token; lengths log-uniform from SHORTEST to CONTEXT."""
    rng = random.Random(0)
    lengths = [round(SHORTEST * (CONTEXT / SHORTEST) ** rng.random()) for _ in range(DOCUMENTS)]
    return [[1, *(rng.randrange(3, vocabulary) for _ in range(length - 1))] for length in lengths]


class Pace:
    """Lets a trainer make as many steps as it is told, then answers with their seconds and valid tokens."""

    def __init__(self, told: Iterator[str], answer: Callable[[Found], None]) -> None:
        self.told, self.answer = told, answer
        self.left, self.tokens, self.losses = WARM, 0, list[float]()
        self.since = time.perf_counter()

    def __call__(self, tokens: int, loss: float) -> None:
        """At the end of every step. Raises SystemExit when no more is wanted."""
        self.tokens, self.left = self.tokens + tokens, self.left - 1
        self.losses.append(loss)
        if self.left:
            return
        seconds = time.perf_counter() - self.since
        self.answer({"seconds": seconds, "tokens": self.tokens, "loss": self.losses[0]})
        word = next(self.told, "")
        if not word:
            raise SystemExit
        self.left, self.tokens, self.since = int(word), 0, time.perf_counter()


def trl_settings(folder: Path, steps: int) -> Found:
    off = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    precise = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    rate = {"learning_rate": LR, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    adam = {"adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "max_grad_norm": CLIP}
    rows = {"per_device_train_batch_size": ROWS, "max_steps": steps, "train_sampling_strategy": "sequential"}
    kind = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, "output_dir": str(folder / "trl")}
    return {**off, **precise, **rate, **adam, **rows, **kind}


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
            self.told = super().training_step(model, inputs, *rest)
            return self.told

    class Paced(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace(trainer.valid, float(trainer.told))

    rows = documents(vocabulary)
    laid = [rows[i] for step in json.loads((folder / "order.json").read_text()) for i in step]
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher").requires_grad_(False)
    teacher.config.use_cache = False
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    ids = {word: i for i, word in enumerate(special.values())}
    trainer = Counted(
        model=LlamaForCausalLM.from_pretrained(folder / "student"),
        teacher_model=teacher,
        args=GKDConfig(**trl_settings(folder, steps)),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=0),
        train_dataset=Dataset.from_dict({"input_ids": laid, "labels": laid}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(ids)), **special
        ),
        callbacks=[Paced()],
    )
    trainer.train()


def cached(folder: Path, rows: list[Any], teacher: Any, vocabulary: int) -> Any:
    """A teacher that reads its draws from disk, where they are put first."""
    from distill.signals import CachedTeacher, join, make_form, write_shards
    from eval.artifacts import building
    from eval.sections import Targets

    form = make_form(Targets(form="sampled"), vocabulary, 1.0)
    write_shards(folder / "shards", rows, teacher, form, pad=0, report=lambda share: None)
    about: Found = {"kind": "targets", "name": "t", "key": "", "parents": {}, "facts": dict(form.facts)}
    with building(folder / "t", **about) as aside:
        join(folder / "shards", aside, sum(row.predicted for row in rows))
    return CachedTeacher(folder / "t", rows, form, {})


def our_side(kind: str, folder: Path, vocabulary: int, steps: int, pace: Pace) -> None:
    """Our trainer as it is, with a teacher that runs or one that is read from disk."""
    from transformers import LlamaForCausalLM

    from distill.loop import train
    from distill.method import Plain
    from distill.teachers import LiveTeacher
    from eval.documents import Row, pack
    from eval.sections import Frozen, Loss, Optimizer, Train

    rows = [Row(f"d{i}", "random", 0, tokens) for i, tokens in enumerate(documents(vocabulary))]
    rows = list(pack(rows, CONTEXT)) if "packed" in kind else rows
    model = LlamaForCausalLM.from_pretrained(folder / "teacher").eval().requires_grad_(False)
    teacher: Any = LiveTeacher(Plain(Frozen()), "plain", model, vocabulary)
    if "cached" in kind:
        since = time.perf_counter()
        teacher = cached(folder / kind, rows, teacher, vocabulary)
        pace.answer({"making_s": time.perf_counter() - since})
        del model
    adam = Optimizer(name="adamw", lr=LR, betas=BETAS)
    once: Found = {"steps": steps, "checkpoint_every": steps, "warmup": 0, "decay": 0}
    train(
        LlamaForCausalLM.from_pretrained(folder / "student"),
        rows,
        Train(rows=ROWS, optimizer=adam, loss=Loss(weight=1), clip=CLIP, **once),
        pad=0,
        seed=0,
        teacher=teacher,
        scratch=folder / f"{kind} scratch",
        report=lambda step: pace(step.tokens, step.loss),
    )


def work(given: argparse.Namespace) -> None:
    """One side: words on standard input, answers on standard output, all else on standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(given.threads)
    names = ["torch", "transformers", "accelerate", *(["trl"] if given.side == "trl" else [])]
    pace = Pace(iter(sys.stdin.readline, ""), lambda found: print(json.dumps(found), file=answers))
    pace.answer({"python": platform.python_version(), **{name: version(name) for name in names}})
    where = given.folder, given.vocabulary, given.steps, pace
    if given.side == "trl":
        trl_side(*where)
    else:
        our_side(given.side, *where)


class Side:
    """A running process of one side, warmed up."""

    def __init__(self, kind: str, python: str, folder: Path, words: list[str], threads: int) -> None:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env = kept | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.log = folder / f"{kind}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, __file__, "--side", kind, "--folder", folder, "--threads", str(threads), *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        self.versions = self.hear()
        self.making = self.hear()["making_s"] if "cached" in kind else None
        self.loss = self.hear()["loss"]

    def hear(self) -> Found:
        from eval.errors import UserError

        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(self.log.stem, self.log.read_text().strip()[-400:], "mend that side first")
        return json.loads(line)

    def rate(self, steps: int) -> float:
        """Valid tokens per second of so many steps."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        found = self.hear()
        return found["tokens"] / found["seconds"]

    def stop(self) -> None:
        self.process.communicate()  # it reads the end of its input, and goes


def started(vocabulary: int, given: argparse.Namespace) -> tuple[Rates, Found]:
    """Rates of every side in every round of one start of all; and what to tell of it.

    Raises:
        UserError: a side stopped, or the first losses of TRL and of ours differ.
    """
    from distill.loop import row_order
    from eval.errors import UserError
    from scripts.bench_distill import STUDENT, TEACHER, model

    steps = WARM + (given.rounds + 1) * STEPS[vocabulary]
    words = ["--vocabulary", str(vocabulary), "--steps", str(steps)]
    rates: Rates = {kind: [] for kind in SIDES}
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder, sides = Path(name), {}
        model(STUDENT, vocabulary, 1).save_pretrained(folder / "student")
        model(TEACHER, vocabulary, 2).save_pretrained(folder / "teacher")
        (folder / "order.json").write_text(json.dumps(row_order(DOCUMENTS, steps, ROWS, seed=0)))
        for kind in SIDES:
            python = given.trl_python if kind == "trl" else sys.executable
            sides[kind] = Side(kind, python, folder, words, given.threads)
            stack.callback(sides[kind].stop)
        losses = {kind: side.loss for kind, side in sides.items()}
        if not math.isclose(losses["trl"], losses["padded online"], rel_tol=1e-4):
            raise UserError("first loss", losses, "both sides must train the same")
        for number in range(given.rounds):
            for kind in SIDES[:: -1 if number % 2 else 1]:
                rates[kind].append(sides[kind].rate(STEPS[vocabulary]))
    making = {kind: side.making for kind, side in sides.items() if side.making}
    versions = {"trl": sides["trl"].versions, "ours": sides["padded online"].versions}
    return rates, {"first_loss": losses, "making_s": making, "versions": versions}


def rows_of(vocabulary: int, rates: Rates) -> list[Found]:
    """A row for each side of ours: its rate over TRL's, round by round."""
    from scripts.bench_loss import ratio_row

    found = []
    for kind in SIDES[1:]:
        limit = LIMITS[vocabulary][kind.split()[1]]
        what = f"{kind} / TRL, valid tokens/s, V = {vocabulary}"
        row = ratio_row(what, rates[kind], rates["trl"], limit, at_least=True)
        found.append({**row, "ours_per_s": row.pop("seconds"), "trl_per_s": row.pop("bare_seconds")})
    return found


def compare(given: argparse.Namespace) -> None:
    from eval.records import machine
    from scripts.bench_distill import line

    facts: Found = {"device": machine().cpu, "threads": given.threads, "rows": []}
    print(f"{facts['device']}, {given.threads} threads, {given.starts} starts of {given.rounds} rounds")
    for vocabulary in LIMITS:
        rates: Rates = {kind: [] for kind in SIDES}
        for _ in range(given.starts):
            more, told = started(vocabulary, given)
            rates = {kind: rates[kind] + more[kind] for kind in SIDES}
        facts |= {"versions": told["versions"], str(vocabulary): {**told, "rates": rates}}
        for row in rows_of(vocabulary, rates):
            facts["rows"].append(row)
            print(line(row), f" {row['ours_per_s']:.0f} / {row['trl_per_s']:.0f}", flush=True)
        print(f"  first loss {told['first_loss']}, making s {told['making_s']}", flush=True)
    print(f"versions {facts['versions']}")
    if given.json:
        given.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", help="of an environment that has TRL 1.16 or later")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10, help="of one start")
    parser.add_argument("--starts", type=int, default=2)
    for name, kind in (("side", str), ("folder", Path), ("vocabulary", int), ("steps", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        work(given)
    elif given.trl_python:
        compare(given)
    else:
        parser.error("--trl-python is needed")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from eval.errors import entry  # of the standard library alone: TRL's environment has it too

    entry(main)()
