"""What several tests need: a tiny tokenizer, model and corpus, and the real command line."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from distill.models.load import train_tokenizer
from tests.warm_python import warm_python

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
ROOT = Path(__file__).resolve().parent.parent
WORDS = {
    "code": [
        "def",
        "return",
        "self",
        "None",
        "import",
        "for",
        "in",
        "if",
        "else",
        "class",
        "print",
        "lambda",
        "yield",
        "with",
        "as",
        "try",
    ],
    "prose": [
        "the",
        "a",
        "of",
        "river",
        "stone",
        "quiet",
        "morning",
        "and",
        "they",
        "walked",
        "under",
        "old",
        "trees",
        "while",
        "rain",
        "fell",
    ],
}


def text(domain: str, seed: int, words: int = 120) -> str:
    """Text with something to learn: each word makes a few others likely."""
    rng = random.Random(f"{domain}{seed}")
    known = WORDS[domain]
    out, at = [], rng.randrange(len(known))
    for _ in range(words):
        out.append(known[at])
        at = (at * 3 + rng.choice((1, 1, 1, 2, 5))) % len(known)
    return " ".join(out) + "\n"


def write_corpus(path: Path, documents: int = 40, words: int = 120) -> Path:
    """A JSONL of documents of two domains."""
    rows = [
        {"id": f"{domain}-{i}", "domain": domain, "text": text(domain, i, words)}
        for i in range(documents // 2)
        for domain in WORDS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerBase:
    return train_tokenizer([text(d, i) for d in WORDS for i in range(5)], vocab_size)


def tiny_model(vocab_size: int = 320, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        **SHAPE,
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def tiny_study(folder: Path, **changes: Any) -> Path:
    """A study that trains in seconds; `changes` replace top-level keys. Returns its YAML file."""
    corpus = write_corpus(folder / "corpus.jsonl")
    shifted = write_corpus(folder / "shifted.jsonl", documents=8, words=60)
    source = {"kind": "dataset", "path": "json", "domain_column": "domain"}
    training = {"epochs": 1, "rows": 4, "optimizer": {"name": "muon", "lr": 0.02, "lr_rest": 0.01}}
    study = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "seeds": [0, 1],
        "data": {
            "documents": [{**source, "data_files": str(corpus)}],
            "shifted": {"far": [{**source, "data_files": str(shifted)}]},
            "validation": 6,
            "test": 2,
            "scored_bytes": 400,
            "context": 32,
            "train_rows": 32,
        },
        "base": {
            "architecture": {"model_type": "llama", **SHAPE},
            "vocab_size": 320,
            "train": training,
        },
        "method": {"name": "ensemble", "settings": {"members": 2}},
        "train": training,
        "recipes": [],
        "budget": "tiny",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps({**study, **changes}))))  # copies: no aliases
    return path


def complete(
    command: list[str | Path], timeout: float = 300, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end. After `timeout` seconds it is killed with all that it started."""
    with subprocess.Popen(
        list(map(str, command)),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # its children hold the pipes too: they would be waited for
            out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise AssertionError(f"{command} took more than {timeout} s:\n{out}\n{err}") from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def run(*words: str | Path, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS...` from the project's root."""
    one_thread = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return complete([warm_python(), *words], timeout, env={**one_thread, **env})


def run_here(module: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE WORDS...` in this process, seconds faster: for mistakes that end it before its work."""
    out, err, code = StringIO(), StringIO(), 0
    argv, sys.argv = sys.argv, [module, *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            importlib.import_module(module).main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    return subprocess.CompletedProcess([module, *words], code, out.getvalue(), err.getvalue())


def launch(
    study: Path, *words: str, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch distill/train.py --config STUDY`, or `torchrun` for several processes."""
    launcher = ["-m", "accelerate.commands.launch"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return run(*launcher, "distill/train.py", "--config", str(study), *words, timeout=timeout)


def table_width(output: str) -> int:
    """Columns of the widest line of the tables that rich printed."""
    return max(len(line) for line in output.splitlines() if line[:1] in "┏┃┡│├└")
