"""Bits per byte: against a loop in float64, against identities, and through the command line."""

import json
import math
import pickle
import shutil
import socket
from pathlib import Path

import evaluate
import pytest
import torch

from eval.core.artifacts import read_manifest
from eval.core.documents import Document, boundary_id, read_documents
from eval.core.errors import UserError
from eval.core.records import read_scores
from eval.core.study import load_study
from eval.engines.torch import load_checkpoint
from eval.metrics import likelihood
from eval.metrics.likelihood import document_bits, likelihoods
from eval.score.scoring import score_documents, score_folder, unscored_folders
from tests.eval.run_builder import CONTEXT, facts, fake_run, put, put_data, tokenizer, torch_model
from tests.helpers import ROOT, run, text, tiny_model

DOCUMENTS = [Document(f"d{i}", "code", text("code", i, words=5 + 23 * i)) for i in range(5)]
DOCUMENTS.append(Document("tiny", "code", "é"))


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1)


def logits_of(model):
    return lambda batch: model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def reference(model, words, document, context):
    """Bits of a document: one window at a time, no padding, float64 throughout, written from the definition."""
    tokens = words(document.text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(tokens), context - 1):
        window = tokens[start : start + context - 1]
        ids = torch.tensor([[boundary_id(words), *window]])
        logits = model(input_ids=ids).logits[0].tolist()
        for position, token in enumerate(window):
            largest = max(logits[position])
            log_sum = largest + math.log(math.fsum(math.exp(x - largest) for x in logits[position]))
            total += (log_sum - logits[position][token]) / math.log(2)
    return total, len(tokens)


@torch.no_grad()
def test_bits_are_those_of_a_loop_in_float64(model, words):
    bits, tokens = document_bits(logits_of(model), DOCUMENTS, words, CONTEXT)
    exact = tiny_model(seed=1).double()
    for document, result, count in zip(DOCUMENTS, bits, tokens, strict=True):
        wanted, wanted_count = reference(exact, words, document, CONTEXT)
        assert count == wanted_count
        assert result == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", [1, CONTEXT, 100, 100_000])
def test_bits_do_not_depend_on_the_batch_or_the_order(model, words, size):
    wanted, counts = document_bits(logits_of(model), DOCUMENTS, words, CONTEXT, 4096)
    bits, tokens = document_bits(logits_of(model), DOCUMENTS[::-1], words, CONTEXT, size)
    assert bits[::-1] == pytest.approx(wanted, rel=1e-6)
    assert tokens[::-1] == counts
    again, _ = document_bits(logits_of(model), DOCUMENTS[::-1], words, CONTEXT, size)
    assert again == bits, "the same call gives the same bits"


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_a_softmax_in_pieces_says_the_same(model, words, monkeypatch, rows):
    """Pieces end within rows, at their ends, and where nothing is predicted."""
    documents = [*DOCUMENTS, Document("asked", "code", "no. ", prompt=text("code", 9, words=20))]
    wanted = likelihoods(logits_of(model), documents, words, CONTEXT)
    monkeypatch.setattr(likelihood, "PIECE", rows * model.config.vocab_size)
    result = likelihoods(logits_of(model), documents, words, CONTEXT)
    assert result.bits == pytest.approx(wanted.bits, rel=1e-6)
    assert (result.tokens, result.correct) == (wanted.tokens, wanted.correct)
    assert result.bins.tokens == wanted.bins.tokens


def test_log_probabilities_are_taken_as_they_are(model, words):
    predict = logits_of(model)
    plain, _ = document_bits(predict, DOCUMENTS, words, CONTEXT)
    normal, _ = document_bits(lambda b: predict(b).log_softmax(-1), DOCUMENTS, words, CONTEXT)
    moved, _ = document_bits(lambda b: predict(b) + 3.0, DOCUMENTS, words, CONTEXT)
    assert normal == pytest.approx(plain, rel=1e-6)
    assert moved == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("vocabulary", [300, 512])
