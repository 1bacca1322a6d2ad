"""Metrics: the modules of `evaluate` load offline, and say what a definition written out says."""

import math
import socket

import evaluate
import pytest
import torch

from eval.core.documents import Document
from eval.metrics.functions import calibration_error, exact_match, likeliest_choice, token_f1
from eval.metrics.likelihood import BINS, bin_by_confidence, likelihoods
from tests.eval.run_builder import CONTEXT, tokenizer
from tests.helpers import ROOT, text, tiny_model


@pytest.fixture
def load(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("the network was called")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return lambda name: evaluate.load(str(ROOT / "eval" / "metrics" / f"{name}.py"), cache_dir=str(tmp_path))


def test_accuracy_is_a_ratio_of_sums(load):
    metric = load("next_token_accuracy")
    assert metric.compute(predictions=[1, 30], references=[10, 40]) == {"next_token_accuracy": 31 / 50}
    with pytest.raises(ValueError, match="references: 0 tokens"):
        metric.compute(predictions=[0], references=[0])


def naive_calibration_error(confidence, correct):
    """Guo et al. (2017), equation 3, token by token."""
    total = 0.0
    for b in range(BINS):
        inside = [
            i
            for i, c in enumerate(confidence)
            if b / BINS <= c < (b + 1) / BINS or (b == BINS - 1 and c == 1)
        ]
        if inside:
            share = sum(correct[i] for i in inside) / len(inside)
            total += (
                len(inside) / len(confidence) * abs(share - sum(confidence[i] for i in inside) / len(inside))
            )
    return total


def test_calibration_error_is_that_of_the_definition(load):
    generator = torch.Generator().manual_seed(0)
    confidence = torch.cat([torch.rand(500, generator=generator), torch.tensor([0.0, 1.0, 1.0])])
    correct = torch.rand(503, generator=generator) < confidence**2
    tokens, sure, right = bin_by_confidence(confidence, correct).tolist()
    wanted = naive_calibration_error(confidence.tolist(), correct.tolist())
    result = load("calibration_error").compute(predictions=sure, references=right, tokens=tokens)
    assert result["calibration_error"] == pytest.approx(wanted, rel=1e-6)
    assert calibration_error(sure, right, tokens) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="every bin is empty"):
        load("calibration_error").compute(predictions=[0.0], references=[0.0], tokens=[0.0])


def test_choice_accuracy_raw_and_per_byte(load):
    result = load("choice_accuracy").compute(
        predictions=[[-4.0, -6.0], [-1.0, -1.0], [-2.0, -1.5]],
        references=[1, 0, 1],
        sizes=[[1, 6], [2, 2], [1, 1]],
    )
    assert result == {"accuracy": 2 / 3, "accuracy_per_byte": 1.0}
    assert likeliest_choice([-4.0, -6.0]) == 0
    assert likeliest_choice([-4.0, -6.0], [1, 6]) == 1


@pytest.mark.parametrize(
    ("output", "answers", "exact", "f1"),
    [
        (" 42\n", ["42"], 1, 1),
        ("The cat, sat!", ["a cat sat"], 0, 1),
        ("the black cat", ["cat", "black cat sat"], 0, 0.8),
        ("dog", ["cat"], 0, 0),
        ("", ["the"], 0, 1),
        ("", ["cat"], 0, 0),
        ("a b b", ["b b b b"], 0, 2 * 2 / (2 + 4)),
    ],
)
def test_answers_are_scored(output, answers, exact, f1):
    assert exact_match(output, answers) == exact
    assert token_f1(output, answers) == pytest.approx(f1)


@pytest.mark.parametrize(("name", "wanted"), [("exact_match", 0.5), ("token_f1", 0.9)])
def test_generated_answers_through_evaluate(load, name, wanted):
    outputs, answers = ["42", "the black cat"], [["42", "43"], ["cat", "black cat sat"]]
    assert load(name).compute(predictions=outputs, references=answers) == {name: pytest.approx(wanted)}


@torch.no_grad()
def test_correct_tokens_and_bins_are_those_of_a_plain_loop():
    """One pass gives bits, correct tokens and calibration: held against one window at a time."""
    words, model = tokenizer(), tiny_model(seed=1)
    documents = [Document(f"d{i}", "code", text("code", i, words=9 + 31 * i)) for i in range(4)]
    columns = likelihoods(lambda b: model(**b.inputs).logits, documents, words, CONTEXT, batch_tokens=70)
    sure, right, counts = [], [], []
    for document in documents:
        tokens = words(document.text, add_special_tokens=False)["input_ids"]
        hits = []
        for start in range(0, len(tokens), CONTEXT - 1):
            window = tokens[start : start + CONTEXT - 1]
            probs = model(input_ids=torch.tensor([[0, *window]])).logits[0, :-1].double().softmax(-1)
            sure += probs.max(-1).values.tolist()
            hits += (probs.argmax(-1) == torch.tensor(window)).tolist()
        right += hits
        counts.append(sum(hits))
    assert columns.correct == counts
    assert sum(columns.tokens) == len(sure) == sum(columns.bins.tokens)
    assert sum(columns.bins.correct) == sum(right)
    assert math.fsum(columns.bins.confidence) == pytest.approx(math.fsum(sure), rel=1e-5)
    tokens, confidence, correct = columns.bins
    assert calibration_error(confidence, correct, tokens) == pytest.approx(
        naive_calibration_error(sure, right), rel=1e-4
    )


def test_a_tie_is_no_success():
    """A uniform model holds one token to be the likeliest, not all of them."""
    words = tokenizer()
    flat = likelihoods(
        lambda b: torch.zeros(*b.input_ids.shape, 300),
        [Document("d", "code", text("code", 1))],
        words,
        CONTEXT,
    )
    assert flat.correct == [0], "id 0 is the boundary and never in a text"
    assert flat.bins.tokens[0] == flat.tokens[0]
