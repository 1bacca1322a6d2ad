"""Teachers that are trained anew: heads, another attention, a mixture of experts; each beside its control."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from distill.methods.mixture import upcycled, widened
from distill.models.export import export
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.sections import Train
from eval.engines.torch import load_model
from tests.distill.method_helpers import answer, make
from tests.helpers import SHAPE, tiny_model

TRAIN = {"rows": 4, "steps": 3, "optimizer": {"lr": 0.01}}


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("more", [{"future": {"tokens": 2}}, {"future": None, "exits": {"layers": [1]}}])
def test_heads_are_in_the_training_alone_and_in_the_control_not_at_all(more, context, rows):
    ends = []
    method = make("heads", train={**TRAIN, **more})
    for side, settings in ((method, method.settings.train), (method.control(), Train(**TRAIN))):
        side.fit(context)
        by_hand = context.load_base(0)
        context.train(by_hand, rows, settings, "by hand")
        ends.append(load_model(context.folder / "model"))
        assert same(ends[-1], by_hand)
        assert type(ends[-1]) is type(context.load_base(0))
        for left in (context.folder.parent / "scratch").rglob("*"):
            assert not left.is_file(), "checkpoints of one training must not be those of another"
    assert not same(*ends)


def test_heads_without_any_are_no_method():
    with pytest.raises(UserError, match=r"train\.exits` which layers do: one of them is the method"):
        make("heads", train={**TRAIN, "future": None})


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, tokenizer):
    """A base of two layers that attends to the four last tokens."""
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, vocab_size=320, sliding_window=4)
    folder = tmp_path_factory.mktemp("windowed")
    export(AutoModelForCausalLM.from_config(config).eval(), tokenizer, folder / "s0", "a card", [])
    return {0: folder / "s0"}


def test_a_teacher_that_sees_further_than_the_window_of_its_control(context, windowed, rows):
    context = replace(context, bases=windowed)
    method = make("attention", config={"sliding_window": None}, train=TRAIN)
    row, far = rows[2], []
    other = replace(row, tokens=[row.tokens[0], 300, *row.tokens[2:]])
    assert row.tokens[1] != 300
    for side in (method, method.control()):
        side.fit(context)
        teacher = load_model(windowed[0])
        with torch.no_grad(), side.attached(teacher, context):
            said, changed = (answer(side, teacher, collate([one], 0))[0, -1] for one in (row, other))
        far.append(float((said - changed).abs().max()))
    assert far[0] > 1e-4 > far[1] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sliding_windw": None}, "did you mean 'sliding_window'"),
        ({"hidden_size": 32}, "weights of the base do not fit"),
    ],
)
def test_fields_that_are_none_or_that_weights_depend_on_are_refused(config, message, context, windowed):
    with pytest.raises(UserError, match=message):
        make("attention", config=config).start(replace(context, bases=windowed))


def test_a_mixture_and_its_control_begin_as_the_base_and_use_as_many_weights():
    base = tiny_model().requires_grad_(False)
    ids = torch.randint(1, 320, (2, 20), generator=torch.Generator().manual_seed(0))
    mixture, dense = upcycled(base, 4, 2, seed=0), widened(base, 2, seed=0)
    for model in (mixture, dense):
        torch.testing.assert_close(model(ids).logits, base(ids).logits, atol=1e-5, rtol=0)
    experts = [p for n, p in mixture.named_parameters() if ".experts." in n]
    routers = [p for n, p in mixture.named_parameters() if n.endswith("mlp.gate.weight")]
    weights = sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in [*experts, *routers])
    active = weights + sum(p.numel() * 2 // 4 for p in experts)
    assert active == sum(p.numel() for p in dense.parameters())
    assert same(upcycled(base, 4, 2, seed=0), mixture)
    assert not same(upcycled(base, 4, 2, seed=1), mixture)


def test_experts_and_wide_units_become_different(context):
    """Copies that stayed copies would be no mixture and no wider model."""
    method = make("mixture", train=TRAIN)
    method.fit(context)
    experts = load_model(context.folder / "model").model.layers[0].mlp.experts.down_proj.detach()
    assert (
        min(float((one - other).abs().max()) for i, one in enumerate(experts) for other in experts[:i]) > 1e-3
    )
    method.control().fit(context)
    gate = load_model(context.folder / "model").model.layers[0].mlp.gate_proj.weight.detach()
    first, second = gate.chunk(2)
    assert float((first - second).abs().max()) > 1e-3


def test_other_families_cannot_be_made_a_mixture(context, tokenizer, tmp_path):
    from transformers import GPT2Config

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=320)
    export(AutoModelForCausalLM.from_config(config).eval(), tokenizer, tmp_path / "s0", "a card", [])
    with pytest.raises(UserError, match=r"gpt2.* cannot be made a mixture; use a base of llama or mistral"):
        make("mixture").fit(replace(context, bases={0: tmp_path / "s0"}))
