"""The README's section "Your own model, data and method", as printed, through the pipeline in a copy of the tree."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from eval.core.config import read_yaml
from tests.helpers import ROOT, SHAPE, WORDS, complete, text, tiny_tokenizer

pytestmark = pytest.mark.slow
COPIED = ("compress", "configs", "distill", "eval", "scripts", "pyproject.toml", "requirements.lock")
SMALL = {  # what the example inherits, in seconds
    "seeds": [0, 1],
    "recipes": ["int8"],
    "cost": {"processes": 2, "requests": 10, "prompt_tokens": 32, "new_tokens": 4},
}
FEW = {"validation": 8, "test": 4, "scored_bytes": 512, "context": 64, "train_rows": 48}


def block(page, language, after=""):
    """The first block of a language in a page, behind the words `after`."""
    return re.search(rf"```{language}\n(.*?)```", page.split(after, 1)[1] if after else page, re.DOTALL)[1]


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with the model, the data and the method that the README names, each tiny."""
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    default = read_yaml(ROOT / "configs" / "studies" / "default.yaml")
    small = {**default, **SMALL, "data": {**default["data"], **FEW}}
    write(tmp_path / "configs" / "studies" / "default.yaml", yaml.safe_dump(small))
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Qwen3Config(**{**SHAPE, **ids, "vocab_size": 320, "head_dim": 32})
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    tiny_tokenizer().save_pretrained(tmp_path / "Qwen" / "Qwen3-0.6B")
    rows = [{"topic": topic, "text": text(topic, i)} for i in range(40) for topic in WORDS]
    write(tmp_path / "my" / "documents.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for i in range(6):
        write(tmp_path / "my" / "other" / f"{i}.md", text("prose", 1000 + i))
    page = (ROOT / "docs" / "own-method.md").read_text()
    write(tmp_path / "ours" / "neural_cache.py", block(page, "python", "`ours/neural_cache.py`"))
    return tmp_path


def test_the_example_runs_as_printed(tree):
    section = (ROOT / "README.md").read_text().split("## Your own model, data and method\n")[1]
    write(tree / "mine.yaml", block(section, "yaml"))
    words = shlex.split(block(section, "bash"), comments=True)
    assert words == ["bash", "scripts/pipeline.sh", "mine.yaml"]
    done = complete(words, timeout=800, cwd=tree, env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1"})
    assert done.returncode in (0, 1, 2), done.stdout + done.stderr
    run = tree / "runs" / "mine"
    gate = json.loads((run / "gate.json").read_text())
    assert {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}[gate["verdict"]] == done.returncode
    assert gate["teacher_gain"]["point"] > 0
    assert {v["recipe"] for v in gate["variants"]} >= {"plain", "int8"}
    assert {"other", "near", "far"} <= {path.stem for path in (run / "data").glob("*.jsonl")}
    student = run / "students" / "S1" / "s0"
    assert json.loads((student / "config.json").read_text())["model_type"] == "qwen3"
    assert (
        json.loads((student / "manifest.json").read_text())["facts"]["method"]["title"] == "Continuous cache"
    )
    assert "<html" in (run / "report.html").read_text()
    module = subprocess.run(
        [sys.executable, "-c", "import eval; print(eval.__file__)"],
        cwd="/", capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert str(tree) not in module.stdout, "the environment's own install stays where it was"
