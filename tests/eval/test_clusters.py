"""Documents that are not independent: their clusters, in the records, in every test and in the power."""

import json

import numpy as np
import pytest

from eval.core.budget import load_budget
from eval.core.documents import Document, cluster_names
from eval.core.errors import UserError
from eval.core.sections import Data
from eval.gate.decision import judge
from eval.gate.evidence import collect_evidence
from eval.gate.quality import GAIN
from eval.stats.crossed import linearise
from tests.eval.run_builder import Run, edit
from tests.helpers import run as command


def evidence_of(run: Run):
    return collect_evidence(run.path, run.study, load_budget(run.study))


@pytest.fixture(scope="module")
def clustered(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("clustered"), clusters=7).make()


DOCUMENTS = [
    Document("1", "email", "a", group="ada", source=0),
    Document("2", "email", "b", group="2", source=0),
    Document("3", "top", "c", group="ada", source=1),
    Document("4", "top", "d", group="4", source=1),
]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("none", ["1", "2", "3", "4"]),
        ("group", ["ada", "2", "ada", "4"]),
        ("domain", ["email", "email", "3", "4"]),  # files in no folder have none in common
        ("source", ["0", "0", "1", "1"]),
    ],
)
def test_documents_have_the_cluster_that_the_study_asks_for(kind, names):
    assert cluster_names(DOCUMENTS, kind) == names


def test_a_slice_of_one_domain_is_of_documents():
    assert cluster_names(DOCUMENTS[:2], "domain") == ["1", "2"]


def test_the_default_is_the_group_where_there_is_one_else_the_domain():
    plain, grouped = {"kind": "folder", "path": "stdlib"}, {"kind": "dataset", "path": "json"}
    grouped = {**grouped, "data_files": "x.jsonl", "group_column": "who"}
    data = Data.model_validate({"documents": [plain], "shifted": {"far": [plain, grouped]}})
    assert [data.cluster_of(name) for name in ("validation", "test", "far", "typos-0.1")] == [
        *("domain", "domain", "group", "domain")
    ]
    asked = data.model_copy(update={"cluster": "source"})
    assert {asked.cluster_of(name) for name in ("validation", "far")} == {"source"}


def test_a_cluster_counts_as_its_documents_in_one(clustered: Run):
    """Reference: the documents of a cluster joined to one by hand."""
    record = json.loads((clustered.path / "records/score/plain/T1-s0.json").read_text())["documents"]
    evidence = evidence_of(clustered)
    for name in ("validation", "far"):
        at = [i for i, one in enumerate(record["slice"]) if one == name]
        names = list(dict.fromkeys(record["cluster"][i] for i in at))
        members = [[i for i in at if record["cluster"][i] == cluster] for cluster in names]
        saved = evidence.bits["T0", "plain"] - evidence.bits["T1", "plain"]
        bits = np.array([[row[group].sum() for group in members] for row in saved])
        size = [sum(record["bytes"][i] for i in group) for group in members]
        np.testing.assert_allclose(evidence.gain(name, GAIN), linearise(bits, size))
        assert evidence.gain(name, GAIN).mean() == pytest.approx(saved[:, at].sum() / (4 * sum(size)))


def test_without_clusters_each_document_is_one(tmp_path):
    evidence = evidence_of(Run(tmp_path).make())
    saved = evidence.bits["T0", "plain"] - evidence.bits["T1", "plain"]
    for name, columns in evidence.columns.items():
        plain = linearise(saved[:, columns], evidence.bytes[columns])
        np.testing.assert_allclose(evidence.gain(name, GAIN), plain, rtol=1e-12)


def test_the_gate_and_the_power_count_clusters(clustered: Run, tmp_path):
    gate = judge(clustered.path)
    assert (gate.documents, gate.clusters) == ({"validation": 40, "far": 30}, {"validation": 7, "far": 7})
    assert gate.power.clusters == 7
    note = "the 40 documents of validation lie in 7 clusters: what fewer than 10 say of others is unsure"
    assert any(one.startswith(note) for one in gate.notes)
    plan = tmp_path / "plan.yaml"
    plan.write_text((clustered.path / "study.yaml").read_text().replace("validation: 64", "validation: 400"))
    words = ("--study", clustered.path, "--plan", plan, "--json", tmp_path / "power.json")
    assert command("-m", "eval.gate.power", *map(str, words)).returncode == 0
    rows = {row["test"]: row for row in json.loads((tmp_path / "power.json").read_text())["tests"]}
    assert rows["assay on validation"]["clusters"] == 70, "as many documents to a cluster as in the pilot"
    assert rows["assay on far"]["clusters"] == 7


def test_records_that_do_not_agree_on_clusters_are_refused(tmp_path):
    run = Run(tmp_path, clusters=7).make()
    path = run.path / "records/score/int8/S0-s2.json"
    edit(path, lambda r: r["documents"]["cluster"].__setitem__(3, "c0"))
    with pytest.raises(
        UserError, match=r"S0-s2.json: document 'd3' of slice 'validation' is of cluster 'c0'"
    ):
        evidence_of(run)
    edit(path, lambda r: r["documents"].update(cluster=None))
    with pytest.raises(UserError, match="'d0' of slice 'validation' is of cluster 'd0', elsewhere of 'c0'"):
        evidence_of(run)
