"""Hidden-state matching, and how the forward pass is run: in bf16, compiled."""

from functools import partial

import numpy as np
import pytest
import torch

from distill.losses.teacher_output import Sampled
from distill.method import plain_output
from distill.models.lm_head import capture_layers
from distill.trainer.loop import train
from distill.trainer.module import DistillationModule, layer_widths, state_distance
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.sections import Hidden, Loss, Optimizer, Train
from tests.distill.test_loop import Stopped, row_teacher, rows
from tests.helpers import tiny_model

PAIRS = [(1, 1), (2, 2)]


def live(model, layers):
    """A running teacher that gives the hidden states of its layers too."""

    @torch.no_grad()
    def teach(batch):
        places = torch.nn.functional.pad(batch.mask, (0, 1))
        with capture_layers(model, layers) as seen:
            output = plain_output(model, batch=batch)
        return type(output.select(places))(
            **{**vars(output.select(places)), "layers": tuple(layer[places] for layer in seen)}
        )

    return teach


def settings(distance="mse", **more):
    loss = Loss(weight=0.5, hidden=Hidden(pairs=PAIRS, distance=distance, weight=3.0))
    return Train(rows=4, loss=loss, **more)


def reference(student, teacher, kind):
    one, other = student.double().numpy(), teacher.double().numpy()
    if kind == "mse":
        return ((one - other) ** 2).mean(-1).sum()
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    lengths = np.maximum(lengths, 1e-8)  # the embedding of the padding token is zero
    return (1 - (one * other).sum(-1) / lengths).sum()


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_distances_are_the_float64_sums(kind):
    one, other = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    assert float(state_distance(one, other, kind)) == pytest.approx(
        float(reference(one, other, kind)), rel=1e-5
    )
    assert float(state_distance(one, one, kind)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_paired_layers_are_matched_at_the_valid_tokens(kind):
    student, teacher, batch = tiny_model(), tiny_model(seed=1), collate(rows(3), 0)
    teach = live(teacher, [1, 2])
    target = teach(batch)
    without = DistillationModule(student, Train(rows=4, loss=Loss(weight=0.5)))(batch, target)
    loss = DistillationModule(student, settings(kind), layer_widths(target, settings()))(batch, target)
    states = [m(**batch.inputs, output_hidden_states=True).hidden_states for m in (student, teacher)]
    wanted = sum(
        reference(*(s[layer][:, :-1][batch.mask].detach() for s in states), kind) for layer in (1, 2)
    )
    assert float((loss - without).detach()) == pytest.approx(3 * float(wanted), rel=1e-4)


def test_a_projector_is_learned_saved_and_left_behind(tmp_path):
    teach = live(tiny_model(seed=1, hidden_size=32, num_attention_heads=2), [1, 2])
    config = settings(steps=6, checkpoint_every=2, optimizer=Optimizer(lr=0.01))
    results = []
    for stop_at in (None, 5):
        model = tiny_model()

        def report(step, stop_at=stop_at):
            if step.number == stop_at:
                raise Stopped

        how = {"pad": 0, "seed": 1, "teacher": teach, "scratch": tmp_path / str(stop_at)}
        try:
            curve = train(model, rows(), config, report=report, **how)
        except Stopped:
            model = tiny_model(seed=9)
            curve = train(model, rows(), config, **how)
        results.append((curve, model.state_dict()))
    assert results[0][0] == results[1][0], "a stopped run goes on with the projectors that it had"
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])
    assert list(results[0][1]) == list(tiny_model().state_dict()), "no projector in the student"
    assert results[0][0][-1][1] < results[0][0][0][1]


def test_projectors_stand_where_widths_differ_alone():
    module = DistillationModule(tiny_model(), settings(), [64, 32])
    shapes = {name: tuple(p.shape) for name, p in module.projectors.named_parameters()}
    assert shapes == {"1.weight": (32, 64)}


def test_targets_without_hidden_states_are_refused(tmp_path):
    how = {"pad": 0, "seed": 0, "scratch": tmp_path}
    with pytest.raises(
        UserError, match=r"train\.loss\.hidden: set, but the targets contain no hidden states; .*online"
    ):
        train(tiny_model(), rows(), settings(), teacher=row_teacher, **how)
    few = Sampled(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.zeros(1), 1.0)
    with pytest.raises(UserError, match="the targets contain no hidden states"):
        layer_widths(few, settings())


def test_a_layer_that_the_student_does_not_have_is_refused():
    teacher, batch = tiny_model(seed=1), collate(rows(2), 0)
    target = live(teacher, [1])(batch)
    config = Train(rows=4, loss=Loss(hidden=Hidden(pairs=[(3, 1)])))
    with pytest.raises(UserError, match=r"the student has no layer 3; choose layers from 0 .* to 2"):
        DistillationModule(tiny_model(), config, [64])(batch, target)


def gradient(module, batch, target):
    module.zero_grad()
    loss = module(batch, target)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in module.parameters()])


def test_bf16_is_the_forward_pass_alone():
    """Weights, gradients and losses stay in float32; the loss is that of bf16 activations and no more."""
    batch = collate(rows(4), 0)
    target = row_teacher(batch)
    loss, slope = gradient(DistillationModule(tiny_model(), Train(rows=4)), batch, target)
    narrow, rounded = gradient(
        DistillationModule(tiny_model(), Train(rows=4, precision="bf16")), batch, target
    )
    assert narrow != loss
    assert narrow == pytest.approx(loss, rel=2e-3)
    assert rounded.dtype == torch.float32
    assert float((rounded - slope).norm() / slope.norm()) < 0.02


def test_a_compiled_student_learns_the_same(monkeypatch):
    """Traced whole by dynamo and run by torch's own kernels: inductor would take half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    batch = collate(rows(4), 0)
    target = row_teacher(batch)
    loss, slope = gradient(DistillationModule(tiny_model(), Train(rows=4)), batch, target)
    module = DistillationModule(tiny_model(), Train(rows=4, compile=True))
    for _ in range(2):
        value, mine = gradient(module, batch, target)
        assert value == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(mine, slope)
    assert module.model(**batch.inputs).logits.shape[-1] == 320, "its own forward pass is as it was"
