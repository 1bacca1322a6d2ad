"""How near two computations of one model can be."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from compress.calibration import LEAST_ALLOWED, allowed_difference, log_probs, rounding_error
from eval.core.documents import Batch
from tests.helpers import tiny_model


@pytest.fixture
def batch():
    ids = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))
    return Batch([], [], [], ids, torch.ones_like(ids))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=320, n_positions=64)).eval()


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_rounding_is_what_separates_float32_from_float64(batch, make):
    model = make()
    before = log_probs(model, batch)
    error = rounding_error(model, batch)
    assert torch.equal(log_probs(model, batch), before), "the model is as it was"
    assert 0 < error < 1e-5
    with torch.no_grad():
        exact = torch.log_softmax(model.double()(**batch.inputs).logits, -1)
    assert float((exact - before).abs().max()) < 20 * error, "of the size of the whole error"
    assert rounding_error(model, batch) == 0, "in float64 nothing is left to round"


def test_a_deeper_model_may_differ_by_more(batch):
    shallow, deep = (
        rounding_error(tiny_model(num_hidden_layers=n, initializer_range=0.2), batch) for n in (1, 30)
    )
    assert deep > 2 * shallow
    assert allowed_difference(0.0) == LEAST_ALLOWED < allowed_difference(1e-3)