def test_a_uniform_model_needs_log2_of_its_vocabulary_per_token(words, vocabulary):
    def predict(batch):
        return torch.full((*batch.input_ids.shape, vocabulary), -2.5, dtype=torch.bfloat16)

    bits, tokens = document_bits(predict, DOCUMENTS, words, CONTEXT)
    assert bits == pytest.approx([n * math.log2(vocabulary) for n in tokens], rel=1e-6)


def test_a_certain_model_needs_no_bits_and_a_wrong_one_is_named(words):
    def certain(batch):
        scores = torch.full((*batch.input_ids.shape, 320), -math.inf)
        scores[:, :-1].scatter_(2, batch.labels[..., None], 0.0)
        scores[:, -1, 0] = 0.0  # predicts nothing that is counted
        return scores

    bits, _ = document_bits(certain, DOCUMENTS, words, CONTEXT)
    assert bits == [0.0] * len(DOCUMENTS)
    one = DOCUMENTS[:1]
    with pytest.raises(UserError, match="document 'd0': inf bits"):
        document_bits(lambda b: certain(b).roll(1, dims=2), one, words, CONTEXT)


def test_what_is_predicted_under_the_padding_does_not_matter(model, words):
    def predict(batch):
        scores = logits_of(model)(batch).clone()
        scores[:, :-1][~batch.mask] = math.nan
        return scores

    wanted, _ = document_bits(logits_of(model), DOCUMENTS, words, CONTEXT)
    assert document_bits(predict, DOCUMENTS, words, CONTEXT)[0] == wanted


def test_the_metric_loads_offline_through_evaluate(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("the network was called")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metric = evaluate.load(str(ROOT / "eval" / "metrics" / "bits_per_byte.py"), cache_dir=str(tmp_path))
    assert metric.compute(predictions=[10.0, 30.0], references=[10, 10]) == {"bits_per_byte": 2.0}
    with pytest.raises(ValueError, match="references: 0 bytes"):
        metric.compute(predictions=[1.0], references=[0])


# through the run folder


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_reported_and_nothing_is_written(tmp_path):
    study, folder = fake_run(tmp_path)
    flip_a_bit(folder / "students/S1/s0")
    with pytest.raises(UserError, match=r"model.safetensors has sha256 .* recorded .*delete the folder"):
        score_folder(folder, load_study(study), folder / "students/S1/s0")
    assert not (folder / "records").exists()


def with_nan(folder: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def with_another_tokenizer(folder: Path) -> None:
    tiny_model(vocab_size=280).save_pretrained(folder)
    tokenizer(300).save_pretrained(folder)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (
            with_nan,
            "scoring .*students/S1/s0: document 'code-.': nan bits; bits must be finite: the model's output is not",
        ),
        (with_another_tokenizer, "tokenizer of .*: ids up to 299, the model has 280 rows"),
        (lambda folder: tiny_model().save_pretrained(folder), "no tokenizer.json"),
    ],
)
def test_a_bad_model_is_refused_and_nothing_is_written(tmp_path, fill, message):
    study, folder = fake_run(tmp_path)
    put(folder, "students/S1/s0", fill, **facts("S1"))
    with pytest.raises(UserError, match=message):
        score_folder(folder, load_study(study), folder / "students/S1/s0")
    assert not (folder / "records").exists()


def test_a_worker_s_error_reaches_its_parent_whole():
    error = pickle.loads(pickle.dumps(UserError("model x", "nan", "look at it")))
    assert str(error) == "model x: nan; look at it"
    assert (error.thing, error.problem, error.fix) == ("model x", "nan", "look at it")


def test_empty_documents_and_slices_are_refused(tmp_path, model, words):
    put_data(tmp_path, nothing="")
    with pytest.raises(UserError, match="document 'nothing': no tokens"):
        score_documents(logits_of(model), tmp_path / "data", words, CONTEXT)
    (tmp_path / "data/validation.jsonl").write_text("")
    with pytest.raises(UserError, match="slice 'validation': no documents"):
        score_documents(logits_of(model), tmp_path / "data", words, CONTEXT)


