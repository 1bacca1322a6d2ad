"""The masks of Wanda against brute force and identities."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from compress.calibration import Walk, check_batch, input_norms
from compress.model_size import layer_matrices
from compress.tensors.sparsity import keep_n_of_m, keep_rows, wanda_scores
from distill.models.layers import decoder_layers
from eval.core.documents import Row, batches, pack
from eval.core.errors import UserError
from tests.distill.test_families import FAMILIES
from tests.helpers import tiny_model


def brute_rows(scores, drop):
    keep = [[True] * scores.shape[1] for _ in range(scores.shape[0])]
    for o, row in enumerate(scores.tolist()):
        for i in sorted(range(len(row)), key=lambda i: (row[i], i))[:drop]:
            keep[o][i] = False
    return torch.tensor(keep)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.9])
def test_rows_against_brute_force(sparsity):
    scores = torch.rand(7, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_rows(scores, sparsity), brute_rows(scores, int(20 * sparsity)))


def test_ties_are_broken_by_place():
    assert keep_rows(torch.ones(2, 4), 0.5).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_n_of_m_against_brute_force(n, m):
    scores = torch.rand(6, 8 * m, generator=torch.Generator().manual_seed(1))
    keep = keep_n_of_m(scores, n, m)
    for o in range(6):
        for start in range(0, 8 * m, m):
            group = scores[o, start : start + m]
            best = set(torch.topk(group, n).indices.tolist())
            assert set(keep[o, start : start + m].nonzero().flatten().tolist()) == best


def test_equal_norms_give_magnitude_pruning():
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(
        keep_rows(wanda_scores(weight, torch.full((12,), 3.0)), 0.5), keep_rows(weight.abs(), 0.5)
    )


def test_scaling_an_input_and_its_weights_changes_nothing():
    """W diag(1/s) with inputs diag(s) x is the same layer: Wanda drops the same entries."""
    generator = torch.Generator().manual_seed(3)
    weight, inputs = torch.randn(5, 12, generator=generator), torch.randn(40, 12, generator=generator)
    scale = torch.rand(12, generator=generator) + 0.5
    plain = wanda_scores(weight, inputs.norm(dim=0))
    scaled = wanda_scores(weight / scale, (inputs * scale).norm(dim=0))
    assert torch.equal(keep_rows(plain, 0.5), keep_rows(scaled, 0.5))


def test_wanda_is_optimal_for_uncorrelated_inputs():
    """With orthogonal inputs the output error of a mask is the sum of the squared scores that it drops."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.linalg.qr(torch.randn(16, 8, generator=generator))[0] * torch.rand(8, generator=generator)
    weight = torch.randn(1, 8, generator=generator)
    keep = keep_rows(wanda_scores(weight, inputs.norm(dim=0)), 0.5)
    error = (inputs @ (weight * ~keep).T).square().sum()
    for number in range(2**8):
        other = torch.tensor([[bool(number >> i & 1) for i in range(8)]])
        if int(other.sum()) == 4:
            assert error <= (inputs @ (weight * ~other).T).square().sum() + 1e-6


def whole(model, rows):
    """Forward passes of the whole model."""
    return [(b.attention_mask, partial(model, **b.inputs, use_cache=False)) for b in batches(rows, 0)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_walk_shows_each_layer_what_the_whole_model_would(family):
    """Also where layers are changed on the way, and where they differ in kind; nothing stays behind."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    rows = [Row("d", "x", i, list(range(1, 4 + 9 * i))) for i in range(3)]
    layers = decoder_layers(model)[2]
    walk = Walk(model, rows, pad=0)
    for i, layer in enumerate(layers):
        linears = layer_matrices(layer)
        if not linears:
            pytest.skip("its layers have no linear modules")
        norms_of_layer = walk.norms(i, linears)
        for name, norm in input_norms(linears, whole(model, rows)).items():
            torch.testing.assert_close(norms_of_layer[name], norm, rtol=0, atol=0)
        for module in linears.values():
            module.weight.data *= 0.5
        walk.leave(i)
    assert "forward" not in vars(layers[0])


def test_norms_leave_padding_out():
    """One batch with padding gives the norms of the rows taken one by one."""
    model = tiny_model(64)
    rows = [Row("d", "x", i, list(range(1, 4 + 5 * i))) for i in range(3)]
    name = "model.layers.1.mlp.down_proj"
    modules = {name: model.get_submodule(name)}
    together = input_norms(modules, whole(model, rows))[name]
    alone = sum(input_norms(modules, whole(model, [row]))[name].square() for row in rows).sqrt()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


class Flat(nn.Module):
    """Some families put all tokens in one row before a linear layer, or show it some of them only."""

    def __init__(self, take=slice(None)):
        super().__init__()
        self.linear, self.take = nn.Linear(4, 4), take

    def forward(self, input_ids, attention_mask, use_cache):
        self.linear(nn.functional.one_hot(input_ids % 4, 4).float().flatten(0, 1)[self.take])


def test_norms_of_tokens_in_one_row():
    rows = [Row("d", "x", i, list(range(1, 4 + 5 * i))) for i in range(3)]
    model = Flat()
    seen = torch.cat([torch.tensor(row.tokens) % 4 for row in rows])
    norm = input_norms({"linear": model.linear}, whole(model, rows))["linear"]
    torch.testing.assert_close(norm, torch.bincount(seen, minlength=4).float().sqrt())
    model = Flat(slice(3))
    with pytest.raises(UserError, match=r"inputs of linear: \(3, 4\), of \d+ tokens"):
        input_norms({"linear": model.linear}, whole(model, rows))


def test_the_rows_that_a_saved_model_is_compared_on_are_not_packed():
    """Whoever loads it gives it plain rows."""
    rows = [Row("d", "x", i, list(range(1, 6 + i))) for i in range(4)]
    packed = list(pack(rows, 16))
    assert any(row.packed for row in packed)
    batch = check_batch(packed, 0)
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert [row.tokens[: row.parts[0][0]] for row in packed] == [
        ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
