"""One contract for every pass that is found."""

import copy
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from compress.calibration import calibration_rows, mean_loss
from compress.model_size import size_of
from compress.recipe import PassReport, check_reach, make_pass
from distill.data.rows import training_rows
from eval.core.artifacts import content_hash, hash_files
from eval.core.config import plugin_names
from eval.core.errors import UserError
from tests.compress.student_run import build_student_run, context_of, model_of, wide_tokenizer
from tests.helpers import SHAPE, tiny_model

TRAIN = {"steps": 4, "rows": 4, "optimizer": {"name": "muon", "lr": 0.01}}
CASES = {
    "drop_layers": [{"share": 0.25}, {"share": 0.5}],
    "width": [{"ffn": 0.5}, {"heads": 0.5, "hidden": 0.5, "multiple": 32, "rows": 4}],
    "vocabulary": [{}],
    "magnitude": [{"sparsity": 0.5}, {"pattern": "2:4"}],
    "wanda": [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.9, "rows": 1, "allocation": "owl"}],
    "sparsegpt": [{"sparsity": 0.5, "rows": 8}, {"pattern": "2:4", "rows": 8}],
    "recover": [
        {"train": TRAIN},
        {"train": TRAIN, "quantize": {"group_size": 32}},
        {"train": TRAIN, "teacher": "method", "quantize": {"bits": 3, "group_size": -1}},
    ],
    "cast": [{"dtype": "bfloat16"}, {"dtype": "float16"}],
    "bitsandbytes": [{"format": "nf4"}, {"format": "int8"}],
    "openvino": [
        {"weights": "int8"},
        {"weights": "int4"},
        {"weights": "fp32"},
        {"weights": "int4", "group_size": 64, "awq": True, "scale_estimation": True, "rows": 4},
    ],
    "llama_cpp": [{"weights": "f32"}, {"weights": "q8_0"}, {"weights": "q4_0"}],
    "onnxruntime": [
        {"weights": "fp32"},
        {"weights": "int8"},
        {"weights": "int8-dynamic"},
        {"weights": "int4"},
    ],
}
NOT_LOCKED = {"llama_cpp": "llama_cpp"}  # pass -> the library that it needs and the lock leaves out


def skipped(name):
    library = NOT_LOCKED.get(name)
    missing = library is not None and find_spec(library) is None
    return [pytest.mark.skip(reason=f"{library} is not installed")] if missing else []


