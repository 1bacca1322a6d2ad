"""Flips and divergence: identities, a definition in float64, the noise beside them, and the command line."""

import json
import math
import shutil

import pytest
import torch

from eval.core.documents import Document, Row, collate, read_documents
from eval.core.errors import UserError
from eval.core.records import VALIDATION, Agreement, Rerun, provenance, read_agreements, write_record
from eval.core.study import load_study
from eval.engines import load_engine
from eval.score.agreement import estimate_agreements
from eval.score.agreement_records import estimate_agreement, uncompared_variants
from eval.score.divergence import (
    document_divergences,
    flips_and_kl,
    kl_divergence,
    measure_noise,
    predict_in_other_batches,
    predict_with_other_threads,
    record_agreement,
)
from tests.eval.run_builder import CONTEXT, facts, fake_run, put, torch_model
from tests.helpers import run, text, tiny_model

DOCUMENTS = [Document(f"d{i}", "code", text("code", i, words=5 + 23 * i)) for i in range(4)]


@pytest.fixture(scope="module")
def engine(checkpoint):
    return load_engine("torch", checkpoint)


def logits_of(model):
    return lambda batch: model(**batch.inputs).logits


def exact_divergence(one, other):
    """KL in bits of one pair of logits [V]: the definition, in float64."""
    p, q = one.double().log_softmax(-1).tolist(), other.double().log_softmax(-1).tolist()
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)) / math.log(2)


@torch.no_grad()
def test_flips_and_divergence_are_those_of_the_definition(engine):
    other = logits_of(tiny_model(seed=2, tie_word_embeddings=False))
    columns = document_divergences(engine.logits, other, engine, DOCUMENTS, CONTEXT)
    words = engine.tokenizer
    for i, document in enumerate(DOCUMENTS):
        tokens = words(document.text, add_special_tokens=False)["input_ids"]
        flips, bits = 0, 0.0
        for start in range(0, len(tokens), CONTEXT - 1):
            window = tokens[start : start + CONTEXT - 1]
            batch = collate([Row("x", "code", 0, [0, *window])], pad=0)
            p, q = engine.logits(batch)[0, :-1], other(batch)[0, :-1]
            flips += sum(a.argmax() != b.argmax() for a, b in zip(p, q, strict=True)).item()
            bits += sum(exact_divergence(a, b) for a, b in zip(p, q, strict=True))
        assert (columns.tokens[i], columns.flips[i]) == (len(tokens), flips)
        assert columns.kl_bits[i] == pytest.approx(bits, rel=1e-5)
    assert sum(columns.flips) > 0


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 30.0])
def test_divergence_keeps_its_digits_from_noise_to_certainty(scale):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(20, 300, generator=generator) * 3
    q = p + scale * torch.randn(20, 300, generator=generator)
    kl = kl_divergence(p.log_softmax(-1), q.log_softmax(-1)) / math.log(2)
    assert (kl >= 0).all()
    wanted = [exact_divergence(a, b) for a, b in zip(p, q, strict=True)]
    assert kl.tolist() == pytest.approx(wanted, rel=2e-2 if scale < 1e-4 else 1e-4)


def test_a_token_that_cannot_come_counts_nothing_and_one_that_must_is_refused(engine):
    never = torch.tensor([[0.0, 1.0, -math.inf]]).log_softmax(-1)
    plain = torch.tensor([[0.0, 1.0, 2.0]]).log_softmax(-1)
    p, q = never.double()[0, :2], plain.double()[0, :2]
    assert kl_divergence(never, plain).item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-6)
    assert kl_divergence(never, never).item() == 0
    assert kl_divergence(plain, never).item() == math.inf

    def silent(batch):
        return engine.logits(batch).index_fill(2, torch.tensor([40]), -math.inf)

    with pytest.raises(UserError, match="document 'd0': inf bits"):
        document_divergences(engine.logits, silent, engine, DOCUMENTS, CONTEXT)


