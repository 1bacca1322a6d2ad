"""What the whole pipeline refuses: a study with a mistake, and to pass a method that does nothing."""

import json

import pytest
import yaml

from eval.core.config import read_yaml
from tests.helpers import ROOT
from tests.test_pipeline import pipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": ["int9"]}, "'int9'"),
        ({"budget": "generous"}, "configs/budgets: 'generous'"),
        ({"budget": "default"}, "budget 'default': slice without any scored document: 'near'"),
        ({"trian": {}}, "did you mean 'train'"),
    ],
)
def test_a_bad_study_ends_the_pipeline_before_anything_is_trained(tmp_path, change, message):
    raw = read_yaml(ROOT / "configs" / "studies" / "tiny.yaml")
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({**raw, "runs": str(tmp_path / "runs"), **change}))
    done = pipeline(study)
    assert done.returncode == 3
    assert [message in line for line in done.stderr.splitlines()] == [True], done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_placebo_never_passes(tmp_path):
    raw = read_yaml(ROOT / "configs" / "studies" / "placebo.yaml")
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({**raw, "runs": str(tmp_path / "runs"), "recipes": []}))
    done = pipeline(study)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    gate = json.loads((tmp_path / "runs" / "placebo" / "gate.json").read_text())
    assert gate["verdict"] != "PASS"
    assert all(v["verdict"] != "PASS" for v in gate["variants"])
