"""Width against identities: what is cut had no effect, or the whole model without it answers the same."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.recipe import make_pass
from compress.width import cut, find_axes, output_energy, size_in_config
from eval.core.documents import collate
from eval.core.errors import UserError
from tests.compress.student_run import build_student_run, context_of
from tests.distill.test_families import EVERY, FAMILIES, ROWS
from tests.helpers import tiny_model

ONE_MATRIX = "holds queries, keys and values in one"
NOTHING = "none of its weights follows it"
REFUSED = {
    ("phi3", "heads"): ONE_MATRIX,
    ("gpt2", "heads"): NOTHING,
    ("gpt2", "hidden"): r"c_attn.weight \(32, 96\) would be \(16, 48\)",  # the size of its heads follows it
    ("gpt_neox", "heads"): NOTHING,
    ("gpt_neox", "hidden"): r"query_key_value.weight \(96, 32\) would be \(48, 16\)",
    ("olmo2", "heads"): "after the cut, log-probabilities differ",  # its norm goes over all heads
    ("qwen3_moe", "ffn"): NOTHING,  # its experts have a size of their own
}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    study = build_student_run(tmp_path_factory.mktemp("study"), [])
    return context_of(study, tmp_path_factory.mktemp("work"))


def narrow(model, context, **options):
    return make_pass({"pass": "width", "multiple": 16, "rows": 8, **options}, "here").apply(model, context)


def logits(model):
    return model(**collate(ROWS, 0).inputs, use_cache=False).logits.detach()


def family(name):
    torch.manual_seed(0)
    fields = {**FAMILIES[name], "num_attention_heads": 4}
    if "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = 2
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields)).eval()


@pytest.mark.parametrize("name", EVERY)
def test_every_family_is_cut_to_a_plain_config_or_refused_in_one_line(name, context, tmp_path):
    """A cut FFN or head is compared with the whole model inside the pass; the result loads as it was."""
    for kind in ("ffn", "heads", "hidden"):
        if reason := REFUSED.get((name, kind)):
            with pytest.raises(UserError, match=reason):
                narrow(family(name), context, **{kind: 0.5})
            continue
        small, report = narrow(family(name), context, **{kind: 0.5})
        assert report.after.parameters < report.before.parameters
        small.save_pretrained(tmp_path / kind)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        assert torch.equal(logits(again), logits(small))


def test_nothing_cut_is_the_same_model(context):
    model = family("llama")
    same, report = narrow(model, context)
    assert same is model
    assert report.after == report.before


def test_heads_and_channels_are_those_of_a_plain_reference():
    """Queries go with the key-value head that they share: here 3 to one, of 4 entries each."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 4}
    model = tiny_model(64, hidden_size=48, intermediate_size=32, **heads)
    kept = {"model.layers.0": torch.tensor([1, 2]), "model.layers.1": torch.tensor([0, 3])}
    small = cut(model, *find_axes(model, "heads", 2), kept)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads) == (6, 2)
    for i, heads in enumerate(kept.values()):
        old, new = model.model.layers[i].self_attn, small.model.layers[i].self_attn
        assert torch.equal(new.k_proj.weight, old.k_proj.weight.unflatten(0, (4, 4))[heads].flatten(0, 1))
        queries = old.q_proj.weight.unflatten(0, (4, 3, 4))[heads].flatten(0, 2)
        assert torch.equal(new.q_proj.weight, queries)
        assert torch.equal(new.o_proj.weight, old.o_proj.weight.unflatten(1, (4, 3, 4))[:, heads].flatten(1))
    small = cut(model, *find_axes(model, "ffn", 2), kept)
    for i, channels in enumerate(kept.values()):
        old, new = model.model.layers[i].mlp, small.model.layers[i].mlp
        assert torch.equal(new.gate_proj.weight, old.gate_proj.weight[channels])
        assert torch.equal(new.down_proj.weight, old.down_proj.weight[:, channels])


@torch.no_grad()
def test_hidden_channels_that_hold_nothing_are_the_ones_to_go(context):
    """Zero in every embedding and output, they change a model by nothing but the mean in its norms."""
    model = tiny_model(320, hidden_size=64, head_dim=32, rms_norm_eps=1e-12)
    empty = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    model.model.embed_tokens.weight[:, empty] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[empty] = 0
        layer.mlp.down_proj.weight[empty] = 0
    small, report = narrow(copy.deepcopy(model), context, hidden=0.5)
    assert report.facts["sizes"] == {"hidden": [64, 32]}
    norms = [m for m in small.modules() if type(m).__name__ == "LlamaRMSNorm"]
    for norm in norms:
        norm.weight *= 2**0.5  # the mean of squares goes over 32 channels, not 64
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    assert len(norms) == 5


def test_the_energy_of_an_input_is_the_error_without_it():
    generator = torch.Generator().manual_seed(0)
    linear, inputs = torch.nn.Linear(6, 5), torch.randn(40, 6, generator=generator)
    energy = output_energy(linear, inputs.norm(dim=0))
    for i in range(6):
        without = inputs.clone()
        without[:, i] = 0
        torch.testing.assert_close((linear(inputs) - linear(without)).square().sum(), energy[i])


def test_the_least_important_go(context):
    """Two channels that nothing reads, and a key-value head whose queries no output reads."""
    model = tiny_model(320, num_attention_heads=4, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 16:80] = 0
            layer.self_attn.o_proj.weight[:, 32:] = 0
    small, report = narrow(copy.deepcopy(model), context, ffn=0.5, heads=0.5)
    assert report.facts["sizes"] == {"ffn": [128, 64], "heads": [2, 1]}
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-5)
    assert size_in_config(small, "ffn") == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": 0.1, "multiple": 64}, r"nearest multiple of 64 is 128; give another share, or a smaller"),
        (
            {"heads": 0.1},
            r"width\.heads: 0\.1 of 2 leaves 1\.8, whose nearest multiple of 1 is 2; give another",
        ),
    ],
)
def test_a_share_that_leaves_no_multiple_is_refused(options, message, context):
    with pytest.raises(UserError, match=message):
        narrow(tiny_model(320), context, **options)


def test_a_size_that_the_config_of_the_family_refuses_is_refused_before_it_is_saved(context):
    """Llama's hidden size must be a multiple of its heads; transformers says so when the file is read."""
    with pytest.raises(UserError, match=r"hidden of .*'llama': The hidden size \(38\) is not a multiple"):
        narrow(tiny_model(320, num_attention_heads=4, hidden_size=48), context, hidden=0.2, multiple=2)
