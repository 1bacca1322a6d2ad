"""Heads of later tokens: their loss against float64 by hand, exact over accumulation, gone afterwards."""

import pytest
import torch

from distill.trainer.loop import train
from distill.trainer.module import DistillationModule
from eval.core.documents import Row, collate, join_rows
from eval.core.sections import Future, Optimizer, Train
from tests.distill.test_loop import rows
from tests.helpers import tiny_model

TWO = Train(rows=4, future=Future(tokens=2, weight=0.25))


@torch.no_grad()
def by_hand(module, some):
    """Summed loss, token by token, float64: of the next token, and of those after it in the same document."""
    total = 0.0
    for row in some:
        with torch.no_grad():
            hidden = module.model.model(torch.tensor([row.tokens])).last_hidden_state[0].double()
        head = module.model.lm_head.weight.double()
        for ahead, weight in enumerate((1.0, 0.25, 0.25)):
            for place in range(len(row.tokens) - 1 - ahead):
                if place + 1 + ahead <= row.given:
                    continue
                state = hidden[place]
                if ahead:
                    block = module.future_heads[ahead - 1].block.double()
                    state = state + torch.nn.functional.silu(block(state))
                    block.float()
                logits = head @ state
                total -= weight * float(logits.log_softmax(-1)[row.tokens[place + 1 + ahead]])
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_is_that_by_hand(packed):
    torch.manual_seed(0)
    module = DistillationModule(tiny_model(), TWO).train()
    for head in module.future_heads:
        torch.nn.init.normal_(head.block.weight, std=0.1)
    some = [
        Row("a", "x", 0, [0, 5, 9, 11, 30, 7], given=2),
        Row("b", "x", 0, [0, 8, 9]),
        Row("c", "x", 0, [0, 4]),
    ]
    batch = collate([join_rows(some)] if packed else some, 0)
    assert float(module(batch, None).detach()) == pytest.approx(by_hand(module, some), rel=1e-5)
    assert float(module.eval()(batch, None).detach()) < by_hand(module, some), (
        "validation has the next token alone"
    )


def test_it_is_exact_over_accumulation_and_the_heads_are_gone_afterwards(tmp_path):
    trained = []
    for accumulate in (1, 2):
        config = TWO.model_copy(
            update={"accumulate": accumulate, "steps": 3, "optimizer": Optimizer(name="adamw", lr=0.01)}
        )
        model = tiny_model()
        names = [name for name, _ in model.named_modules()]
        train(model, rows(), config, pad=0, seed=0, teacher=None, scratch=tmp_path / str(accumulate))
        assert [name for name, _ in model.named_modules()] == names
        trained.append(model.state_dict())
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], atol=2e-5, rtol=0)


def test_the_heads_learn_and_reach_the_trunk(tmp_path):
    """The same training without them ends elsewhere; a block that was zero is not any more."""
    ends = []
    for future in (None, TWO.future):
        config = Train(rows=4, steps=3, optimizer=Optimizer(name="adamw", lr=0.01), future=future)
        model = tiny_model()
        train(model, rows(), config, pad=0, seed=0, teacher=None, scratch=tmp_path / str(future is None))
        ends.append(model.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(*ends)
    module = DistillationModule(tiny_model(), TWO).train()
    module(collate(rows(), 0), None).backward()
    assert all(float(head.block.weight.grad.abs().max()) > 0 for head in module.future_heads)
