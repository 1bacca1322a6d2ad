"""Muon: the polynomial on singular values, torch's own optimizer, stacks and single matrices."""

import pytest
import torch
from torch import nn

from distill.trainer import muon
from distill.trainer.muon import Muon, orthogonalize


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def steps(optimizer, params, count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for weight in params:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return params


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (1, 16, 16)])
def test_the_singular_values_go_through_the_polynomial_and_nothing_else_changes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    wanted = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(orthogonalize(matrices, torch.float64), wanted)
    torch.testing.assert_close(orthogonalize(matrices, torch.float32).double(), wanted, atol=1e-4, rtol=1e-4)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.25


def test_in_bf16_it_is_the_optimizer_of_torch():
    shapes = [(24, 40), (40, 24), (24, 40)]
    ours, theirs = weights(*shapes), weights(*shapes)
    steps(Muon(ours, 0.02, 0.9, 0.1, torch.bfloat16), ours)
    steps(torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_a_stack_of_experts_is_its_matrices_and_blocks_change_nothing(monkeypatch):
    (stack,) = weights((5, 12, 20))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    steps(Muon([stack], 0.02), [stack])
    steps(Muon(together, 0.02), together)
    monkeypatch.setattr(muon, "STACKED", 300)
    steps(Muon(alone, 0.02), alone)
    for i, matrix in enumerate(stack):
        torch.testing.assert_close(matrix, alone[i])
        torch.testing.assert_close(together[i], alone[i])


def test_it_continues_from_its_state():
    whole, parts, forgetful = weights((12, 20)), weights((12, 20)), weights((12, 20))
    unbroken, broken = Muon(whole, 0.02), Muon(parts, 0.02)
    for optimizer, params in ((unbroken, whole), (broken, parts), (Muon(forgetful, 0.02), forgetful)):
        steps(optimizer, params, 1)
    continued = Muon(parts, 0.02)
    continued.load_state_dict(broken.state_dict())
    for optimizer, params in ((unbroken, whole), (continued, parts), (Muon(forgetful, 0.02), forgetful)):
        steps(optimizer, params, 2)
    assert torch.equal(whole[0], parts[0])
    assert not torch.equal(whole[0], forgetful[0]), "the momentum is part of the state"


def test_a_weight_without_a_gradient_stays():
    still, moved = weights((12, 20), (12, 20))
    before = still.detach().clone()
    optimizer = Muon([still, moved], 0.02)
    moved.grad = torch.ones(12, 20)
    optimizer.step()
    assert torch.equal(still, before)
