"""Texts with labels: rows, losses and scores against transformers and numpy; a whole study; what is refused."""

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from compress.build import TrainedStudent, Variant
from compress.calibration import mean_loss
from compress.passes.drop_layers import choose_layers
from compress.pipeline import unfit_recipes
from compress.recipe import load_recipe
from distill.losses.teacher_output import Dense
from distill.method import MethodContext, make_method, plain_output
from distill.models.layers import keep_layers
from distill.models.lm_head import capture_input, check_head, output_embedding
from distill.trainer.module import DistillationModule
from eval.core.documents import Document, batches, collate, read_documents, windows
from eval.core.errors import UserError
from eval.core.records import read_scores
from eval.core.sections import Loss, MethodChoice, Train
from eval.core.study import load_study
from eval.engines.torch import CLASSIFIER, TorchEngine, load_encoder, logits_of
from eval.metrics.classes import ClassPredictions, brier_scores
from eval.metrics.functions import f1_parts
from eval.metrics.likelihood import likelihoods
from tests.helpers import SHAPE, run, run_here, text, tiny_tokenizer

LABELS = ["ham", "spam"]
BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
DOCUMENTS = [
    Document(
        f"d{i}", "code" if i % 2 else "prose", text("code" if i % 2 else "prose", i, 5 + 3 * i), label=i % 2
    )
    for i in range(8)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=320, pad_token_id=0, architectures=[CLASSIFIER], **BERT)
    ).eval()


def llama():
    torch.manual_seed(0)
    shape = {**SHAPE, "vocab_size": 320, "pad_token_id": 0, "architectures": [CLASSIFIER]}
    return LlamaForSequenceClassification(LlamaConfig(**shape)).eval()


def batch_of(tokenizer, context=32):
    return collate([row for document in DOCUMENTS for row in windows(tokenizer, document, context)], 0)


def test_a_row_is_the_text_cut_behind_and_its_label_which_no_model_reads(tokenizer):
    (row,) = windows(tokenizer, DOCUMENTS[7], 16)
    ids = tokenizer(DOCUMENTS[7].text, add_special_tokens=False)["input_ids"]
    assert row.read == [tokenizer.bos_token_id, *ids[:14]]
    assert (row.tokens[-1], row.predicted, len(row.tokens)) == (1, 1, 16)
    batch = batch_of(tokenizer)
    assert batch.mask.sum(1).tolist() == [1] * 8
    assert batch.labels[batch.mask].tolist() == [document.label for document in DOCUMENTS]
    for ids, mask, document in zip(batch.input_ids, batch.attention_mask, DOCUMENTS, strict=True):
        read = windows(tokenizer, document, 32)[0].read
        assert (ids[: len(read)].tolist(), int(mask.sum())) == (read, len(read))
        assert not ids[len(read) :].any(), "a label among the ids"


@pytest.mark.parametrize("make", [bert, llama], ids=["encoder", "decoder"])
def test_the_loss_is_that_of_transformers_and_the_divergence_that_of_torch(tokenizer, make):
    model, batch = make(), batch_of(tokenizer)
    check_head(model, batch)
    own = model(**batch.inputs, labels=batch.classes)
    module = DistillationModule(model, Train(loss=Loss(weight=0.7))).eval()
    assert float(module(batch, None).detach()) == pytest.approx(8 * float(own.loss.detach()), rel=1e-5)
    teacher = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    kl = F.kl_div(own.logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    expected = 0.3 * 8 * float(own.loss.detach()) + 0.7 * float(kl.detach())
    assert float(module(batch, Dense(teacher)).detach()) == pytest.approx(expected, rel=1e-5)
    module(batch, Dense(teacher)).backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if "classifier" in name)


def test_an_ensemble_is_the_mean_of_probabilities(tokenizer):
    models, batch = [bert(), bert()], batch_of(tokenizer)
    torch.nn.init.normal_(models[1].classifier.weight)
    with torch.no_grad():
        mean = torch.stack([model(**batch.inputs).logits.softmax(-1) for model in models]).mean(0)
        said = plain_output(*models, batch=batch).dense()
    assert said.shape == (8, 1, 2)
    assert torch.allclose(said[:, 0].exp(), mean, atol=1e-6)


@pytest.mark.parametrize("make", [bert, llama], ids=["encoder", "decoder"])
def test_the_nearest_texts_of_a_memory_vote_for_a_class(tokenizer, make, tmp_path):
    model, rows = make(), [windows(tokenizer, document, 32)[0] for document in DOCUMENTS]
    model.save_pretrained(tmp_path / "base")
    with capture_input(output_embedding(model)) as captured, torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.read]))
    states = torch.cat([state[:, -1] for state in captured]).double()
    options = {"share": 0.4, "neighbours": 3, "temperature": 2.0}
    method = make_method(MethodChoice(name="memory", settings=options))
    (tmp_path / "method").mkdir()
    context = MethodContext(
        tmp_path / "method", 0, [0], {0: tmp_path / "base"}, tokenizer, lambda: rows, lambda *_: []
    )
    method.fit(context)
    batch = collate(rows, 0)
    with torch.no_grad(), method.attached(model, context):
        said = method.output(model, batch).dense()
        p = plain_output(model, batch=batch).dense().exp()
    for i in range(8):
        distances = (states - states[i]).square().sum(-1)
        distances[i] = torch.inf  # a text does not vote for itself
        near = distances.argsort()[:3]
        weights = (-distances[near] / 2.0).softmax(0)
        spam = sum(w for w, j in zip(weights, near, strict=True) if DOCUMENTS[j].label == 1)
        at = 0 if said.shape[1] == 1 else len(rows[i].read) - 1
        wanted = 0.6 * p[i, at, 1].double() + 0.4 * spam
        assert said[i, at, 1].exp().item() == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("make", [bert, llama], ids=["encoder", "decoder"])
