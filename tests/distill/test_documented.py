"""Every training command of docs/distillation.md, as printed but for the size of its models and data."""

import shlex

import pytest

from distill.pipeline import jobs_until, prepare_inputs
from distill.trainer.loop import accelerator
from eval.core.artifacts import verify_artifact
from eval.core.config import apply_overrides, find_config, read_yaml, validate_config
from eval.core.errors import UserError
from eval.core.jobs import run_in_turn
from eval.core.study import Study, make_run_folder
from tests.helpers import ROOT, SHAPE, write_corpus

ENTRY = "accelerate launch distill/train.py "
TEXT = (ROOT / "docs" / "distillation.md").read_text().replace("\\\n", " ")
COMMANDS = [line.split("  #")[0] for line in TEXT.splitlines() if line.startswith(ENTRY)]
NEEDS_CUDA = ("qlora", "quantization")
SLOW = [pytest.param(command, marks=pytest.mark.slow) for command in COMMANDS[1:]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The study of the commands, in miniature: bases and teachers are made once for all of them."""
    folder = tmp_path_factory.mktemp("documented")
    corpus = write_corpus(folder / "corpus.jsonl", documents=24)
    raw = read_yaml(find_config("studies", "small"))
    raw |= {"runs": str(folder), "seeds": [0], "trackers": []}
    source = {"kind": "dataset", "path": "json", "data_files": str(corpus), "domain_column": "domain"}
    raw["data"] |= {"documents": [source], "shifted": {}, "validation": 2, "test": 2, "scored_bytes": 64}
    raw["data"] |= {"context": 48, "train_rows": 8}
    raw["base"] |= {
        "vocab_size": 320,
        "architecture": {"model_type": "llama", **SHAPE, "num_hidden_layers": 4},
    }
    return raw


def test_the_documents_show_the_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("command", [COMMANDS[0], *SLOW])
def test_the_command_runs(small, command):
    words = shlex.split(command.removeprefix(ENTRY))
    assert words[:2] == ["--config", "configs/studies/small.yaml"]
    stage = words[3] if words[2:3] == ["--until"] else "students"
    words = words[4:] if stage != "students" else words[2:]
    raw = read_yaml(ROOT / "configs" / "studies" / "small.yaml")
    apply_overrides(raw, words)
    for top in ("runs", "seeds", "trackers"):
        raw[top] = small[top]
    raw["data"] |= {k: v for k, v in small["data"].items() if k != "packing"}
    raw["base"] |= {"vocab_size": 320, "architecture": small["base"]["architecture"]}
    for section in (raw["base"]["train"], raw["train"], raw.get("ce_train") or {}):
        section.update(steps=1, rows=2)
    raw.setdefault("targets", {})["generation"] = {"prompt_tokens": 4, "new_tokens": 4}
    raw["name"] = "small"
    study = validate_config(Study, raw, command)
    make_run_folder(study)
    if any(word in command for word in NEEDS_CUDA):
        with pytest.raises(UserError, match="CUDA"):
            study = prepare_inputs(study, accelerator())
        return
    study = prepare_inputs(study, accelerator())
    run_in_turn("train", jobs_until(study, stage), quiet=True)
    verify_artifact(study.folder / ("students/S1/s0" if stage == "students" else "targets/T1/s0"))