ALL = [
    pytest.param(name, options, id=f"{name}-{i}", marks=skipped(name))
    for name, many in CASES.items()
    for i, options in enumerate(many)
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return build_student_run(tmp_path_factory.mktemp("study"), [], tokenizer=wide_tokenizer())


@pytest.fixture(scope="module")
def context(study, tmp_path_factory):
    return context_of(study, tmp_path_factory.mktemp("work"))


def make(name, options):
    return make_pass({"pass": name, **options}, "here")


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return content_hash(hash_files(folder))


def test_every_pass_has_cases():
    assert sorted(CASES) == plugin_names("compress.passes")


@pytest.mark.parametrize("name", [name for name in CASES if not skipped(name)])
def test_unknown_options_are_refused(name):
    with pytest.raises(UserError, match=r"unknown key shar.*accepted"):
        make(name, {**CASES[name][0], "shar": 1})


@pytest.mark.parametrize(("name", "options"), ALL)
def test_contract(name, options, study, context, tmp_path):
    """The parent is not touched, the report adds up, and the same work gives the same bytes."""
    parent = saved(context.parent, tmp_path / "parent")
    before, modules = size_of(context.parent), dict(context.parent.named_modules())
    compressed, report = make(name, options).apply(model_of(context), context)
    assert saved(context.parent, tmp_path / "parent-after") == parent
    check_report(report, before, modules)
    assert report.name == name
    elsewhere = context_of(study, tmp_path / "elsewhere")
    again, second = make(name, options).apply(model_of(elsewhere), elsewhere)
    assert second == report
    assert saved(compressed, tmp_path / "one") == saved(again, tmp_path / "two")


def check_report(report, before, modules):
    assert report.before == before
    assert report.after.parameters <= before.parameters
    assert 0 < report.after.nonzeros <= report.after.parameters
    assert report.after.bytes > 0
    assert 0 <= report.after.low_bit <= report.after.parameters
    check_reach(report)
    assert {skip.module for skip in report.skipped} <= set(modules)
    assert all(skip.reason for skip in report.skipped)
    assert PassReport.model_validate_json(report.model_dump_json()) == report


def test_tokens_that_no_document_has_are_gone_and_the_rest_is_as_before(study, context):
    model, report = make("vocabulary", {}).apply(model_of(context), context)
    later = make("vocabulary", {}).next_context(context)
    assert report.facts == {"vocabulary": [360, len(later.tokenizer)], "tokens": [360, len(later.tokenizer)]}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 300 < len(later.tokenizer) < 345
    assert "Ġzebras" in context.tokenizer.get_vocab().keys() - later.tokenizer.get_vocab().keys()
    assert [row.tokens for row in later.rows] == [row.tokens for row in training_rows(study, later.tokenizer)]
    assert mean_loss(later.parent, later.rows, later.pad) < mean_loss(
        context.parent, context.rows, context.pad
    )


def test_nothing_cut_from_the_vocabulary_is_the_same_model(study, context, tmp_path):
    whole = replace(make("vocabulary", {}).next_context(context), scratch=tmp_path)
    model, report = make("vocabulary", {}).apply(whole.parent, whole)
    assert model is whole.parent
    assert report.before == report.after
    assert make("vocabulary", {}).next_context(whole) is whole


def test_wanda_makes_the_zeros_it_says(context):
    model, report = make("wanda", {"sparsity": 0.5}).apply(model_of(context), context)
    for layer in model.model.layers:
        weight = layer.mlp.down_proj.weight
        assert torch.equal((weight == 0).sum(dim=1), torch.full((64,), 64))
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert report.before.nonzeros - report.after.nonzeros == linear // 2
    assert {s.module for s in report.skipped} == {"model.embed_tokens", "lm_head"}
    assert report.after.parameters == report.before.parameters


def test_wanda_two_of_four(context):
    model, _ = make("wanda", {"pattern": "2:4"}).apply(model_of(context), context)
    groups = model.model.layers[2].self_attn.q_proj.weight.reshape(-1, 4)
    assert int((groups != 0).sum(dim=1).max()) == 2


def test_wanda_against_a_plain_reference(context):
    """Layer by layer, each calibrated on what the pruned layers before it give, row by row without padding."""
    rows = calibration_rows(context.rows, 8, context.seed)
    pruned, _ = make("wanda", {"sparsity": 0.5, "rows": 8}).apply(model_of(context), context)
    model = model_of(context)
    for i, layer in enumerate(model.model.layers):
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        seen = {name: [] for name in linears}
        hooks = [
            m.register_forward_pre_hook(lambda m, x, n=n, seen=seen: seen[n].append(x[0][0]))
            for n, m in linears.items()
        ]
        for row in rows:
            model(torch.tensor([row.tokens]))
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():
            scores = module.weight.abs() * torch.cat(seen[name]).norm(dim=0)
            half = scores.sort(dim=1).values[:, scores.shape[1] // 2 - 1 : scores.shape[1] // 2]
            module.weight.data[scores <= half] = 0
            weight = pruned.model.layers[i].get_submodule(name).weight
            assert ((weight == 0) == (module.weight == 0)).float().mean() > 0.999  # but for rounding at ties
            module.weight.data = weight.data


def test_wanda_that_fits_nothing(context):
    with pytest.raises(UserError, match="no linear layer that it can prune"):
        make("wanda", {"pattern": "2:7"}).apply(model_of(context), context)


def moe_model():
    """Its experts stand in one tensor of three axes per layer, as transformers 5 holds them."""
    torch.manual_seed(0)
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
    fields = {**SHAPE, **experts, "num_hidden_layers": 2, "vocab_size": 360, "eos_token_id": 0}
    config = AutoConfig.for_model("qwen3_moe", **fields, decoder_sparse_step=1, mlp_only_layers=[])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "options"), [("wanda", {"sparsity": 0.5}), ("bitsandbytes", {"format": "nf4"})]
)
def test_a_pass_that_leaves_out_the_experts_is_refused_with_the_share_that_it_reached(context, name, options):
    """wanda50 went through 16 % of an MoE, and stood in the table under its full name."""
    step = make(name, options)
    _, report = step.apply(moe_model(), context)
    assert 0 < report.reached < 0.3 * report.named
    with pytest.raises(UserError, match=rf"pass {name}: reached \d+% .*, without .*mlp\.experts .*; leave"):
        check_reach(report)
    _, whole = step.apply(model_of(context), context)
    check_reach(whole)
    assert whole.reached == whole.named