def test_bits_classes_and_brier_scores_of_a_saved_model_are_those_of_transformers(tokenizer, make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TorchEngine(tmp_path, "cpu")
    seen = ClassPredictions(engine.logits)
    result = likelihoods(seen, DOCUMENTS, engine.tokenizer, 32, batch_tokens=64)
    for i, document in enumerate(DOCUMENTS):
        (row,) = windows(tokenizer, document, 32)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.read])).logits[0].double().numpy()
        p = np.exp(logits - np.logaddexp(*logits))
        assert result.bits[i] == pytest.approx(-math.log2(p[document.label]), rel=1e-4)
        assert seen.predicted[document.id] == int(p.argmax())
        assert result.correct[i] == (p.argmax() == document.label)
        brier = (p[document.label] - 1) ** 2 + p[1 - document.label] ** 2
        assert seen.brier[document.id] == pytest.approx(brier, rel=1e-4)
    assert (result.tokens, document.size) == ([1] * 8, 1)
    ids = torch.tensor([windows(tokenizer, DOCUMENTS[5], 32)[0].read])
    logits, state = engine.prefill(ids)
    with torch.no_grad():
        assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-6)
    assert (logits.shape, state) == ((1, 2), None)


def test_f1_and_brier_are_as_written_out():
    rng = random.Random(0)
    labels = np.array([rng.randrange(3) for _ in range(200)])
    said = np.array([rng.choice([label, rng.randrange(3)]) for label in labels])
    twice, size = f1_parts(said, labels, 2)
    tp = sum(a == b == 2 for a, b in zip(said, labels, strict=True))
    precision, recall = tp / (said == 2).sum(), tp / (labels == 2).sum()
    assert twice.sum() / size.sum() == pytest.approx(2 * precision * recall / (precision + recall))
    probabilities = torch.tensor([[0.7, 0.2, 0.1]])
    assert float(brier_scores(probabilities, torch.tensor([1]))) == pytest.approx(0.49 + 0.64 + 0.01)


def test_fewer_layers_and_a_new_head_leave_a_classifier_that_loads(tokenizer, tmp_path):
    model = bert()
    keep_layers(model, [0, 2])
    assert logits_of(model, batch_of(tokenizer)).shape == (8, 32, 2)
    model.bert.save_pretrained(tmp_path)  # the encoder alone, as it is published
    tokenizer.save_pretrained(tmp_path)
    one, _ = load_encoder(tmp_path, ["a", "b", "c"], 7, "base.path")
    again, _ = load_encoder(tmp_path, ["a", "b", "c"], 7, "base.path")
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert one.classifier.weight.shape == (3, 32)
    assert one.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(
        one.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight
    )


def test_the_layer_that_goes_is_the_one_whose_absence_costs_least(tokenizer):
    model, rows = bert(), [row for document in DOCUMENTS for row in windows(tokenizer, document, 32)]
    with torch.no_grad():
        losses = []
        for batch in batches(rows, 0):
            losses.append(8 * float(model(**batch.inputs, labels=batch.classes).loss))
    assert mean_loss(model, rows, 0) == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert choose_layers(model, rows, 0, 1) == {1}


def test_a_recipe_of_another_pass_is_left_out_and_says_why(tokenizer, tmp_path):
    bert().save_pretrained(tmp_path)
    student = TrainedStudent("S1", 0, tmp_path, "", "", (32, 8))
    every = [Variant(student, load_recipe(name)) for name in ("int8", "depth25", "width25", "nf4", "wanda50")]
    unfit = unfit_recipes(every)
    assert set(unfit) == {"depth25", "width25", "nf4", "wanda50"}  # depth25 trains again
    assert "the students classify; take recipes of openvino and drop_layers" in unfit["wanda50"]


