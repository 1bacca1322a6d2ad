"""Losses against float64 references, identities and finite differences; refusals of truncated targets."""

import math

import numpy as np
import pytest
import torch

from distill.losses.divergences import (
    DIVERGENCES,
    check_target,
    cross_entropy,
    distillation_loss,
    divergence,
    generalized_jsd,
    skew_forward_kl,
    skew_reverse_kl,
)
from distill.losses.teacher_output import Dense, Sampled, TopK
from eval.core.errors import UserError
from eval.core.sections import Loss

TOKENS, VOCAB = 7, 13


def pair(seed=0):
    """Logits of a student, log-probabilities of a teacher, [TOKENS, VOCAB]."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(TOKENS, VOCAB, generator=generator) * 3
    return student, torch.log_softmax(torch.randn(TOKENS, VOCAB, generator=generator) * 3, -1)


def softmax(values, temperature=1.0):
    z = values.double().numpy() / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return float((p * (np.log(p) - np.log(q))).sum())


def js(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name -> settings, and the divergence of teacher p and student q in float64, straight from its definition
CASES = {
    "forward_kl": ({}, kl),
    "reverse_kl": ({}, lambda p, q: kl(q, p)),
    "jsd": ({"beta": 0.2}, lambda p, q: js(p, q, 0.2)),
    "skew_forward_kl": ({"alpha": 0.3}, lambda p, q: kl(p, 0.3 * p + 0.7 * q)),
    "skew_reverse_kl": ({"alpha": 0.3}, lambda p, q: kl(q, 0.7 * p + 0.3 * q)),
    "total_variation": ({}, lambda p, q: float(np.abs(p - q).sum() / 2)),
    "uld": ({}, lambda p, q: float(np.abs(np.sort(p) - np.sort(q)).sum())),
}


def case(name, **more):
    return Loss(divergence=name, **{**CASES[name][0], **more}), CASES[name][1]


def test_every_divergence_is_a_case():
    names = set(Loss.model_fields["divergence"].annotation.__args__)
    assert set(CASES) == set(DIVERGENCES) == names - {"policy_gradient"}, "which needs the drawn tokens"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", CASES)
def test_value_is_the_float64_sum(name, temperature):
    (student, teacher), (config, reference) = pair(), case(name, temperature=temperature)
    wanted = reference(softmax(teacher, temperature), softmax(student, temperature)) * temperature**2
    assert float(divergence(student, teacher, config)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("name", CASES)
def test_gradient_is_the_slope_of_the_float64_sum(name, temperature):
    """Central differences of the reference: T^2 is on the gradient as it is on the value."""
    (student, teacher), (config, reference) = pair(1), case(name, temperature=temperature)
    p, leaf = softmax(teacher, temperature), student.clone().requires_grad_()
    divergence(leaf, teacher, config).backward()

    def value(place, step):
        moved = student.double().clone()
        moved[place] += step
        return reference(p, softmax(moved, temperature)) * temperature**2

    for place in [(0, 0), (3, 5), (6, 12), (2, 7)]:
        slope = (value(place, 1e-5) - value(place, -1e-5)) / 2e-5
        assert float(leaf.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_identical_models_cost_nothing_and_pull_nowhere(name):
    student, _ = pair()
    same, leaf = torch.log_softmax(student, -1), student.clone().requires_grad_()
    value = divergence(leaf, same, case(name)[0])
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-5)
    if name not in ("total_variation", "uld"):  # which have a kink there
        assert float(leaf.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_half_precision_logits_are_widened_first(name):
    student, teacher = pair()
    narrow, labels, config = student.bfloat16(), torch.arange(TOKENS), case(name)[0]
    value = distillation_loss(narrow, labels, teacher, config)
    assert float(value) == float(distillation_loss(narrow.float(), labels, teacher, config))


def test_jsd_is_symmetric_and_bounded_at_one_half():
    student, teacher = pair()
    student = torch.log_softmax(student, -1)
    assert float(generalized_jsd(teacher, student)) == pytest.approx(
        float(generalized_jsd(student, teacher)), rel=1e-5
    )
    apart = [torch.log_softmax(torch.tensor([z]), -1) for z in ([80.0, 0.0], [0.0, 80.0])]
    assert float(generalized_jsd(*apart)) == pytest.approx(math.log(2), rel=1e-5)


def test_jsd_tends_to_forward_kl_as_beta_vanishes():
    student, teacher = pair()
    beta = 1e-4
    value = divergence(student, teacher, Loss(divergence="jsd", beta=beta)) / beta
    assert float(value) == pytest.approx(float(divergence(student, teacher, Loss())), rel=2e-2)


def test_skew_divergences_without_skew_are_the_plain_ones():
    student, teacher = pair()
    student = torch.log_softmax(student, -1)
    plain = softmax(teacher), softmax(student)
    assert float(skew_forward_kl(teacher, student, 0.0)) == pytest.approx(kl(*plain), rel=1e-5)
    assert float(skew_reverse_kl(teacher, student, 0.0)) == pytest.approx(kl(*plain[::-1]), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_mix_is_the_weighted_sum_and_ce_stands_alone(name):
    student, teacher = pair()
    labels, config = torch.arange(TOKENS), case(name, weight=0.9, temperature=2.0)[0]
    wanted = 0.1 * cross_entropy(student, labels) + 0.9 * divergence(student, teacher, config)
    assert float(distillation_loss(student, labels, teacher, config)) == pytest.approx(float(wanted))
    alone = float(distillation_loss(student, labels, None, config))
    reference = -np.log(softmax(student)[np.arange(TOKENS), np.arange(TOKENS)]).sum()
    assert alone == pytest.approx(float(reference), rel=1e-5)


def top_k(teacher, k):
    values, ids = teacher.topk(k, -1)
    return TopK(ids, values)


def coarse(p, ids):
    """Distributions [n, V] over k ids and one bucket for the rest."""
    selected = np.take_along_axis(p, ids.numpy(), 1)
    return np.concatenate([selected, 1 - selected.sum(1, keepdims=True)], 1)


@pytest.mark.parametrize("name", ["forward_kl", "jsd", "skew_forward_kl"])
def test_top_k_has_its_tail_in_one_bucket(name):
    """The divergence of the coarse distributions, below the whole one and equal to it when nothing is lost."""
    (student, teacher), (config, reference) = pair(), case(name)
    target = top_k(teacher, 4)
    wanted = reference(coarse(softmax(teacher), target.ids), coarse(softmax(student), target.ids))
    value = float(divergence(student, target, config))
    assert value == pytest.approx(wanted, rel=1e-4)
    whole = float(divergence(student, teacher, config))
    assert value < whole
    assert float(divergence(student, top_k(teacher, VOCAB - 1), config)) == pytest.approx(whole, rel=1e-4)


def test_a_whole_tail_is_not_taken_for_nothing():
    """A student that moves its tail's probability to the k ids pays for it; cut off and renormalised, it would not."""
    _, teacher = pair()
    target = top_k(teacher, 4)
    student = teacher.clone().scatter_add_(1, target.ids, torch.full((TOKENS, 4), 2.0)).requires_grad_()
    divergence(student, target, Loss()).backward()
    assert bool((student.grad.gather(1, target.ids) > 0).all())