def test_recovery_keeps_zeros_and_ties_and_helps(context):
    pruned, _ = make("wanda", {"sparsity": 0.7}).apply(model_of(context), context)
    zeros = {n: p == 0 for n, p in pruned.named_parameters() if "proj" in n}
    harmed = mean_loss(pruned, context.rows, 0)
    train = {"steps": 24, "rows": 4, "optimizer": {"name": "muon", "lr": 0.01, "weight_decay": 0.1}}
    model, report = make("recover", {"train": train}).apply(copy.deepcopy(pruned), context)
    for name, mask in zeros.items():
        assert torch.equal(model.get_parameter(name) == 0, mask), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert mean_loss(model, context.rows, 0) < harmed
    assert report.facts["loss_curve"][-1][0] == 24
    assert report.after.nonzeros == report.before.nonzeros


def test_too_many_layers(context):
    with pytest.raises(UserError, match="is 3 of 4 layers; at most 2 can go"):
        make("drop_layers", {"share": 0.75}).apply(model_of(context), context)


def test_nf4_refuses_rows_that_are_no_multiple_of_the_block(study, context):
    """bitsandbytes 0.50.2 restores them wrongly on a CPU, without a word."""
    odd = tiny_model(320, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    with pytest.raises(
        UserError,
        match=r"layer model.layers.0.mlp.down_proj of shape \(64, 96\): 96 inputs are no multiple of 64",
    ):
        make("bitsandbytes", {"format": "nf4"}).apply(odd, context)
    _, report = make("bitsandbytes", {"format": "int8"}).apply(odd, context)
    assert report.facts["matrices"] == 14


def test_what_nncf_does_with_tied_embeddings(context):
    """int8 takes the shared matrix once; int4 keeps it in 8 bits; nothing stays in float32."""
    _, eight = make("openvino", {"weights": "int8"}).apply(model_of(context), context)
    _, four = make("openvino", {"weights": "int4"}).apply(model_of(context), context)
    assert set(eight.facts["formats"].values()) == {"i8"}
    assert [n for n, kind in four.facts["formats"].items() if kind != "i4"] == ["model.embed_tokens"]
    assert eight.skipped == four.skipped == []
    assert four.after.bytes < eight.after.bytes < eight.before.bytes / 3


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_matrices_that_are_stored_the_other_way_round(context, tmp_path, weights):
    """GPT-2 keeps [inputs, outputs]: scales are shared along the other axis."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=360, n_embd=64, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    work = replace(context, parent=model, scratch=tmp_path / "gpt2")
    _, report = make("openvino", {"weights": weights}).apply(copy.deepcopy(model), work)
    assert len(report.facts["formats"]) >= 9  # four matrices a layer, and the embeddings
    assert report.after.bytes < report.before.bytes / 3
    _, other = make("bitsandbytes", {"format": "nf4"}).apply(model, work)
    assert other.facts["matrices"] == 8


@pytest.mark.parametrize(
    ("name", "options"),
    [("openvino", {"weights": "int8"}), ("bitsandbytes", {"format": "int8"})],
)
def test_rows_of_tiny_weights_pass(context, tmp_path, name, options):
    """The embedding of a padding token starts at zero and is moved by rounding alone: its scale is subnormal."""
    model = model_of(context)
    with torch.no_grad():
        for i, size in enumerate((1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)):
            for weight in (model.get_input_embeddings().weight, model.model.layers[0].mlp.gate_proj.weight):
                weight[i] *= size / weight[i].abs().max()
    work = replace(context, parent=copy.deepcopy(model), scratch=tmp_path / "tiny")
    _, report = make(name, options).apply(model, work)
    assert 0 < report.facts["worst_rounding"] < 0.2


def test_an_export_that_answers_otherwise_is_refused(context, tmp_path):
    """What reaches the exporter is another model than the one at hand: the IR must not pass."""
    model = model_of(context)

    def save(folder, **how):
        changed = copy.deepcopy(context.parent)
        with torch.no_grad():
            changed.model.norm.weight *= 1.5
        changed.save_pretrained(folder, **how)

    model.save_pretrained = save
    work = replace(context, scratch=tmp_path / "fresh")
    with pytest.raises(UserError, match="log-probabilities differ from torch"):
        make("openvino", {"weights": "int8"}).apply(model, work)
    assert not (tmp_path / "fresh" / "openvino-fp32").exists()


def test_rows_of_the_study_are_training_rows(study, context):
    assert [row.id for row in context.rows] == [row.id for row in training_rows(study, context.tokenizer)]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_no_sparsity_is_the_same_model(context, tmp_path, name):
    model, report = make(name, {"sparsity": 0, "rows": 4}).apply(model_of(context), context)
    assert saved(model, tmp_path / "zero") == saved(context.parent, tmp_path / "parent")
    assert report.after == report.before


def test_magnitude_is_the_smallest_of_each_matrix(context):
    model, _ = make("magnitude", {"sparsity": 0.25}).apply(model_of(context), context)
    for name, weight in context.parent.named_parameters():
        if "proj" in name:
            limit = weight.abs().flatten().sort().values[weight.numel() // 4 - 1]
            assert torch.equal(model.get_parameter(name) == 0, weight.abs() <= limit), name


def test_owl_spreads_the_zeros_over_the_layers_and_keeps_their_number(context):
    options = {"sparsity": 0.6, "rows": 8, "allocation": "owl", "owl_outlier": 3.0}
    model, report = make("wanda", options).apply(model_of(context), context)
    shares = report.facts["layer_sparsity"]
    assert len(set(shares)) > 1
    assert sum(shares) / 4 == pytest.approx(0.6, abs=1e-5)
    for layer, share in zip(model.model.layers, shares, strict=True):
        weight = layer.mlp.down_proj.weight
        assert int((weight[0] == 0).sum()) == int(128 * share)
    most = max(range(4), key=lambda i: report.facts["outliers"][i])
    assert shares[most] == min(shares)
    with pytest.raises(UserError, match=r"wanda\.allocation: owl: layers would have .*smaller `owl_reach`"):
        make("wanda", {**options, "owl_reach": 0.9}).apply(model_of(context), context)


def test_targets_and_ignore(context):
    options = {"sparsity": 0.5, "targets": ["*.mlp.*"], "ignore": ["*.1.*"]}
    model, report = make("magnitude", options).apply(model_of(context), context)
    zeros = {name for name, w in model.named_parameters() if (w == 0).float().mean() > 0.4}
    parts = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 2, 3) for part in ("gate", "up", "down")]
    assert zeros == set(parts)
    assert report.named == report.reached == 9 * 64 * 128
    assert {"model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj"} <= {
        s.module for s in report.skipped
    }
    for wrong in ({"targets": ["*.mpl.*"]}, {"ignore": ["*.mpl.*"]}):
        with pytest.raises(UserError, match=r"'\*\.mpl\.\*': matches no module; give patterns .*layers\.0"):
            make("magnitude", wrong).preview(model_of(context))
    with pytest.raises(UserError, match="ignore: leaves no module"):
        make("magnitude", {"ignore": ["*"]}).preview(model_of(context))
