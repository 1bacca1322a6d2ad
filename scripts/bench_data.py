"""`python scripts/bench_data.py [--megabytes 250 1000] [--json FILE]`: text to rows, beside tokenization.

A corpus is made of the standard library's words by a Zipf law, in four files of JSON Lines: documents of 60
bytes to 40 KB, of which one in 25 is another with a few words changed, and one in 200 a copy. Ours is what a
command does before its first job: the data artifact, then the tokens. Bare is `tokenizers` alone: a process
for each core reads lines of the same documents, encodes them in batches and drops the ids; its start is not
counted. CPU seconds are counted too, so that neighbours on the machine are on neither's clock. Memory is the
largest resident set (VmHWM) of any process of a stage. `second start` is the same command once all is there,
imports left out; `reading` is one process that reads every row in random order.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import count, cycle, pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import yaml

from eval.core.commands import add_json, positive, write_json
from eval.core.config import ROOT
from eval.core.errors import entry
from eval.core.records import machine

VOCABULARY, CONTEXT, BATCH = 16384, 256, 2**20
FILES, NEAR, COPY = 4, 25, 200  # of how many documents one is nearly, or just, another
ENDINGS = (" ", ", ", ". ", ".\n")
LIMITS = {"ratio": 2.0, "memory_gib": 1.0, "second_start_s": 5.0}
CORES = len(os.sched_getaffinity(0))


@cache
def word_forms() -> list[str]:
    """Words of the standard library, frequent ones first, with each of `ENDINGS`; then all with capitals."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(errors="ignore") for pattern in ("*.py", "*/*.py") for path in root.glob(pattern)]
    counts = Counter(word for text in texts for word in re.findall("[A-Za-z]+", text))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    forms = [word + ending for ending in ENDINGS for word in words]
    return [*forms, *(form[0].upper() + form[1:] for form in forms)]


def draw_documents() -> Iterator[np.ndarray]:
    """Places in `word_forms` of the words of each document, without an end."""
    rng, words = np.random.default_rng(0), len(word_forms()) // (2 * len(ENDINGS))
    zipf = np.cumsum((np.arange(words) + 2.7) ** -1.15)  # as in English: the first 1,000 are three in four
    recent: deque[np.ndarray] = deque(maxlen=50)
    for number in count(1):
        if number % NEAR == 0:
            document = recent[int(rng.integers(len(recent)))].copy()
            places = rng.integers(len(document), size=1 + len(document) // 100)
            document[places] = rng.integers(words, size=len(places))
        elif number % COPY == 1 and recent:
            document = recent[0]
        else:
            size = int(np.clip(rng.lognormal(np.log(350), 1), 10, 6000))
            ending = np.searchsorted((0.84, 0.92, 0.98), rng.random(size))
            capital = np.concatenate([[True], ending[:-1] >= 2])
            drawn = zipf.searchsorted(rng.random(size) * zipf[-1])
            document = drawn + words * (ending + len(ENDINGS) * capital)
            recent.append(document)
        yield document


def write_corpus(folder: Path, megabytes: float) -> None:
    """Files of documents, decided by the size alone."""
    forms, written = word_forms(), 0
    with ExitStack() as stack:
        files = [stack.enter_context((folder / f"corpus-{i}.jsonl").open("w")) for i in range(FILES)]
        for file, document in zip(cycle(files), draw_documents(), strict=False):
            text = "".join([forms[place] for place in document.tolist()])
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)
            if written > megabytes * 1e6:
                return


def write_study(folder: Path, megabytes: float, near_duplicates: float | None) -> Path:
    """A study on that corpus."""
    write_corpus(folder, megabytes)
    source = {"kind": "dataset", "path": "json", "data_files": str(folder / "corpus-*.jsonl")}
    data = {"documents": [source], "train_rows": "all", "context": CONTEXT}
    study = {
        "name": "bench",
        "runs": str(folder),
        "seeds": [0],
        "data": {**data, "near_duplicates": near_duplicates},
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
    result = {**answer, "memory_gib": memory, "cpu_s": cpu - answer["imports_cpu_s"]}
    times = f"{result['seconds']:7.1f} s {result['cpu_s']:7.1f} CPU s"
    print(f"  {role:<13} {times} {memory:6.2f} GiB in the largest process", flush=True)
    return result


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


def bench(megabytes: float, near_duplicates: float | None) -> dict[str, Any]:
    """The figures of one size of corpus."""
    from distill.models.load import train_tokenizer

    with TemporaryDirectory() as name:
        folder = Path(name)
        path = write_study(folder, megabytes, near_duplicates)
        with (folder / "corpus-0.jsonl").open() as lines:
            sample = [json.loads(line)["text"] for _, line in zip(range(300), lines, strict=False)]
        train_tokenizer(sample, VOCABULARY).save_pretrained(str(folder / "tokenizer"))
        stages = {role: measured(role, path) for role in ("documents", "tokens")}
        bare = bare_tokenization(folder / "bench" / "data" / "train.jsonl", folder / "tokenizer")
        print(
            f"{megabytes:g} MB, {bare['tokens']:,} tokens; bare tokenization {bare['seconds']:.1f} s, "
            f"{bare['cpu_s']:.1f} CPU s",
            flush=True,
        )
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
        "ours_cpu_s": ours["cpu_s"],
        "memory_gib": max(stage["memory_gib"] for stage in stages.values()),
        "second_start_s": stages["second start"]["seconds"],
    }


@entry
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=positive, nargs="+", default=[25.0, 50.0, 100.0])
    parser.add_argument("--near-duplicates", type=positive, help="data.near_duplicates, such as 0.8")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--study", type=Path, help=argparse.SUPPRESS)
    add_json(parser)
    args = parser.parse_args()
    if args.role:
        print(json.dumps(play(args.role, args.study)))
        return 0
    results = []
    for megabytes in args.megabytes:
        results.append(result := bench(megabytes, args.near_duplicates))
        print(
            f"  all before the first job / bare: {result['ratio']:.2f} (in CPU time "
            f"{result['cpu_ratio']:.2f}, tokens alone {result['tokens_ratio']:.2f})"
        )
    if len(results) > 1:
        first, last = results[0], results[-1]
        text, cpu, memory = (last[name] / first[name] for name in ("megabytes", "ours_cpu_s", "memory_gib"))
        print(f"{text:g} times the text takes {cpu:.2f} times the CPU time, {memory:.2f} times the memory")
    missed = [name for name, limit in LIMITS.items() if results[-1][name] > limit]
    print("all figures are met" if not missed else f"missed: {', '.join(missed)}")
    write_json(args.json, {"machine": machine(), "limits": LIMITS, "results": results})
    return 0


if __name__ == "__main__":
    main()
