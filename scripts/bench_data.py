"""`python scripts/bench_data.py [--megabytes 50 100] [--json FILE]`: documents to rows, beside tokenization.

A corpus of lines of the standard library in random order is written as JSONL. Ours is what a command does
before its first job: the data artifact, then the tokens. Bare is `tokenizers` alone: a process for each core
reads lines of the same documents, encodes them in batches and drops the ids; its start is not counted. CPU
seconds are counted too, so that neighbours on the machine are on neither's clock. Memory is the largest
resident set (VmHWM) of any process of a stage. `second start` is the same command once all is there, imports
left out; `reading` is one process that reads every row in random order.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import yaml

from eval.core.commands import add_json, positive, write_json
from eval.core.config import ROOT
from eval.core.errors import entry
from eval.core.records import machine

VOCABULARY, CONTEXT, BATCH = 16384, 256, 2**20
LIMITS = {"ratio": 2.0, "memory_gib": 1.0, "second_start_s": 5.0}
CORES = len(os.sched_getaffinity(0))


def write_corpus(path: Path, megabytes: float) -> None:
    """Documents of 1 to 12 KB: lines of the standard library in random order, decided by the size alone."""
    rng, written = random.Random(0), 0
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    lines = [line for file in files for line in file.read_text(errors="ignore").splitlines(keepends=True)]
    with path.open("w", encoding="utf-8") as out:
        number = 0
        while written < megabytes * 1e6:
            text = f"# {number}\n" + "".join(rng.choices(lines, k=rng.randrange(30, 330)))
            out.write(json.dumps({"id": number, "text": text}) + "\n")
            written, number = written + len(text.encode()), number + 1


def write_study(folder: Path, megabytes: float) -> Path:
    """A study on that corpus."""
    write_corpus(folder / "corpus.jsonl", megabytes)
    source = {"kind": "dataset", "path": "json", "data_files": str(folder / "corpus.jsonl")}
    study = {
        "name": "bench",
        "runs": str(folder),
        "seeds": [0],
        "data": {"documents": [source], "train_rows": "all", "context": CONTEXT},
        "base": {"architecture": {"model_type": "llama"}, "vocab_size": VOCABULARY, "train": {}},
        "method": {"name": "placebo"},
        "train": {},
        "budget": "default",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


def play(role: str, path: Path) -> dict[str, Any]:
    """One stage, in a process of its own; returns its seconds, imports left out."""
    import torch  # noqa: F401  # a job has it
    from transformers import AutoTokenizer  # noqa: F401

    from distill.data.rows import rows_taken, training_rows
    from distill.data.split import prepare
    from distill.data.tokens import make_tokens
    from eval.core.study import load_study
    from eval.engines import load_tokenizer

    study, start, cpu = load_study(path), time.perf_counter(), time.process_time()
    if role in ("documents", "second start"):
        prepare(study)
    facts: dict[str, Any] = {}
    if role != "documents":
        tokenizer = load_tokenizer(path.parent / "tokenizer")
        make_tokens(study, tokenizer, verify=role != "reading")
    if role in ("second start", "reading"):
        rows = training_rows(study, tokenizer)
        order = random.Random(0).sample(range(len(rows)), len(rows)) if role == "reading" else range(64)
        facts = {"read": sum(len(rows[i].tokens) for i in order), **rows_taken(study, tokenizer)}
    return {"seconds": time.perf_counter() - start, "imports_cpu_s": cpu, **facts}


def watch(process: subprocess.Popen[str]) -> tuple[float, float]:
    """GiB of the largest process of a session until it ends, and the CPU seconds of all."""
    memory, cpu, tick = 0.0, dict[str, float](), os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[3]) != process.pid:  # of another session
                    continue
                cpu[stat.parent.name] = (int(fields[11]) + int(fields[12])) / tick
                status = (stat.parent / "status").read_text()
                memory = max(memory, int(status.partition("VmHWM:")[2].split()[0]) / 2**20)
            except (OSError, IndexError):  # it has ended
                continue
        time.sleep(0.1)
    return memory, sum(cpu.values())


def measured(role: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--role", role, "--study", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=env)
    memory, cpu = watch(process)
    assert process.stdout is not None
    if process.returncode:
        raise RuntimeError(f"{role} ended with exit code {process.returncode}")
    answer = json.loads(process.stdout.read().splitlines()[-1])
    return {**answer, "memory_gib": memory, "cpu_s": cpu - answer["imports_cpu_s"]}


def texts_of(path: Path, start: int, stop: int) -> Iterator[list[str]]:
    with path.open("rb") as lines:
        lines.seek(start)
        while lines.tell() < stop:
            yield [json.loads(line)["text"] for line in lines.readlines(min(BATCH, stop - lines.tell()) - 1)]


def tokenize_bare(path: Path, tokenizer: str, start: int, stop: int, ready: Any, results: Any) -> None:
    from tokenizers import Tokenizer

    bare = Tokenizer.from_file(tokenizer)
    ready.wait()
    began, cpu = time.perf_counter(), time.process_time()
    count = 0
    for texts in texts_of(path, start, stop):
        count += sum(len(e.ids) for e in bare.encode_batch(texts, add_special_tokens=False))
    results.put((time.perf_counter() - began, time.process_time() - cpu, count))


def bare_tokenization(documents: Path, tokenizer: Path) -> dict[str, float]:
    """Seconds of the slowest process, CPU seconds of all, tokens."""
    cuts, size = [0], documents.stat().st_size
    with documents.open("rb") as lines:
        for i in range(1, CORES + 1):
            lines.seek(size * i // CORES)
            lines.readline()
            cuts.append(lines.tell())
    context = get_context("spawn")
    ready, results = context.Barrier(CORES), context.Queue()
    shares = [
        (documents, str(tokenizer / "tokenizer.json"), start, stop, ready, results)
        for start, stop in pairwise(cuts)
    ]
    processes = [context.Process(target=tokenize_bare, args=share) for share in shares]
    for process in processes:
        process.start()
    answers = [results.get() for _ in processes]
    for process in processes:
        process.join()
    wall, cpu, count = zip(*answers, strict=True)
    return {"seconds": max(wall), "cpu_s": sum(cpu), "tokens": sum(count)}


def bench(megabytes: float) -> dict[str, Any]:
    """The figures of one size of corpus."""
    from distill.models.load import train_tokenizer

    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_study(folder, megabytes)
        with (folder / "corpus.jsonl").open() as lines:
            sample = [json.loads(line)["text"] for _, line in zip(range(300), lines, strict=False)]
        train_tokenizer(sample, VOCABULARY).save_pretrained(str(folder / "tokenizer"))
        stages = {role: measured(role, path) for role in ("documents", "tokens")}
        bare = bare_tokenization(folder / "bench" / "data" / "train.jsonl", folder / "tokenizer")
        stages |= {role: measured(role, path) for role in ("second start", "reading")}
    ours = {
        name: sum(stages[role][name] for role in ("documents", "tokens")) for name in ("seconds", "cpu_s")
    }
    return {
        "megabytes": megabytes,
        "tokens": bare["tokens"],
        "bare": bare,
        "stages": stages,
        "ratio": ours["seconds"] / bare["seconds"],
        "tokens_ratio": stages["tokens"]["seconds"] / bare["seconds"],
        "cpu_ratio": ours["cpu_s"] / bare["cpu_s"],
        "memory_gib": max(stage["memory_gib"] for stage in stages.values()),
        "second_start_s": stages["second start"]["seconds"],
    }


@entry
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=positive, nargs="+", default=[25.0, 50.0, 100.0])
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--study", type=Path, help=argparse.SUPPRESS)
    add_json(parser)
    args = parser.parse_args()
    if args.role:
        print(json.dumps(play(args.role, args.study)))
        return 0
    results = []
    for megabytes in args.megabytes:
        results.append(result := bench(megabytes))
        print(
            f"{megabytes:g} MB, {result['tokens']:,} tokens; bare tokenization "
            f"{result['bare']['seconds']:.1f} s, {result['bare']['cpu_s']:.1f} CPU s"
        )
        for role, stage in result["stages"].items():
            print(
                f"  {role:<13} {stage['seconds']:7.1f} s {stage['cpu_s']:7.1f} CPU s "
                f"{stage['memory_gib']:6.2f} GiB in the largest process"
            )
        print(
            f"  all before the first job / bare: {result['ratio']:.2f} (in CPU time "
            f"{result['cpu_ratio']:.2f}, tokens alone {result['tokens_ratio']:.2f})"
        )
    if len(results) > 1:
        first, last = results[0], results[-1]
        growth = sum(last["stages"][role]["cpu_s"] for role in ("documents", "tokens"))
        growth /= sum(first["stages"][role]["cpu_s"] for role in ("documents", "tokens"))
        times = last["megabytes"] / first["megabytes"]
        print(f"{times:g} times the text takes {growth:.2f} times the CPU time")
    missed = [name for name, limit in LIMITS.items() if results[-1][name] > limit]
    print("all figures are met" if not missed else f"missed: {', '.join(missed)}")
    write_json(args.json, {"machine": machine(), "limits": LIMITS, "results": results})
    return 0


if __name__ == "__main__":
    main()
