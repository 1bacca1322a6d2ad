"""Experts that are weighed by the likelihood of what was read: Bayes' rule, no look ahead, no domain."""

from dataclasses import replace

import pytest
import torch

from distill.methods.experts import posterior
from eval.core.documents import collate, join_rows
from eval.core.sections import Generation
from eval.engines.torch import load_model
from tests.distill.conftest import method_context
from tests.distill.method_helpers import answer, make, mixed

SETTINGS = {"rank": 2, "train": {"rows": 4, "steps": 6, "optimizer": {"lr": 0.05}}}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tokenizer, rows, bases):
    context = method_context(tmp_path_factory.mktemp("experts"), tokenizer, rows, bases)
    method = make("experts", **SETTINGS, routing="likelihood")
    method.fit(context)
    return method, context


def test_weights_are_bayes_rule_over_the_tokens_read_so_far():
    torch.manual_seed(0)
    log_probs = torch.randn(3, 1, 7) - 2
    starts = torch.tensor([[True, False, False, True, False, False, False]])
    weights = posterior(log_probs, starts).exp()
    for position in range(7):
        begin = 0 if position < 3 else 3
        read = (
            log_probs[:, 0, begin + 1 : position + 1].sum(-1).exp()
        )  # the first token is given, not predicted
        torch.testing.assert_close(weights[:, 0, position], read / read.sum())


def test_the_teacher_is_the_mixture_of_its_experts(fitted, rows):
    method, context = fitted
    batch, teacher = mixed(rows), load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        mixture = answer(method, teacher, batch).exp()
        method.settings = method.settings.model_copy(update={"routing": "domain"})
        alone = [answer(method, teacher, with_domain(batch, name)).exp() for name in ("code", "prose")]
        method.settings = method.settings.model_copy(update={"routing": "likelihood"})
    torch.testing.assert_close(mixture[:, 0], (alone[0][:, 0] + alone[1][:, 0]) / 2)
    read = torch.ones(2)
    row = 0
    for position in range(1, 12):
        token = batch.input_ids[row, position]
        read = read * torch.stack([one[row, position - 1, token] for one in alone])
        expected = sum(w * one[row, position] for w, one in zip(read / read.sum(), alone, strict=True))
        torch.testing.assert_close(mixture[row, position], expected, atol=1e-6, rtol=1e-4)


def with_domain(batch, name):
    return replace(batch, domains=[name] * len(batch.domains))


def test_it_knows_no_domain_and_no_later_token(fitted, rows):
    method, context = fitted
    batch, teacher = mixed(rows), load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        first = answer(method, teacher, batch)
        assert torch.equal(first, answer(method, teacher, with_domain(batch, "unheard of")))
        ids = batch.input_ids.clone()
        ids[:, 8] = (ids[:, 8] + 1) % 320
        other = answer(method, teacher, replace(batch, input_ids=ids))
    torch.testing.assert_close(first[:, :8], other[:, :8])
    assert not torch.allclose(first[0, 8:12], other[0, 8:12])


def test_packed_texts_are_weighed_each_for_itself(fitted, rows):
    method, context = fitted
    pair, teacher = [min(rows, key=lambda r: len(r.tokens)), rows[1]], load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        together = answer(method, teacher, collate([join_rows(pair)], 0))[0]
        alone = [answer(method, teacher, collate([row], 0))[0] for row in pair]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_it_writes(fitted, rows):
    method, context = fitted
    teacher = load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        prompts = [replace(rows[0], tokens=rows[0].tokens[:8])]
        texts = method.write(teacher, prompts, Generation(new_tokens=4), 0)
        assert texts == method.write(teacher, prompts, Generation(new_tokens=4), 0)
    assert 1 <= len(texts[0]) <= 4