def test_a_manifest_without_its_facts_is_refused(tmp_path):
    study, folder = fake_run(tmp_path)
    put(folder, "students/S1/s0", torch_model(), arm="S1", seed=0)
    with pytest.raises(UserError, match="artifact students/S1/s0: no fact 'recipe'"):
        unscored_folders(folder, load_study(study))


def test_the_command_scores_once_and_again_only_what_changed(tmp_path, openvino_folder):
    study, folder = fake_run(tmp_path)
    variant = put(
        folder,
        "variants/int8/S1/s0",
        lambda to: shutil.copytree(openvino_folder, to, dirs_exist_ok=True),
        **facts("S1", "int8", "openvino"),
    )
    done = run("-m", "eval.score", "--study", study)
    assert done.returncode == 0, done.stderr
    assert "scored 4 models, 0 were scored before" in done.stdout
    assert "4 of 4" in done.stderr
    records = {(r.recipe, r.arm): r for r in read_scores(folder)}
    assert set(records) == {("plain", "B"), ("plain", "S1"), ("plain", "S0"), ("int8", "S1")}
    check_record(records["plain", "S1"], folder)
    assert records["int8", "S1"].engine == "openvino"
    assert records["int8", "S1"].provenance.artifact == variant.hash

    files = {p: p.read_bytes() for p in folder.rglob("*.json")}
    again = run("-m", "eval.score", "--study", study)
    assert again.returncode == 0
    lines = again.stdout.splitlines()
    assert lines[0] == "scored 0 models, 4 were scored before"
    missing = f"students/CE/s0; run absorb train --config {folder}"
    assert lines[1] == f"not there yet: {missing}"
    assert lines[2].endswith(f"; run absorb compress --study {folder}")
    assert {p: p.read_bytes() for p in folder.rglob("*.json")} == files

    loaded = load_study(study)
    for name, arm, recipe, seed in (
        ("base/s7", "B", "plain", 7),
        ("students/S1/s7", "S1", "plain", 7),
        ("variants/old/S1/s0", "S1", "old", 0),
    ):
        put(folder, name, torch_model(), **facts(arm, recipe, seed=seed))  # left by earlier settings
    assert unscored_folders(folder, loaded) == []
    put(folder, "students/S0/s0", torch_model(seed=9), **facts("S0"))
    assert unscored_folders(folder, loaded) == [folder / "students/S0/s0"]
    assert len(unscored_folders(folder, load_study(study, ["--train.epochs", "3"]))) == 4


def check_record(record, folder):
    """The record of S1 holds the reference's bits for every document of both slices."""
    model, words = load_checkpoint(folder / "students/S1/s0")
    columns = record.documents
    assert columns.slice == ["validation"] * 6 + ["far"] * 3
    documents = [d for name in ("validation", "far") for d in read_documents(folder / "data", name)]
    assert columns.id == [d.id for d in documents]
    assert columns.bytes == [d.bytes for d in documents]
    with torch.no_grad():
        for i in (0, 8):
            wanted, count = reference(model.double(), words, documents[i], CONTEXT)
            assert columns.bits[i] == pytest.approx(wanted, rel=1e-5)
            assert columns.tokens[i] == count
    assert record.data == read_manifest(folder / "data").hash
    assert record.provenance.artifact == read_manifest(folder / "students/S1/s0").hash


def test_the_command_ends_in_one_line_where_there_is_nothing_to_score(tmp_path):
    study, folder = fake_run(tmp_path)
    shutil.rmtree(folder / "data")
    done = run("-m", "eval.score", "--study", study)
    assert done.returncode == 3
    assert (
        done.stderr
        == f"error: artifact {folder}/data: no manifest.json; make it first, or name another folder\n"
    )
    assert json.loads((folder / "base/s0/manifest.json").read_text())["facts"]["arm"] == "B"
