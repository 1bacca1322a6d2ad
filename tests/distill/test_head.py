"""Heads of model families: hidden states from any forward pass, and logits that are the model's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from distill.models.lm_head import (
    CAPS,
    SCALES,
    Head,
    capture_input,
    capture_layers,
    check_head,
    head_of,
    output_embedding,
)
from distill.trainer.module import DistillationModule
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.sections import Loss, Train
from tests.helpers import tiny_model

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "vocab_size": 96,
    **{f"{name}_token_id": 0 for name in ("bos", "eos", "pad")},
}
# What is particular to the last step of a family: scale, soft cap, bias, another name, tied weights.
FAMILIES = {
    "llama": {},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "lru_width": 32, "attention_window_size": 16},
}


def family(kind):
    torch.manual_seed(0)
    fields = (
        SMALL if kind != "gpt2" else {k: v for k, v in SMALL.items() if k == "vocab_size" or "token" in k}
    )
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **{**fields, **FAMILIES[kind]})
    ).eval()
    with torch.no_grad():  # large logits, so that a cap or a scale that is left out shows
        output_embedding(model).weight.mul_(20)
    return model


def batch():
    return collate([Row("a", "x", 0, list(range(1, 12))), Row("b", "x", 0, [5, 6, 7])], 0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_has_its_own_logits_and_its_own_gradient(kind):
    model, some = family(kind), batch()
    check_head(model, some)
    labels, valid = some.labels[some.mask], some.mask
    logits = model(**some.inputs, use_cache=False).logits[:, :-1][valid]
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss = DistillationModule(model, Train(rows=1, loss=Loss()))(some, None)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    parameters = dict(model.named_parameters())
    for mine, plain in zip(
        torch.autograd.grad(loss, list(parameters.values())),
        torch.autograd.grad(wanted, list(parameters.values())),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, atol=1e-4 * float(plain.abs().max() + 1e-3), rtol=1e-3)


@pytest.mark.parametrize("field", [*SCALES, *CAPS])
def test_a_last_step_that_the_config_does_not_describe_is_refused(field):
    """A model whose forward pass leaves out what its config names, as one of another kind would."""
    model = tiny_model()
    setattr(model.config, field, 0.5)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    with pytest.raises(UserError, match="model type 'llama': its logits differ by"):
        check_head(model, batch())


def test_only_a_linear_output_embedding_is_known():
    model = tiny_model()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="its output embedding is Sequential"):
        head_of(model)


def test_a_tap_leaves_nothing_behind_and_a_wrapped_model_is_tapped_too():
    model, some = tiny_model(), batch()
    plain = model(**some.inputs, use_cache=False).logits.detach()
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny_model(), lora)
    for one in (model, wrapped):
        with capture_input(output_embedding(one)) as seen, torch.no_grad():
            handed = one(**some.inputs, use_cache=False).logits
            assert torch.equal(handed, seen[0])
            assert handed.shape == (*some.input_ids.shape, 64)
        torch.testing.assert_close(one(**some.inputs, use_cache=False).logits.detach(), plain)
        assert "forward" not in vars(output_embedding(one))
    check_head(wrapped, some)
    loss = DistillationModule(wrapped, Train(rows=1))(some, None)
    loss.backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)


def test_a_watched_model_leaves_its_layers_whatever_calls_it():
    model, some = tiny_model(), batch()
    plain = model(**some.inputs, use_cache=False, output_hidden_states=True)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    for call in (model, get_peft_model(model, lora)):
        with capture_layers(model, [0, 2]) as seen, torch.no_grad():
            call(**some.inputs, use_cache=False)
        torch.testing.assert_close(seen, [plain.hidden_states[0], plain.hidden_states[2]])
    with (
        pytest.raises(UserError, match=r"the teacher has no layer 3; choose layers from 0 .* to 2"),
        capture_layers(model, [3]),
    ):
        model(**some.inputs, use_cache=False)
    assert "forward" not in vars(model)


def test_bfloat16_products_are_made_and_left_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (5, 9))
    logits = Head(weight)(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), hidden.double() @ weight.double().T, atol=1e-4, rtol=1e-5)
    assert float((logits - (hidden @ weight.T).float()).abs().max()) > 1e-3, "bf16 would have rounded"