def test_the_same_model_agrees_with_itself_and_what_lies_under_padding_does_not_count(engine):
    same = document_divergences(engine.logits, engine.logits, engine, DOCUMENTS, CONTEXT)
    assert same.flips == [0] * 4
    assert same.kl_bits == [0.0] * 4
    rows = [Row("a", "code", 0, [0, 5, 6, 7]), Row("b", "code", 0, [0, 9])]
    batch = collate(rows, pad=0)
    one, spoiled = engine.logits(batch), engine.logits(batch).clone()
    spoiled[1, 1:] = math.nan
    spoiled[0, -1] = math.nan
    assert flips_and_kl(one, spoiled, batch).tolist() == [[0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_reruns_are_the_same_model_in_another_batch_and_with_other_threads(name, checkpoint, openvino_folder):
    folder = {"torch": checkpoint, "openvino": openvino_folder}[name]
    engine, threads = load_engine(name, folder), torch.get_num_threads()
    reruns = measure_noise(engine, name, DOCUMENTS, CONTEXT)
    assert torch.get_num_threads() == threads
    assert set(reruns) == {"batch", "threads"}
    for rerun in reruns.values():
        assert rerun.tokens == sum(
            document_divergences(engine.logits, engine.logits, engine, DOCUMENTS, CONTEXT).tokens
        )
        assert rerun.kl_bits / rerun.tokens < 1e-6
    batch = collate([Row("a", "code", 0, [0, 5, 6, 7]), Row("b", "code", 0, [0, 9])], pad=0)
    for other in (predict_in_other_batches(engine), predict_with_other_threads(name, folder)):
        torch.testing.assert_close(other(batch)[0], engine.logits(batch)[0], atol=1e-5, rtol=1e-4)


def record(seed, flips, tokens=(100, 300), floor=0.0, **changes):
    fields = {"arm": "S1", "recipe": "int8", "engine": "torch", "data": "d" * 64, "student": "s" * 64}
    columns = {"id": ["a", "b"], "tokens": list(tokens), "flips": flips, "kl_bits": [0.5 * f for f in flips]}
    reruns = {
        "batch": Rerun(tokens=1000, flips=1, kl_bits=floor),
        "threads": Rerun(tokens=1000, flips=0, kl_bits=0),
    }
    return Agreement(
        **{
            **fields,
            **columns,
            "seed": seed,
            "reruns": reruns,
            "provenance": provenance("a" * 64, "c" * 64),
            **changes,
        }
    )


APART = {"a": "a", "b": "b"}


def test_documents_of_one_cluster_are_one():
    """Their bounds are those of records in which each cluster is one document."""
    tokens, by_seed = [100, 150, 300, 250], ([3, 4, 5, 9], [1, 2, 9, 8])
    names = {"id": ["a", "b", "c", "d"]}
    apart = [record(i, flips, tokens, **names) for i, flips in enumerate(by_seed)]
    whole = [record(i, [a + b, c + d], (250, 550)) for i, (a, b, c, d) in enumerate(by_seed)]
    clusters = {"a": "x", "b": "x", "c": "y", "d": "y"}
    for one, other in zip(
        estimate_agreement(apart, [0, 1], clusters), estimate_agreement(whole, [0, 1], APART), strict=True
    ):
        assert one.model_dump() == pytest.approx(other.model_dump())
    alone = estimate_agreement(apart, [0, 1], {name: name for name in clusters})[0]
    assert alone.low != pytest.approx(estimate_agreement(apart, [0, 1], clusters)[0].low)


def test_shares_are_ratios_of_sums_with_seeds_and_documents_crossed():
    flips, kl = estimate_agreement([record(0, [3, 5]), record(1, [1, 9], floor=2.0)], [0, 1], APART)
    assert flips.value == pytest.approx((3 + 5 + 1 + 9) / 800)
    assert flips.low < flips.value < flips.high
    assert flips.floor == 1 / 1000
    assert (kl.value, kl.floor) == (pytest.approx(9 / 800), 2 / 1000)
    assert estimate_agreement([record(0, [3, 5])], [0, 1], APART) == (None, None), (
        "one seed of two was not compared"
    )
    one, _ = estimate_agreement([record(0, [3, 5])], [0], APART)
    assert (one.value, one.low, one.high) == (pytest.approx(8 / 400), None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_bits": [1.0, math.nan]}, "expected a finite number"),
        ({"tokens": [100]}, "different lengths"),
        ({"id": []}, "id"),
    ],
)
def test_a_record_that_cannot_be_true_is_refused(tmp_path, changes, message):
    path = write_record(tmp_path, record(0, [3, 5]))
    assert read_agreements(tmp_path) == [record(0, [3, 5])] or read_agreements(tmp_path)[0].flips == [3, 5]
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, **changes}))
    with pytest.raises(UserError, match=message):
        read_agreements(tmp_path)


@pytest.mark.slow
def test_the_command_compares_once_and_again_only_what_changed(tmp_path, openvino_folder):
    study, folder = fake_run(tmp_path)
    put(folder, "students/S1/s0", torch_model(seed=7), **facts("S1"))
    put(
        folder,
        "variants/int8/S1/s0",
        lambda to: shutil.copytree(openvino_folder, to, dirs_exist_ok=True),
        **facts("S1", "int8", "openvino"),
    )
    put(folder, "variants/int8/S0/s0", torch_model(seed=5), **facts("S0", "int8"))
    (folder / "gate.json").write_text("{}")  # of a verdict from before
    done = run("-m", "eval.score.agreement", "--study", study, "--documents", 2)
    assert done.returncode == 0, done.stderr
    documents = read_documents(folder / "data", VALIDATION)
    assert len(documents) == 6
    assert read_agreements(folder)[0].id == [documents[0].id, documents[3].id], "at equal distances"
    done = run("-m", "eval.score.agreement", "--study", study)
    assert done.returncode == 0, done.stderr
    assert f"gate.json is older than these: run absorb gate --study {folder} again" in done.stdout
    assert "compared 1 variants, 0 were compared before" in done.stdout
    (agreement,) = read_agreements(folder)
    assert (agreement.arm, agreement.recipe, agreement.engine) == ("S1", "int8", "openvino")
    assert len(agreement.id) == 6
    assert sum(agreement.kl_bits) / sum(agreement.tokens) < 1e-6, "the same weights on another engine"
    loaded = load_study(study)
    assert uncompared_variants(folder, loaded, 6) == []
    put(folder, "students/S1/s0", torch_model(seed=8), **facts("S1"))
    assert uncompared_variants(folder, loaded, 2) == [folder / "variants/int8/S1/s0"]
    again = record_agreement(folder, loaded, folder / "variants/int8/S1/s0", documents)
    assert sum(again.kl_bits) / sum(again.tokens) > 0.001
    assert set(estimate_agreements(loaded)) == {"int8"}
    gone = {"data": "0" * 64, "id": [f"gone{i}" for i in range(6)]}
    write_record(folder, again.model_copy(update=gone))
    assert estimate_agreements(loaded) == {}, "of documents that the run no longer has"
    put(folder, "students/S1/s0", torch_model(seed=8, vocab_size=400), **facts("S1"))
    with pytest.raises(UserError, match="320 rows of output, its student has 400"):
        record_agreement(folder, loaded, folder / "variants/int8/S1/s0", documents)