def test_sampled_is_forward_kl_when_the_counts_are_the_probabilities():
    student, teacher = pair()
    for temperature in (1.0, 2.0):
        at_t = torch.log_softmax(teacher / temperature, -1)
        ids = torch.arange(VOCAB).expand(TOKENS, VOCAB)
        target = Sampled(ids, at_t.exp() * 50, torch.special.entr(at_t.exp()).sum(-1), temperature)
        config = Loss(temperature=temperature)
        one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
        value, wanted = divergence(one, target, config), divergence(other, teacher, config)
        assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        value.backward()
        wanted.backward()
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "config", "message"),
    [
        ("top_k", {"divergence": "reverse_kl"}, "reverse_kl with top-k targets: unstable"),
        ("top_k", {"divergence": "skew_reverse_kl"}, "skew_reverse_kl with top-k targets"),
        ("top_k", {"divergence": "total_variation"}, "total_variation with top-k targets"),
        ("top_k", {"temperature": 2.0}, "their tail is only known at temperature 1"),
        ("sampled", {"divergence": "jsd"}, "jsd with sampled targets: only forward_kl has an unbiased"),
        ("sampled", {"temperature": 2.0}, r"2\.0, but the targets were sampled at 1\.0"),
    ],
)
def test_what_a_form_cannot_give_is_refused(form, config, message):
    _, teacher = pair()
    ids = torch.zeros(TOKENS, 1, dtype=torch.int64)
    sampled = Sampled(ids, torch.ones(TOKENS, 1), torch.zeros(TOKENS), 1.0)
    with pytest.raises(UserError, match=message):
        check_target({"top_k": top_k(teacher, 4), "sampled": sampled}[form], Loss(**config))
    check_target(Dense(teacher), Loss(**config))
