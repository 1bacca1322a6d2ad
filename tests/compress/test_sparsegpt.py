"""SparseGPT against inverses computed anew for every column, and OWL against its formula."""

import pytest
import torch

from compress.tensors.sparsegpt import DAMPING, sparsegpt
from compress.tensors.sparsity import Rule, keep_rows, outlier_share, owl_sparsity, wanda_scores


def layer(outputs=6, inputs=24, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / 4 + torch.eye(inputs)
    x = torch.randn(tokens, inputs, generator=generator) @ mix  # correlated inputs
    return torch.randn(outputs, inputs, generator=generator), x


def dense_reference(weight, x, block, share=None, pattern=None):
    """Column by column with `torch.linalg.inv` of what is left of the Hessian: no factor, no lazy update."""
    w, h = weight.double().clone(), x.double().T @ x.double()
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    keep = torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if (pattern and j % pattern[1] == 0) or (not pattern and j % block == 0):
            columns = range(j, min(j + (pattern[1] if pattern else block), w.shape[1]))
            cost = torch.stack([w[:, c] ** 2 / torch.linalg.inv(h[c:, c:])[0, 0] for c in columns], dim=1)
            if pattern:
                drop = cost.argsort(dim=1)[:, : pattern[1] - pattern[0]]
                keep[:, list(columns)] = torch.ones_like(cost, dtype=torch.bool).scatter(1, drop, False)
            else:
                limit = cost.flatten().sort().values[int(cost.numel() * share) - 1]
                keep[:, list(columns)] = cost > limit
        inverse = torch.linalg.inv(h[j:, j:])
        for o in range(len(w)):
            if not keep[o, j]:
                w[o, j:] -= w[o, j] / inverse[0, 0] * inverse[0]
                w[o, j] = 0
    return w


@pytest.mark.parametrize(("block", "share"), [(24, 0.5), (8, 0.5), (8, 0.75), (10, 0.25)])
def test_unstructured_masks_and_weights_against_the_dense_reference(block, share):
    weight, x = layer()
    expected = dense_reference(weight, x, block, share=share)
    result = sparsegpt(weight, x.T.double() @ x.double(), Rule(share), block=block)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (12, 24)])
def test_n_of_m_masks_and_weights_against_the_dense_reference(pattern):
    weight, x = layer(seed=1)
    expected = dense_reference(weight, x, 24, pattern=pattern)
    result = sparsegpt(weight, x.T.double() @ x.double(), Rule(0.5, pattern), block=10)
    assert torch.equal(result == 0, expected == 0)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)
    groups = (result != 0).reshape(-1, pattern[1]).sum(dim=1)
    assert torch.equal(groups, torch.full_like(groups, pattern[0]))


def test_uncorrelated_inputs_leave_the_others_as_they_are():
    """A diagonal Hessian: nothing can be made up for, and the scores are Wanda's, squared, but for the damping."""
    weight, _ = layer()
    norms = torch.rand(24, generator=torch.Generator().manual_seed(2)) + 1
    result = sparsegpt(weight, torch.diag(norms.double() ** 2), Rule(0.5, (2, 4)))
    assert torch.equal(result[result != 0], weight[result != 0])
    damped = (norms**2 + DAMPING * (norms**2).mean()).sqrt()
    scores = wanda_scores(weight, damped)
    assert torch.equal(result != 0, Rule(0.5, (2, 4)).keep(scores, whole=True))


def test_the_correction_is_worth_it_and_nothing_pruned_is_the_same_layer():
    weight, x = layer(outputs=32, inputs=64, tokens=500, seed=3)
    x = x[:, :8] @ torch.randn(8, 64, generator=torch.Generator().manual_seed(4)) + 0.5 * x
    hessian = x.T.double() @ x.double()
    assert torch.equal(sparsegpt(weight, hessian, Rule(0.0)), weight)
    corrected = sparsegpt(weight, hessian, Rule(0.5))
    masked = weight * keep_rows(wanda_scores(weight, x.norm(dim=0)), 0.5)
    error = [float((x @ (w - weight).T).square().sum()) for w in (corrected, masked)]
    assert error[0] < 0.8 * error[1], error
    assert int((corrected == 0).sum()) == weight.numel() // 2


def test_an_input_that_is_always_zero():
    weight, x = layer()
    x[:, 5] = 0
    result = sparsegpt(weight, x.T.double() @ x.double(), Rule(0.5))
    assert torch.isfinite(result).all()
    assert not result[:, 5].any()


def test_owl_against_its_formula():
    """As the published code: shares to [0, 2 reach], moved so that their mean is the density asked for."""
    outliers, reach = [0.02, 0.05, 0.03, 0.10], 0.08
    scaled = [(share - 0.02) / 0.08 * 2 * reach for share in outliers]
    density = [d - sum(scaled) / 4 + (1 - 0.7) for d in scaled]
    found = owl_sparsity(outliers, [100] * 4, 0.7, reach)
    assert found == pytest.approx([1 - d for d in density])
    assert sum(found) / 4 == pytest.approx(0.7)
    assert owl_sparsity(outliers, [1, 1, 1, 1000], 0.7, reach)[3] == pytest.approx(0.7, abs=1e-3)
    assert owl_sparsity([0.1, 0.1], [1, 1], 0.5, reach) == [0.5, 0.5]


def test_outliers_are_counted_over_the_whole_layer():
    scores = [torch.ones(2, 10), torch.cat([torch.full((1, 2), 30.0), torch.ones(1, 8)], dim=1)]
    assert outlier_share(scores, 5.0) == pytest.approx(2 / 30)
