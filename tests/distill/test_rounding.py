"""What rounding explains in a model: of the size of its error, and the measure of what is compared."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from distill.models.lm_head import check_head
from distill.models.packing import check_packing
from distill.models.rounding import ROUNDINGS_ALLOWED, rounding_noise
from eval.core.documents import Row, collate, join_rows
from eval.core.errors import UserError
from tests.distill.test_families import GROUPED
from tests.helpers import tiny_model

IDS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))
ROWS = [Row(f"d{i}", "x", 0, row) for i, row in enumerate(IDS.tolist())]


def farthest(one, other):
    return float((one - other).abs().max())


def answer(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float()


def noise(model):
    return rounding_noise(model, lambda: answer(model), answer(model), farthest)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=320, n_positions=64)).eval()


@pytest.mark.parametrize("make", [tiny_model, gpt2])
def test_noise_is_of_the_size_of_what_rounding_does(make):
    model = make()
    before, error = answer(model), noise(model)
    assert torch.equal(answer(model), before), "the model is as it was"
    assert noise(model) == error, "by the same chance each time"
    exact = model.double()(IDS).logits.float().detach()
    assert 0.2 * error < farthest(before, exact) < 20 * error
    model = make().to(torch.bfloat16)
    assert 0.2 * noise(model) < farthest(answer(model), exact) < 20 * noise(model)


def test_a_deeper_model_has_more_of_it():
    shallow, deep = (noise(tiny_model(num_hidden_layers=n, initializer_range=0.2)) for n in (1, 30))
    assert deep > 2 * shallow


def test_packing_is_judged_by_the_rounding_of_the_model_itself():
    """A deep model of 16 bits is further from itself than a leak of a short convolution in float32 is."""
    deep = tiny_model(num_hidden_layers=30, initializer_range=0.2).to(torch.bfloat16)
    packed = join_rows(ROWS)
    check_packing(deep, [packed], 0)
    apart = [
        deep(**collate(rows, 0).inputs, use_cache=False).logits.float().flatten(0, 1).detach()
        for rows in ([packed], ROWS)
    ]
    torch.manual_seed(0)
    config = AutoConfig.for_model("lfm2", **GROUPED, full_attn_idxs=[1], block_multiple_of=16)
    leaking = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(
        UserError, match=r"in a lfm2 \(logits differ by (.*), rounding explains .*e-07\)"
    ) as told:
        check_packing(leaking, [packed], 0)
    leak = float(str(told.value).split("differ by ")[1].split(",")[0])
    assert ROUNDINGS_ALLOWED * noise(deep) > farthest(*apart) > 10 * leak > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_is_held_against_its_own_rounding(dtype):
    model, batch = tiny_model().to(dtype), collate(ROWS, 0)
    check_head(model, batch)
    model.config.logit_scale = 1 + 100 * torch.finfo(dtype).eps  # 1e-5 in float32
    with pytest.raises(UserError, match=r"differ by .* \(rounding explains .*; use a base of another family"):
        check_head(model, batch)
