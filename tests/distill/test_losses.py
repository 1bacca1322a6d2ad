"""Losses against float64 references, identities and finite differences."""

import math

import numpy as np
import pytest
import torch

from distill.losses import cross_entropy, distillation_loss, forward_kl, generalized_jsd
from eval.sections import Loss

TOKENS, VOCAB = 7, 13


def _pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(TOKENS, VOCAB, generator=generator) * 3
    teacher = torch.log_softmax(torch.randn(TOKENS, VOCAB, generator=generator) * 3, -1)
    return student, teacher


def _softmax(values, temperature):
    z = values.double().numpy() / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _kl(p, q):
    return float((p * (np.log(p) - np.log(q))).sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_forward_kl_is_the_float64_sum(temperature):
    student, teacher = _pair()
    wanted = _kl(_softmax(teacher, temperature), _softmax(student, temperature)) * temperature**2
    assert float(forward_kl(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_is_the_float64_sum(beta, temperature):
    student, teacher = _pair()
    p, q = _softmax(teacher, temperature), _softmax(student, temperature)
    m = beta * p + (1 - beta) * q
    wanted = (beta * _kl(p, m) + (1 - beta) * _kl(q, m)) * temperature**2
    assert float(generalized_jsd(student, teacher, beta, temperature)) == pytest.approx(wanted, rel=1e-5)


def test_jsd_is_symmetric_and_bounded_at_one_half():
    student, teacher = _pair()
    there = generalized_jsd(student, teacher)
    back = generalized_jsd(teacher, torch.log_softmax(student, -1))
    assert float(there) == pytest.approx(float(back), rel=1e-5)
    far = torch.tensor([[80.0, 0.0]]), torch.log_softmax(torch.tensor([[0.0, 80.0]]), -1)
    assert float(generalized_jsd(*far)) == pytest.approx(math.log(2), rel=1e-5)


def test_jsd_tends_to_forward_kl_as_beta_vanishes():
    student, teacher = _pair()
    beta = 1e-4
    assert float(generalized_jsd(student, teacher, beta)) / beta == pytest.approx(
        float(forward_kl(student, teacher)), rel=2e-2
    )


@pytest.mark.parametrize("loss", [forward_kl, generalized_jsd])
def test_identical_models_cost_nothing(loss):
    student, _ = _pair()
    same = torch.log_softmax(student, -1)
    assert float(loss(student, same)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
@pytest.mark.parametrize("loss", [forward_kl, lambda s, t, T: generalized_jsd(s, t, 0.3, T)])
def test_temperature_scales_value_and_gradient_alike(loss, temperature):
    """Central differences of the value itself, in float64 steps: T^2 must be on both."""
    student, teacher = _pair(1)
    student.requires_grad_()
    loss(student, teacher, temperature).backward()
    step = 1e-2
    for place in [(0, 0), (3, 5), (6, 12)]:
        up, down = student.detach().clone(), student.detach().clone()
        up[place] += step
        down[place] -= step
        slope = (float(loss(up, teacher, temperature)) - float(loss(down, teacher, temperature))) / (2 * step)
        assert float(student.grad[place]) == pytest.approx(slope, rel=2e-2, abs=2e-3)


def test_half_precision_logits_are_widened_first():
    student, teacher = _pair()
    narrow = student.bfloat16()
    assert float(forward_kl(narrow, teacher)) == pytest.approx(
        float(forward_kl(narrow.float(), teacher)), rel=1e-7
    )


def test_mix_is_the_weighted_sum_and_ce_stands_alone():
    student, teacher = _pair()
    labels = torch.arange(TOKENS)
    config = Loss(weight=0.9, temperature=2.0)
    wanted = 0.1 * cross_entropy(student, labels) + 0.9 * forward_kl(student, teacher, 2.0)
    assert float(distillation_loss(student, labels, teacher, config)) == pytest.approx(float(wanted))
    alone = distillation_loss(student, labels, None, config)
    assert float(alone) == pytest.approx(float(cross_entropy(student, labels)))
    reference = -np.log(_softmax(student, 1.0)[np.arange(TOKENS), np.arange(TOKENS)]).sum()
    assert float(alone) == pytest.approx(float(reference), rel=1e-5)
