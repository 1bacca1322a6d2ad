"""Experts by what was read: weighed by its likelihood (Bayes' rule), or one chosen by a router; no domain, no look ahead."""

from dataclasses import replace

import pytest
import torch

from distill.methods.experts import choose, fit_router, posterior
from eval.core.documents import collate, join_rows
from eval.core.errors import UserError
from eval.core.sections import Generation
from eval.engines.torch import load_model
from tests.distill.conftest import method_context, written_anew
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


ROUTED = {**SETTINGS, "routing": "text", "router_tokens": 6}


@pytest.fixture(scope="module")
def routed(tmp_path_factory, tokenizer, rows, bases):
    """Settings -> a method with a router, fitted once, and its context."""
    context = method_context(tmp_path_factory.mktemp("routed"), tokenizer, rows, bases)
    make("experts", **ROUTED).fit(context)
    return lambda **changes: (make("experts", **ROUTED, **changes), context)


def test_a_router_is_the_ridge_regression_in_which_every_domain_weighs_the_same():
    torch.manual_seed(0)
    features, labels = torch.randn(40, 3), torch.tensor([0] * 30 + [1] * 10)
    features[:, 0] += 4.0 * labels
    router = fit_router(features, labels)
    again = fit_router(torch.cat([features[:30], features[30:].repeat(3, 1)]), labels.repeat_interleave(
        torch.tensor([1] * 30 + [3] * 10)))  # fmt: skip
    torch.testing.assert_close(router, again)
    assert sum(a == b for a, b in zip(choose(router, features), labels.tolist(), strict=True)) >= 38


def test_the_router_knows_the_domains_of_what_it_reads(routed, rows):
    method, context = routed()
    teacher = load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        names = {name: domain for domain, name in method._names.items()}
        batch = mixed(rows)
        base = method._output_of(["__base__"] * len(batch.ids), batch)
        found = [names[name] for name in method._choose(base)]
    assert found == batch.domains


def test_after_the_tokens_of_the_router_the_expert_that_it_chose_speaks(routed, rows):
    method, context = routed()
    batch, teacher = mixed(rows), load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        said = answer(method, teacher, with_domain(batch, "unheard of"))
        method.settings = method.settings.model_copy(update={"routing": "domain"})
        experts, base = answer(method, teacher, batch), answer(method, teacher, with_domain(batch, "none"))
    torch.testing.assert_close(said[:, :5], base[:, :5])
    torch.testing.assert_close(said[:, 5:], experts[:, 5:])
    assert not torch.allclose(experts[:, 5:], base[:, 5:])


@pytest.mark.parametrize("routing", ["domain", "likelihood", "text"])
def test_with_one_adapter_in_memory_it_says_the_same(routed, rows, routing, monkeypatch):
    both = [next(row for row in rows if row.domain == name) for name in ("code", "prose", "code")]
    answers = []
    for resident in (1, 2):
        monkeypatch.setattr("distill.methods.experts.RESIDENT", resident)
        method, context = routed()
        method.settings = method.settings.model_copy(update={"routing": routing})
        teacher = load_model(context.bases[0])
        with torch.no_grad(), method.attached(teacher, context):
            answers.append([answer(method, teacher, collate([row], 0)) for row in both])
            assert len(method._loaded) == resident
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)


def test_with_a_router_it_writes_what_its_output_says(routed, rows):
    method, context = routed()
    teacher = load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        for length in (4, 9):  # shorter than what the router reads, and longer
            prompts = [replace(row, tokens=row.tokens[:length]) for row in rows[:3]]
            settings = Generation(new_tokens=4, temperature=0.0)
            written = method.write(teacher, prompts, settings, 0)
            assert written == written_anew(method, teacher, prompts, settings, 0)


def test_rows_of_several_texts_have_no_first_tokens(routed, rows):
    method, context = routed()
    teacher = load_model(context.bases[0])
    with (
        torch.no_grad(),
        method.attached(teacher, context),
        pytest.raises(UserError, match=r"data\.packing: true, but a router reads"),
    ):
        answer(method, teacher, collate([join_rows(rows[:2])], 0))


def test_what_a_router_cannot_read_is_refused_before_adapters_are_trained(tmp_path, tokenizer, rows, bases):
    context = method_context(tmp_path, tokenizer, rows, bases)
    with pytest.raises(UserError, match="has no row of 100 tokens; give a smaller router_tokens"):
        make("experts", **SETTINGS, routing="text", router_tokens=100).fit(context)
    (tmp_path / "packed").mkdir()
    packed = [replace(row, packed=((len(row.tokens), 0),)) for row in rows]
    with pytest.raises(UserError, match=r"data\.packing: true, but a router reads"):
        make("experts", **ROUTED).fit(method_context(tmp_path / "packed", tokenizer, packed, bases))
    assert not list(tmp_path.rglob("adapter_config.json"))