def labelled_study(folder, **changes):
    """A tiny study of texts of two kinds; `changes` replace top-level keys."""
    rows = [
        {"text": text(domain, i, 12), "kind": LABELS[domain == "code"], "topic": f"t{i % 3}"}
        for i in range(50)
        for domain in ("code", "prose")
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "dataset", "path": "json", "data_files": str(folder / "texts.jsonl")}
    training = {"epochs": 1, "rows": 8, "optimizer": {"name": "adamw", "lr": 0.003}}
    study = {
        "name": "labelled",
        "task": "classification",
        "runs": str(folder / "runs"),
        "seeds": [0, 1],
        "data": {
            "labels": LABELS,
            "documents": [{**source, "label_column": "kind", "domain_column": "topic"}],
            "validation": 16,
            "test": 4,
            "context": 32,
            "train_rows": 48,
        },
        "base": {
            "architecture": {"model_type": "bert", **BERT},
            "vocab_size": 320,
            "train": training,
        },
        "method": {"name": "ensemble", "settings": {"members": 2}},
        "train": training,
        "cost": {"new_tokens": 1, "prompt_tokens": 16, "processes": 2, "requests": 3},
        "budget": "spam",
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps({**study, **changes}))))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    study = labelled_study(folder)
    return study, folder / "runs" / "labelled", run("distill/train.py", "--config", study)


def test_a_study_of_labels_is_trained_scored_and_judged(trained):
    study, folder, done = trained
    assert done.returncode == 0, done.stderr
    assert run("-m", "eval.score", "--study", study).returncode == 0
    judged = run("-m", "eval.gate", "--study", study)
    assert judged.returncode in (1, 2), judged.stderr
    for record in read_scores(folder):
        columns = record.documents
        assert set(columns.bytes) == {1}
        assert columns.predicted is not None
        assert len(columns.predicted) == 16
    gate = json.loads((folder / "gate.json").read_text())
    assert (gate["task"], gate["teacher_gain"]["unit"]) == ("classification", "bits/example")
    whole = [row for row in gate["classes"] if row["domain"] is None]
    assert {row["arm"] for row in whole} == {"B", "T0", "T1", "S1", "S0", "CE"}
    labels = {document.id: document.label for document in read_documents(folder / "data", "validation")}
    for row in whole:
        rates = []
        for record in (r for r in read_scores(folder) if r.arm == row["arm"]):
            pairs = zip(record.documents.id, record.documents.predicted, strict=True)
            others = [said for name, said in pairs if labels[name] == 0]
            rates.append(sum(others) / len(others))
        assert row["false_alarms"]["point"] == pytest.approx(np.mean(rates))
    reported = run("-m", "eval.report", "--study", study)
    assert reported.returncode == 0, reported.stderr
    table = (folder / "table.md").read_text()
    assert "### Classes" in table
    assert "bits/byte" not in table + reported.stdout + (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.labels", "[spam]"], "two or more names"),
        (["--data.packing", "true"], "data.packing is True"),
        (["--cost.new_tokens", "8"], "cost.new_tokens is 8"),
        (["--targets.source", "on_policy"], "writes no texts"),
        (["--task", "causal_lm"], "`task: classification`"),
        (["--method", "{name: context, settings: {text: a, wrong: {text: b}}}"], "take one of ensemble"),
        (["--method", "{name: memory, settings: {cache_share: 0.1}}"], "method.settings.cache_share: 0.1"),
        (["--budget", "default"], "decodes nothing"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(tmp_path, words, message):
    done = run_here("distill.train", "--config", labelled_study(tmp_path), *words)
    assert done.returncode == 3
    assert message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "runs" / "labelled" / "base").exists()


def test_other_labels_of_a_base_that_is_used_as_it_is_are_refused(tokenizer, tmp_path):
    bert().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    study = labelled_study(tmp_path, base={"path": str(tmp_path / "model")}, method={"name": "placebo"})
    done = run_here("distill.train", "--config", study)
    assert done.returncode == 3
    assert "its classes are ['LABEL_0', 'LABEL_1']" in done.stderr


def test_a_study_of_next_tokens_is_as_it_was():
    dumped = json.dumps(load_study("tiny").model_dump(mode="json"))
    for word in ('task"', "labels", "label_column", "text_after"):
        assert word not in dumped
    with pytest.raises(UserError, match=r"cost\.new_tokens is 1"):
        load_study("tiny", cost__new_tokens=1)


@pytest.mark.slow
def test_int8_of_openvino_says_the_same_and_costs_are_measured(tmp_path):
    study = labelled_study(tmp_path, recipes=["int8"], workers=1)
    for words in (
        ["distill/train.py", "--config", study],
        ["-m", "compress.run", "--study", study],
        ["-m", "eval.score", "--study", study],
        ["-m", "eval.score.agreement", "--study", study, "--documents", 4],
        ["-m", "eval.cost", "--study", study, "--target", "cpu"],
    ):
        done = run(*words)
        assert done.returncode == 0, done.stderr
    assert run("-m", "eval.gate", "--study", study).returncode in (1, 2)
    folder = tmp_path / "runs" / "labelled"
    scores = {(r.recipe, r.arm, r.seed): r.documents.bits for r in read_scores(folder)}
    for seed in (0, 1):
        plain, small = (np.array(scores[recipe, "S1", seed]) for recipe in ("plain", "int8"))
        assert np.abs(plain - small).max() < 0.05
    gate = json.loads((folder / "gate.json").read_text())
    costs = {v["recipe"]: v["cost"] for v in gate["variants"]}
    assert costs["int8"]["prefill_p50"]["value"] > 0
    assert not any(name.startswith("decode") for name in costs["int8"])
