"""The chunked loss against the plain one: value and gradient, every form of target, every kind of head."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.losses import chunked
from distill.losses.chunked import chunked_loss
from distill.losses.divergences import DIVERGENCES, distillation_loss
from distill.losses.teacher_output import Dense, Sampled, States, TopK, match_vocabulary
from distill.models.lm_head import Head
from eval.core.errors import UserError
from eval.core.sections import Loss

TOKENS, WIDTH, VOCAB = 23, 8, 37


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 5 tokens and blocks of 2, so that neither divides what it is a part of."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 5 * 4 * VOCAB)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 2 * 4 * VOCAB)
    monkeypatch.setattr(chunked, "SUM_BYTES", 3 * 4 * WIDTH)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HEADS = {
    "plain": {},
    "bias": {"bias": noise(VOCAB, seed=3)},
    "scale": {"scale": 0.25},
    "cap": {"cap": 2.0},
    "all": {"bias": noise(VOCAB, seed=3), "scale": 1.5, "cap": 3.0},
}


def teacher_states(heads=2):
    return States(
        [noise(TOKENS, 6 + k, seed=10 + k) for k in range(heads)],
        [Head(noise(VOCAB, 6 + k, seed=20 + k)) for k in range(heads)],
    )


def targets(temperature=1.0):
    log_probs = teacher_states().log_softmax(0, TOKENS)
    values, top = log_probs.topk(5, -1)
    ids = torch.multinomial(noise(TOKENS, VOCAB, seed=4).exp(), 6)
    counts = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, 0.0]).expand(TOKENS, 6)
    return {
        "labels": None,
        "dense": Dense(log_probs),
        "half": Dense(log_probs.half()),
        "states": teacher_states(),
        "one state": teacher_states(1),
        "sampled": Sampled(ids, counts, torch.ones(TOKENS), temperature),
        "top_k": TopK(top, values),
    }


def both(head, target, config, dtype=torch.float32):
    """Loss and gradients, plain and chunked, of one student."""
    results, plain_target = [], target
    if isinstance(target, Dense | States):
        plain_target = target.log_softmax(0, TOKENS)
    labels = torch.arange(TOKENS) % VOCAB
    for whole in (True, False):
        leaves = {"hidden": noise(TOKENS, WIDTH), "weight": noise(VOCAB, WIDTH, seed=1), **head}
        leaves = {
            n: v.to(dtype).requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in leaves.items()
        }
        hidden = leaves.pop("hidden")
        tensors = [hidden, *(v for v in leaves.values() if isinstance(v, torch.Tensor))]
        linear = Head(**leaves)
        if whole:
            loss = distillation_loss(linear(hidden), labels, plain_target, config)
        else:
            loss = chunked_loss(hidden, linear, labels, target, config)
        results.append([loss.detach(), *torch.autograd.grad(loss / 7, tensors)])
    return results


def agree(results, **tolerance):
    for plain, mine in zip(*results, strict=True):
        assert plain.dtype == mine.dtype
        torch.testing.assert_close(mine, plain, **(tolerance or {"atol": 2e-5, "rtol": 2e-4}))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("form", targets())
def test_same_value_and_gradient_for_every_form_and_head(form, kind):
    agree(both(HEADS[kind], targets()[form], Loss()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_same_value_and_gradient_for_every_objective(name, weight, temperature):
    config = Loss(divergence=name, weight=weight, temperature=temperature)
    for form in ("states", "dense", *(["sampled"] if name == "forward_kl" else [])):
        agree(both(HEADS["all"], targets(temperature)[form], config))


def relative_error(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["labels", "states", "sampled"])
def test_half_precision_has_the_value_and_gradient_of_float32(form, dtype):
    """16-bit states, far from zero as a model's are, and weights, against the same numbers in float32."""
    target, labels = targets()[form], torch.arange(TOKENS) % VOCAB
    hidden = (noise(TOKENS, WIDTH) + 10 * noise(WIDTH, seed=9)).to(dtype)
    narrow = [hidden, noise(VOCAB, WIDTH, seed=1).to(dtype), noise(VOCAB, seed=3).to(dtype)]
    results = []
    for leaves in (narrow, [leaf.float() for leaf in narrow]):
        states, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
        loss = chunked_loss(states, Head(weight, bias, 1.5, 3.0), labels, target, Loss())
        results.append((loss.detach(), torch.autograd.grad(loss / 7, [states, weight, bias])))
    (value, gradients), (wanted, exact) = results
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(wanted), rel=2e-3)
    for gradient, leaf, right in zip(gradients, narrow, exact, strict=True):
        assert gradient.dtype == leaf.dtype
        assert relative_error(gradient.float(), right) < 2 * torch.finfo(dtype).eps


