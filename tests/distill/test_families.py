"""Every family of causal language models: distilled, with adapters too, exported, loaded again, and shortened."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.losses.teacher_output import Dense
from distill.models.export import export
from distill.models.layers import decoder_layers, keep_layers
from distill.models.lora import add_adapters
from distill.trainer.loop import train
from distill.trainer.optimizers import split_weights
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.sections import Optimizer, Student, Train
from eval.engines.torch import load_checkpoint
from tests.helpers import tiny_tokenizer

COMMON = {
    "vocab_size": 320,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 1}
SLIDING = {**GROUPED, "head_dim": 16, "sliding_window": 8}
FAMILIES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": SLIDING,  # caps its logits
    "gemma3_text": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": SLIDING,
    "phi": {**COMMON, "num_key_value_heads": 2},  # a bias in its head
    "phi3": GROUPED,  # one matrix for queries, keys and values
    "gpt2": {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},  # [in, out] matrices
    "gpt_neox": COMMON,
    "olmo2": GROUPED,
    "cohere": {**GROUPED, "logit_scale": 0.25},
    "granite": {**GROUPED, "logits_scaling": 4.0},
    "qwen3_moe": {
        **GROUPED,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
MOE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
STATE_SPACE = {
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
# Family -> fields, with as many experts as a matrix beside them has rows, what of a layer is no matrix, and the
# tensors that hold the matrices of all experts of a layer.
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
MIXTURES = {
    "qwen2_moe": (
        {**MOE, "num_experts": 32, "shared_expert_intermediate_size": 32},
        {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
        EXPERTS,
    ),
    "qwen3_moe": ({**MOE, "head_dim": 16, "num_experts": 32}, {"mlp.gate.weight"}, EXPERTS),
    "mixtral": ({**MOE, "num_local_experts": 32}, {"mlp.gate.weight"}, EXPERTS),
    "olmoe": ({**MOE, "num_experts": 32}, {"mlp.gate.weight"}, EXPERTS),
    "phimoe": ({**MOE, "num_local_experts": 32}, {"mlp.router.weight"}, EXPERTS),
    "gpt_oss": (
        {**SLIDING, "num_experts_per_tok": 2, "num_local_experts": 32},
        {"mlp.router.weight"},
        EXPERTS,
    ),
    "granitemoe": (
        {**MOE, "num_local_experts": 32},
        {"block_sparse_moe.router.layer.weight"},
        {"block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"},
    ),
    "deepseek_v3": (
        {**MOE, **LATENT, "n_routed_experts": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        {"mlp.gate.weight"},
        EXPERTS,
    ),
    "jamba": (
        {**MOE, **STATE_SPACE, "num_experts": 32, "attn_layer_period": 2, "attn_layer_offset": 1},
        {"feed_forward.router.weight", "mamba.A_log", "mamba.conv1d.weight"},
        {"feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"},
    ),
}
FAST = ("llama", "gemma2", "gpt2", "qwen3_moe")  # each of another kind
EVERY = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in FAMILIES]
ROWS = [
    Row("d", "x", i, [0, *torch.randint(1, 300, (12,), generator=torch.Generator().manual_seed(i)).tolist()])
    for i in range(4)
]
TRAIN = Train(steps=1, rows=4, optimizer=Optimizer(lr=0.01))


def teacher(batch):
    """Random, and far from any student."""
    points = torch.randn(int(batch.mask.sum()), 320, generator=torch.Generator().manual_seed(0))
    return Dense(torch.log_softmax(3 * points, -1))


@torch.no_grad()
def logits(model):
    return model(**collate(ROWS, 0).inputs, use_cache=False).logits


def step(model, folder):
    """One step of distillation; what it changed."""
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    train(model, ROWS, TRAIN, pad=0, seed=0, teacher=teacher, scratch=folder)
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("family", EVERY)
def test_a_family_is_distilled_exported_and_loaded_again(family, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    names = dict(model.named_parameters()).keys()
    assert step(model, tmp_path / "full") >= {n for n in names if n.endswith("proj.weight")}
    adapted = add_adapters(
        model, Student(tuning="lora", rank=2), 0, device=torch.device("cpu"), dtype=torch.float32
    )
    changed = step(adapted.model, tmp_path / "lora")
    assert changed, "adapters learn"
    assert all("lora_" in name for name in changed), "and they alone"
    plain = adapted.merged()
    assert dict(plain.named_parameters()).keys() == names
    export(plain, tokenizer, tmp_path / "out", "card", [])
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"config.json", "generation_config.json"}
    loaded, _ = load_checkpoint(tmp_path / "out")
    assert type(loaded) is type(plain)
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=0, atol=0)


@pytest.mark.parametrize("family", [*FAMILIES, *(name for name in MIXTURES if name not in FAMILIES)])
def test_routers_and_experts_are_known_by_what_they_are(family):
    fields, apart, experts = MIXTURES.get(family, (FAMILIES.get(family), set(), set()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = [{names[id(weight)] for weight in group} for group in split_weights(model)]
    assert sum(map(len, found)) == len(names), "each once"
    inside = [{n.split(".", 3)[3] for n in group if ".layers." in n or ".h." in n} for group in found]
    matrices, others, vectors = inside
    assert len(matrices - experts) >= 4
    assert all(name.endswith(".weight") for name in matrices - experts)
    assert matrices >= experts
    assert others == apart
    assert all("norm" in name or "ln_" in name or not name.endswith("weight") for name in vectors)


def test_a_family_whose_layers_have_places_of_their_own_is_refused(tmp_path):
    """Every second layer of it is a mixture of experts, by its number: without the first, it would not load."""
    fields = {**FAMILIES["qwen3_moe"], "num_hidden_layers": 4, "decoder_sparse_step": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **fields))
    assert len(decoder_layers(model)[2]) == 4
    with pytest.raises(UserError, match="layers of model type 'qwen3_moe': its config builds other layers"):
        keep_layers(model, [0, 2, 3])
