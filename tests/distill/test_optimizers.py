"""Which weights go to which optimizer, what these do, and the learning rate of each step."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, get_cosine_schedule_with_warmup

from distill.trainer.loop import train
from distill.trainer.optimizers import build_optimizers, learning_rate_factor
from eval.core.sections import Optimizer, Train
from tests.distill.test_loop import row_teacher, rows
from tests.helpers import tiny_model


def test_schedule_warms_up_stays_and_decays_to_zero():
    config = Train(warmup=0.1, decay=0.5)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:50] == [1.0] * 40
    assert factors[-1] == pytest.approx(1 / 50)


def test_the_cosine_is_that_of_transformers_after_a_warm_up_that_starts_above_zero():
    config, weight = Train(warmup=0.1, schedule="cosine"), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(100):
        wanted = optimizer.param_groups[0]["lr"]
        factor = learning_rate_factor(step, 100, config)
        assert factor == pytest.approx(wanted if step >= 10 else wanted + 0.1)
        optimizer.step()
        schedule.step()


def names_of_groups(model, **optimizer):
    """(optimizer, rate, decay) -> names of its weights."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizers = build_optimizers(model, Train(optimizer=Optimizer(weight_decay=0.1, **optimizer)))
    return {
        (type(o).__name__, group["lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for o in optimizers
        for group in o.param_groups
    }


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_routers_experts_and_ends_go_to_their_group(name):
    config = Qwen2MoeConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        num_experts=6, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    groups = names_of_groups(model, name=name, lr=0.02, lr_rest=0.001)
    experts = {n for n, p in model.named_parameters() if p.ndim == 3}
    router = {f"model.layers.0.mlp.{name}.weight" for name in ("gate", "shared_expert_gate")}
    assert experts
    rest = groups[("AdamW", 0.001, 0.1)]
    assert {"model.embed_tokens.weight", "lm_head.weight"} | router <= rest
    assert all(p.ndim < 2 for n, p in model.named_parameters() if n in groups[("AdamW", 0.001, 0.0)])
    matrices = groups[("Muon" if name == "muon" else "AdamW", 0.02, 0.1)]
    assert "model.layers.0.self_attn.q_proj.weight" in matrices
    assert experts <= matrices
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_adapters_are_matrices_whatever_their_rank():
    adapted = get_peft_model(tiny_model(), LoraConfig(r=1, target_modules="all-linear"))
    groups = names_of_groups(adapted, name="adamw", lr=0.02, lr_rest=0.001)
    assert set(groups) == {("AdamW", 0.02, 0.1)}
    assert len(groups[("AdamW", 0.02, 0.1)]) == sum(p.requires_grad for p in adapted.parameters())


def test_moments_of_8_bits_train_as_those_of_32(tmp_path):
    pytest.importorskip("bitsandbytes")
    weights, start = {}, tiny_model().state_dict()
    for name in ("adamw", "adamw_8bit"):
        model = tiny_model()
        config = Train(rows=4, steps=6, optimizer=Optimizer(name=name, lr=0.01))
        train(model, rows(), config, pad=0, seed=0, teacher=row_teacher, scratch=tmp_path / name)
        weights[name] = model.state_dict()
    moved = {name: w - start[name] for name, w in weights["adamw"].items()}
    for name, change in moved.items():
        apart = (weights["adamw_8bit"][name] - weights["adamw"][name]).norm()
        assert apart < 0.1 * change.norm(), name
    model = tiny_model()
    eight, rest = build_optimizers(model, Train(optimizer=Optimizer(name="adamw_8bit")))
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    eight.step()
    moments = {p.numel(): state["state1"].dtype for p, state in eight.state.items()}
    assert moments == {64 * 64: torch.uint8, 64 * 128: torch.uint8}
    assert {id(p) for p in rest.param_groups[0]["params"]} == {id(model.lm_head.weight)}
