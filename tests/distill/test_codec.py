"""Draws are unbiased, belong to their row alone, and fit into few bytes."""

import numpy as np
import pytest
import torch

from distill.losses.divergences import DIVERGENCES, TOP_K_DIVERGENCES, distillation_loss
from distill.models.generation import inverse_cdf, uniforms
from distill.teachers.codec import draw_ids, make_codec, pack_ids, packed_bytes, unpack_ids
from eval.core.sections import Loss, Targets


def distribution(vocabulary, sharpness, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(sharpness * torch.randn(tokens, vocabulary, generator=generator), -1)


def drawn(log_probs, draws=50, key="row", **how):
    return draw_ids(log_probs, torch.from_numpy(uniforms(key, len(log_probs), draws)), **how)


@pytest.mark.parametrize("sharpness", [0.0, 2.0, 6.0, 100.0])
@pytest.mark.parametrize(
    ("vocabulary", "draws"), [(1000, 50), (32000, 50), (151936, 50), (7, 50), (50, 1), (300, 300)]
)
def test_packed_draws_come_back_as_they_were(vocabulary, draws, sharpness):
    ids = drawn(distribution(vocabulary, sharpness, tokens=20), draws)[0].numpy()
    packed, distinct = pack_ids(ids, vocabulary)
    assert len(packed) == packed_bytes(distinct, draws, vocabulary).sum()
    unpacked, counts = unpack_ids(packed, distinct, draws, vocabulary)
    assert np.array_equal([len(set(row)) for row in ids.tolist()], distinct)
    for row, some, times in zip(ids, unpacked, counts.astype(int), strict=True):
        assert np.array_equal(np.repeat(some, times), row)


def test_ends_of_the_vocabulary_are_packed():
    for ids in ([0] * 50, [999] * 50, [*[0] * 49, 999], list(range(50)), list(range(950, 1000))):
        row = np.array([ids])
        unpacked, counts = unpack_ids(*pack_ids(row, 1000), 50, 1000)
        assert np.array_equal(np.repeat(unpacked[0], counts[0].astype(int)), row[0])


@pytest.mark.parametrize(("vocabulary", "most"), [(1000, 45), (1024, 45), (32000, 76), (32768, 76)])
def test_no_distribution_needs_more_bytes(vocabulary, most):
    assert packed_bytes(np.arange(1, 51), 50, vocabulary).max() == most


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_of_draws_is_the_distribution_at_that_temperature(temperature):
    """z per id against the largest variance that draws may have, that of independent ones."""
    log_probs, tokens, draws = distribution(30, 2.0, tokens=1), 4000, 50
    ids, entropy = drawn(log_probs.expand(tokens, -1), draws, temperature=temperature)
    wanted = torch.softmax(log_probs[0].double() / temperature, -1)
    share = torch.bincount(ids.flatten(), minlength=30).double() / ids.numel()
    z = (share - wanted) / (wanted * (1 - wanted) / ids.numel()).sqrt()
    assert float(z.abs().max()) < 4
    # At a temperature a little higher the same shares are far off.
    other = torch.softmax(log_probs[0].double() / (temperature * 1.15), -1)
    assert float(((share - other) / (other * (1 - other) / ids.numel()).sqrt()).abs().max()) > 10
    assert float(entropy[0]) == pytest.approx(float(torch.special.entr(wanted).sum()), rel=1e-5)


def test_a_sum_over_draws_varies_less_than_with_independent_ones():
    log_probs, tokens, draws = distribution(30, 1.0, tokens=1), 2000, 50
    ids, _ = drawn(log_probs.expand(tokens, -1), draws)
    p = log_probs[0].exp()
    value = torch.randn(30, generator=torch.Generator().manual_seed(1))
    independent = float((p * value**2).sum() - (p * value).sum() ** 2) / draws
    assert float(value[ids].mean(1).var()) < 0.5 * independent


def test_ids_of_probability_zero_are_never_drawn():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0, 0.0]])
    points = torch.tensor([[0.0, 0.2499, 0.25, 0.9999, 1.0]])
    assert inverse_cdf(weights, points).tolist() == [[1, 1, 3, 3, 3]]


def test_a_key_alone_decides_the_numbers():
    assert np.array_equal(uniforms("a", 3, 5), uniforms("a", 3, 5))
    assert not np.array_equal(uniforms("a", 3, 5), uniforms("b", 3, 5))
    assert np.array_equal(uniforms("a", 6, 5)[:3], uniforms("a", 3, 5))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("form", ["dense", "sampled", "top_k"])
@pytest.mark.parametrize("masked", [-1e9, -7e4, -65519.0, float(torch.finfo(torch.float32).min)])
def test_ids_that_a_method_masks_leave_losses_and_gradients_finite(form, name, masked):
    """-1e9 is -inf in fp16, and 0 times -inf no number; the loss is that of the distribution without them."""
    if name not in {"dense": DIVERGENCES, "sampled": ("forward_kl",), "top_k": TOP_K_DIVERGENCES}[form]:
        return
    rest = distribution(24, 2.0)
    log_probs = torch.cat([torch.full((len(rest), 8), masked), rest], 1)
    codec = make_codec(Targets(form=form, k=28, draws=400), 32, 1.0)
    columns = codec.encode(log_probs, "row")
    assert all(np.isfinite(values).all() for values in columns.values())
    target = codec.decode(columns)
    logits = torch.randn(len(rest), 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = distillation_loss(
        logits,
        rest.argmax(-1) + 8,
        getattr(target, "log_probs", target) if form == "dense" else target,
        Loss(divergence=name, weight=0.5),
    )
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(logits.grad).all())
    if name == "forward_kl":
        student = torch.log_softmax(logits.detach(), -1)
        kl = (rest.exp() * (rest - student[:, 8:])).sum()
        hard = -student.gather(1, (rest.argmax(-1) + 8)[:, None]).sum()
        assert float(loss.detach()) == pytest.approx(float(0.5 * (kl + hard)), rel=0.01)


def test_a_large_table_is_drawn_from_in_parts(monkeypatch):
    log_probs = distribution(100, 2.0)
    whole = drawn(log_probs)
    monkeypatch.setattr("distill.teachers.codec.MAX_ENTRIES", 300)
    parts = drawn(log_probs)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