def test_a_centred_head_leaves_a_cpu_less_to_round():
    """The same logits; of what a product in bf16 rounds, the part that all tokens share is left out."""
    hidden, head = noise(TOKENS, WIDTH) + 10 * noise(WIDTH, seed=9), Head(noise(VOCAB, WIDTH, seed=1))
    exact = head(hidden)
    moved, centred = head.centred(hidden)
    torch.testing.assert_close(moved(centred), exact)
    hidden, head = hidden.bfloat16(), replace(head, weight=head.weight.bfloat16())
    exact = head(hidden)
    moved, centred = head.centred(hidden)
    better, plain = moved(centred), replace(head, rounded=True)(hidden)
    assert better.dtype == plain.dtype == torch.float32
    assert relative_error(better, exact) < 0.5 * relative_error(plain, exact)


def test_tied_weights_get_the_sum_of_both_gradients():
    grads, ids = [], torch.arange(TOKENS) % VOCAB
    for whole in (True, False):
        weight = noise(VOCAB, WIDTH, seed=1).requires_grad_()
        hidden, head = torch.tanh(weight[ids]), Head(weight)
        if whole:
            loss = distillation_loss(head(hidden), ids, targets()["dense"].log_probs, Loss())
        else:
            loss = chunked_loss(hidden, head, ids, targets()["dense"], Loss())
        grads.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*grads, atol=2e-5, rtol=2e-4)


def test_a_frozen_head_costs_no_gradient_of_its_own():
    hidden, head = noise(TOKENS, WIDTH).requires_grad_(), Head(noise(VOCAB, WIDTH, seed=1))
    loss = chunked_loss(hidden, head, torch.arange(TOKENS), teacher_states(), Loss())
    loss.backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


def test_without_gradients_none_of_the_head_is_made():
    """As in validation during training: for a large vocabulary it is larger than all the rest."""

    class Gradients(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.zeros_like.default and out.shape == (VOCAB, WIDTH):
                self.made += 1
            return out

    hidden, weight = noise(TOKENS, WIDTH).requires_grad_(), noise(VOCAB, WIDTH, seed=1).requires_grad_()
    values = []
    for wanted in (1, 0):
        with Gradients() as gradients, torch.set_grad_enabled(bool(wanted)):
            loss = chunked_loss(hidden, Head(weight), torch.arange(TOKENS), None, Loss())
        values.append(float(loss.detach()))
        assert gradients.made == wanted
    assert values[0] == values[1]


@pytest.mark.parametrize("form", ["labels", "states", "sampled"])
def test_no_tensor_of_all_tokens_and_all_ids_is_made(form):
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == VOCAB:
                self.rows = max(self.rows, out.shape[0])
            return out

    hidden, weight = noise(TOKENS, WIDTH).requires_grad_(), noise(VOCAB, WIDTH, seed=1).requires_grad_()
    target = targets()[form]
    with Largest() as largest:
        chunked_loss(hidden, Head(weight), torch.arange(TOKENS), target, Loss()).backward()
    assert 5 <= largest.rows <= WIDTH  # of a chunk; or of a head's matrix, turned


def test_padding_of_the_teachers_vocabulary_costs_nothing():
    """Identical models, the teacher's head padded: 0, not the 0.39 of a peer; what lies under it is cut."""
    hidden, weight = noise(TOKENS, WIDTH), noise(VOCAB, WIDTH, seed=1)
    padded = torch.cat([weight, noise(11, WIDTH, seed=5)])
    whole = States([hidden], [Head(padded)])
    for target in (whole, Dense(whole.log_softmax(0, TOKENS))):
        loss = chunked_loss(hidden, Head(weight), torch.arange(TOKENS), target, Loss(weight=1.0))
        assert float(loss) == pytest.approx(0.0, abs=1e-4)
    short, config = States([hidden], [Head(weight)]), Loss(divergence="reverse_kl")
    with pytest.raises(UserError, match=f"the student has {VOCAB + 11} rows, its teacher {VOCAB}"):
        chunked_loss(hidden, Head(padded), torch.arange(TOKENS), short, config)
    with pytest.raises(UserError, match="the targets contain id 36, but the student has 30 tokens"):
        match_vocabulary(TopK(torch.tensor([[36]]), torch.zeros(1, 1)), 30)


def test_mean_of_probabilities_survives_the_improbable():
    one, other = torch.tensor([[-1000.0, 0.0]]), torch.tensor([[0.0, -1000.0]])
    eye = Head(torch.eye(2))
    assert float(States([one, one], [eye, eye]).log_softmax(0, 1)[0, 0]) == -1000
    assert float(States([one, other], [eye, eye]).log_softmax(0, 1)[0, 0].exp()) == pytest.approx(0.5)


def test_a_batch_without_tokens_is_nothing():
    hidden = noise(0, WIDTH).requires_grad_()
    loss = chunked_loss(hidden, Head(noise(VOCAB, WIDTH)), torch.zeros(0, dtype=torch.int64), None, Loss())
    loss.backward()
    assert float(loss.detach()) == 0
