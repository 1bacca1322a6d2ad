"""Weights of sources, and a transfer corpus of its own: what is trained on, in which shares."""

import json

import numpy as np
import pytest
from pydantic import ValidationError

from distill.data.mixture import mix_rows
from distill.data.rows import rows_taken, training_rows
from distill.data.split import prepare
from distill.train import distil
from eval.core.artifacts import read_manifest
from eval.core.documents import TEST, TRAIN, TRANSFER, VALIDATION, read_documents
from eval.core.errors import UserError
from eval.core.sections import Data
from eval.core.study import load_study
from tests.helpers import text, tiny_study, tiny_tokenizer


def source(path, rows, **more):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "dataset", "path": "json", "data_files": str(path), **more}


def texts(domain, number, words=40, start=0):
    return [{"text": text(domain, i, words)} for i in range(start, start + number)]


def test_any_beginning_of_a_mixture_has_the_shares_and_no_row_comes_twice():
    rng = np.random.default_rng(7)
    sources = rng.integers(0, 3, 30_000)
    tokens = np.where(sources == 0, 250, rng.integers(20, 60, 30_000))  # rows of one are longer
    order, weights = rng.permutation(30_000), [3.0, 1.0, 6.0]
    mixed = mix_rows(order, sources, tokens, weights, seed=1)
    assert len(np.unique(mixed)) == len(mixed) < len(order)
    for i in range(3):
        own = order[sources[order] == i]
        part = mixed[sources[mixed] == i]
        assert (part == own[: len(part)]).all(), "within a source the order stays"
    for stop in (640, 5000, len(mixed)):
        found = np.bincount(sources[mixed[:stop]], tokens[mixed[:stop]])
        assert found / found.sum() == pytest.approx(np.array(weights) / 10, abs=0.012)
    assert (sources[mixed] == 2).sum() == (sources == 2).sum(), "it ends with the source that runs out"
    assert (mixed == mix_rows(order, sources, tokens, weights, seed=1)).all()
    assert (mixed[:64] != mix_rows(order, sources, tokens, weights, seed=2)[:64]).any()
    with pytest.raises(UserError, match="source 1: a weight of 2, but no training rows"):
        mix_rows(order, np.zeros_like(sources), tokens, [1.0, 2.0], seed=0)


@pytest.mark.parametrize("packing", [False, True])
def test_sources_give_their_weight_in_training_tokens(tmp_path, packing):
    documents = [
        source(tmp_path / "prose.jsonl", texts("prose", 200), domain="prose", weight=0.2),
        source(tmp_path / "code.jsonl", texts("code", 200), domain="code", weight=0.8),
    ]
    data = {"documents": documents, "shifted": {}, "train_rows": "all", "packing": packing}
    study = load_study(tiny_study(tmp_path), **{f"data__{key}": value for key, value in data.items()})
    prepare(study)
    words = tiny_tokenizer()
    taken = rows_taken(study, words)
    shares = np.array(taken["tokens_by_source"]) / taken["tokens"]
    assert shares == pytest.approx([0.2, 0.8], abs=0.03)
    assert sum(taken["tokens_by_source"]) == taken["tokens"]
    rows = training_rows(study, words)
    by_domain = {name: sum(row.predicted for row in rows if row.domain == name) for name in ("prose", "code")}
    assert [*by_domain.values()] == taken["tokens_by_source"]
    more = load_study(study.folder.parents[1] / "study.yaml", data__documents=documents, data__shifted={},
                      data__train_rows=10_000, data__packing=packing)  # fmt: skip
    with pytest.raises(UserError, match=r"data\.train_rows: 10000, but the mixture by data weights has \d+"):
        training_rows(more, words)


def test_weights_are_for_all_sources_or_none_and_not_for_what_is_scored():
    one = {"kind": "dataset", "path": "json", "weight": 1}
    with pytest.raises(ValidationError, match="give every source of `documents` a `weight`, or none"):
        Data(documents=[one, {**one, "weight": None}])
    with pytest.raises(ValidationError, match="is only scored: it has no `weight`"):
        Data(documents=[one], shifted={"far": [one]})


def transfer_study(folder, **more):
    """Pairs to be split, and plain text of which some is that of the scored pairs."""
    groups = [{"text": row["text"], "who": f"g{i // 2}"} for i, row in enumerate(texts("prose", 40))]
    plain = texts("code", 60, start=100) + groups[:10]
    documents = [source(folder / "pairs.jsonl", groups, group_column="who")]
    return load_study(
        tiny_study(folder),
        data__documents=documents,
        data__transfer=[source(folder / "plain.jsonl", [{"who": "none", **row} for row in plain],
                               group_column="who")],
        **more,
    )  # fmt: skip


def test_a_transfer_corpus_holds_nothing_that_is_scored(tmp_path):
    study = transfer_study(tmp_path, data__validation=8, data__test=8)
    facts = prepare(study).facts
    found = {d.text: d for d in read_documents(study.folder / "data", TRANSFER)}
    scored = [d for name in (VALIDATION, TEST) for d in read_documents(study.folder / "data", name)]
    assert not {d.group for d in found.values()} & {d.group for d in scored}
    trained = {d.text for d in read_documents(study.folder / "data", TRAIN)}
    kept = {text("prose", i, 40) for i in range(10)} & set(found)
    assert kept <= trained, "what is trained on may be in both"
    assert facts["transfer_documents"] == 60 + len(kept)
    assert sum(facts["left_out"]["transfer"].values()) == 10 - len(kept)
    assert 0 < len(kept) < 10


@pytest.mark.slow
def test_students_learn_from_teachers_on_the_transfer_corpus_and_the_rest_on_documents(tmp_path, capsys):
    study = transfer_study(tmp_path, seeds=[0], data__train_rows=16)
    folder = distil(study)
    assert "transfer rows: 16 of" in capsys.readouterr().err
    words = tiny_tokenizer()
    facts = {arm: read_manifest(folder / "students" / arm / "s0").facts for arm in ("S1", "S0", "CE")}
    base = read_manifest(folder / "base/s0").facts["training_rows"]
    assert facts["S1"]["training_rows"] == facts["S0"]["training_rows"] != base
    assert facts["CE"]["training_rows"] == base
    targets = read_manifest(folder / "targets/T1/s0").facts
    assert targets["tokens"] == facts["S1"]["training_rows"]["tokens"]
    assert {row.domain for row in training_rows(study, words, TRANSFER)}
