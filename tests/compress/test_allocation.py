"""Formats by an integer program: against a search through all, and what an export makes of them."""

import itertools

import numpy as np
import pytest
import torch

from compress.allocation import allocate, fits, grid_bytes, sensitivities
from compress.calibration import calibration_rows, log_probs
from compress.recipe import Grid
from compress.tensors.grid import round_to_grid
from eval.core.documents import batches
from tests.compress.student_run import build_student_run, context_of, model_of
from tests.compress.test_openvino import divergence, int4

GRIDS = [Grid(4, 64), Grid(4, 32), Grid(4, 16), Grid(8, -1)]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    study = build_student_run(tmp_path_factory.mktemp("study"), [], layers=2)
    return context_of(study, tmp_path_factory.mktemp("work"))


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_is_the_least_of_all_that_fit(seed):
    rng = np.random.default_rng(seed)
    costs = rng.exponential(size=(5, 4)) * np.array([8, 4, 2, 0.1])
    costs[1, 0], costs[3, 2] = np.inf, np.inf
    sizes = rng.uniform(1, 1.3, (5, 1)) * np.array([4.25, 4.5, 5, 8])
    budget = float(sizes[:, 1].sum())
    best = min(
        (
            choice
            for choice in itertools.product(range(4), repeat=5)
            if sum(sizes[i, j] for i, j in enumerate(choice)) <= budget
        ),
        key=lambda choice: sum(costs[i, j] for i, j in enumerate(choice)),
    )
    assert allocate(costs, sizes, budget) == list(best)
    assert (
        allocate(costs, sizes, float(sizes.sum()))
        == np.where(np.isfinite(costs), costs, 1e9).argmin(1).tolist()
    )


def test_bytes_are_levels_and_scales():
    assert grid_bytes(Grid(4, 64), 10, 128) == 10 * (64 + 2 * 2)
    assert grid_bytes(Grid(8, -1), 10, 128) == 10 * (128 + 2)
    assert [fits(Grid(4, size), 96) for size in (32, 64, -1)] == [True, False, True]


def test_a_sensitivity_is_the_divergence_of_the_model_with_that_matrix_rounded(context):
    model, rows = model_of(context), calibration_rows(context.rows, 4, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    name, shares = "model.layers.1.mlp.down_proj", []
    costs = sensitivities(
        model, ["model.layers.0.self_attn.q_proj", name], GRIDS, rows, context.pad, shares.append
    )
    assert shares == [0.5, 1.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (np.diff(costs, axis=1) < 0).all(), "smaller groups and more bits move less"
    rounded = model_of(context)
    weight = rounded.get_submodule(name).weight
    weight.data = round_to_grid(weight.data, 4, 32)
    total, tokens = 0.0, 0
    for batch in batches(rows, context.pad):
        p, q = (log_probs(one, batch)[:, :-1][batch.mask].double() for one in (model, rounded))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + len(p)
    assert costs[1, 1] == pytest.approx(total / tokens, rel=3e-2)  # float32 at 1e-6


def test_a_matrix_costs_the_layers_from_its_own_on_and_its_figures_stay(context):
    """Against the whole model for every matrix, which is what it is where all belong to the first layer."""
    model, rows = model_of(context), calibration_rows(context.rows, 4, 0)
    layers = model.model.layers
    names = [f"model.layers.{i}.mlp.{part}" for i in range(len(layers)) for part in ("up_proj", "down_proj")]
    runs = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *args: runs.append(1))
    how = ([*names, "lm_head"], GRIDS[:1], rows, context.pad, lambda share: None)
    costs, cheap = sensitivities(model, *how), len(runs)
    runs.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "compress.allocation._by_layer", lambda *args: [range(len(names) + 1)] + [[]] * len(layers)
        )
        whole = sensitivities(model, *how)
    np.testing.assert_allclose(costs, whole, rtol=1e-6)
    count = len(layers)
    assert len(runs) == count * (len(names) + 3), "the head, the model as it is, and what reaches each layer"
    assert cheap == count + sum(2 * (count - i) for i in range(count)) + count


def test_an_export_has_the_formats_that_were_chosen_and_is_nearer_at_the_same_bytes(context):
    uniform, plain = int4(context, group_size=32)
    chosen, report = int4(context, group_size=32, allocation="kl", rows=8)
    facts = report.facts
    assert facts["allocated_bytes"] <= facts["uniform_bytes"]
    assert facts["allocated_kl"] < facts["uniform_kl"]
    assert len(set(facts["grids"].values())) > 1
    for name, kind in facts["formats"].items():
        wanted = {"4": "i4", "8": "i8"}.get(facts["grids"].get(name, "")[:1], "u8")
        assert kind == wanted, name
    assert set(facts["formats"]) == set(plain.facts["formats"])
    assert report.after.bytes <= 1.002 * plain.after.bytes
    assert divergence(chosen, context) < divergence(uniform, context)
