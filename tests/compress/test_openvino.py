"""The options of nncf: what each changes in the compressed model, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch

from compress.calibration import calibration_rows, check_batch, log_probs
from compress.quantized_training import keep_rounded, put_on_grid
from compress.recipe import Grid, check_reach, make_pass
from compress.tensors.quant_error import check_scaled
from eval.core.documents import batches
from eval.core.errors import UserError
from eval.engines import load_engine
from eval.score.divergence import kl_divergence
from tests.compress.student_run import build_student_run, context_of, model_of

ROWS = 8


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """Its float32 export is made once."""
    study = build_student_run(tmp_path_factory.mktemp("study"), [], layers=2)
    return context_of(study, tmp_path_factory.mktemp("work"))


def int4(context, **options):
    step = make_pass({"pass": "openvino", "weights": "int4", **options}, "here")
    step.preview(model_of(context))
    model, report = step.apply(model_of(context), context)
    check_reach(report)
    return model, report


def divergence(model, context) -> float:
    """KL(parent || model) per token on the rows that calibrate."""
    total, tokens = 0.0, 0
    for batch in batches(calibration_rows(context.rows, ROWS, context.seed), context.pad):
        real = batch.attention_mask.bool()
        total += float(
            kl_divergence(log_probs(context.parent, batch)[real], log_probs(model, batch)[real]).sum()
        )
        tokens += int(real.sum())
    return total / tokens


@pytest.mark.slow
def test_algorithms_that_look_at_data_are_as_near_to_the_student_as_rounding_or_nearer(context):
    plain, report = int4(context, group_size=64)
    rounded = divergence(plain, context)
    assert "worst_moved" not in report.facts
    for option in ("gptq", "scale_estimation", "awq", "lora_correction"):
        model, other = int4(context, group_size=64, rows=ROWS, **{option: True})
        most = 1.2 if option == "awq" else 1.0  # no input of so small a model stands out
        assert divergence(model, context) < most * rounded, option
        assert set(other.facts["formats"]) == set(report.facts["formats"])
        if option == "lora_correction":
            assert other.after.bytes > report.after.bytes
        else:
            assert 0 < other.facts["worst_moved"] < 0.5
            assert other.after.bytes <= 1.01 * report.after.bytes
        assert (other.facts.get("rescaled", 0) > 0) == (option == "awq"), option


def test_formats_of_mixed_precision_and_of_what_stands_beside_it(context):
    def formats(**options):
        return int4(context, **options)[1].facts["formats"]

    assert set(formats(sym=False).values()) == {"u4", "u8"}
    mixed = formats(ratio=0.5, sensitivity_metric="weight_quantization_error", backup_precision="int8_sym")
    assert mixed["model.embed_tokens"] == "i8"
    assert 3 <= [kind for name, kind in mixed.items() if "proj" in name].count("i8") <= 11
    assert formats(all_layers=True)["model.embed_tokens"] == "i4"
    _, report = int4(context, backup_precision="none")
    assert {skip.module for skip in report.skipped} == {"model.embed_tokens"}
    assert "model.embed_tokens" not in report.facts["formats"]


def test_a_group_size_that_does_not_divide(context):
    with pytest.raises(UserError, match=r"the 64 inputs of .*q_proj are no multiple of 48; give .*adjust"):
        int4(context, group_size=48)
    _, report = int4(context, group_size=48, group_size_fallback="adjust")
    assert [name for name, kind in report.facts["formats"].items() if kind != "i4"] == ["model.embed_tokens"]
    whole, grouped = (int4(context, group_size=size)[1] for size in (-1, 32))
    assert whole.after.bytes < grouped.after.bytes


def test_modules_that_are_ignored_stay_in_float32(context):
    _, report = int4(context, ignore=["*.0.mlp.*"])
    left = {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert {skip.module for skip in report.skipped} == left
    assert not left & report.facts["formats"].keys()
    assert report.reached == report.named
    with pytest.raises(UserError, match="is compressed although it is left out"):
        int4(context, ignore=["model.embed_tokens"])  # the head shares its matrix
    with pytest.raises(UserError, match="matches no module"):
        int4(context, ignore=["*.9.mlp.*"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int8", "group_size": 64}, "group_size needs weights: int4"),
        ({"weights": "int8", "awq": True}, "awq needs weights: int4"),
        ({"weights": "int4", "gptq": True, "lora_correction": True}, "`gptq` or `lora_correction`, not both"),
        (
            {"weights": "int4", "sensitivity_metric": "max_activation_variance"},
            "chooses nothing where ratio is 1",
        ),
        ({"weights": "int4", "rows": 8}, "rows are not used"),
        ({"weights": "int4", "group_size": 0}, "-1 for whole rows"),
        ({"weights": "fp32", "dynamic_quantization_group_size": 0}, "needs weights of 8 or 4 bits"),
        ({"weights": "int8", "allocation": "kl"}, "allocation needs weights: int4"),
        ({"weights": "int4", "allocation": "kl", "awq": True}, "chooses all formats; leave awq out"),
        ({"weights": "int4", "allocation": "kl", "group_size": -1}, "also takes half of group_size"),
        ({"weights": "int4", "backup_precision": "int8"}, "backup_precision"),
    ],
)
def test_options_that_do_not_fit_together(options, message):
    with pytest.raises(UserError, match=message):
        make_pass({"pass": "openvino", **options}, "here")


def test_activations_that_are_not_rounded_answer_as_the_rounded_weights_do(context, tmp_path):
    """The setting goes with the files: whoever loads them computes so."""
    model, batch = model_of(context), check_batch(context.rows, context.pad)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = [name for name in names if name.startswith("model.layers")]
    put_on_grid(model, inside, Grid(4, 32))
    keep_rounded(model, inside)  # so that rounding the weights changes nothing
    real, errors = batch.attention_mask.bool(), {}
    for size in (None, 0):
        options = {} if size is None else {"dynamic_quantization_group_size": size}
        step = make_pass(
            {"pass": "openvino", "weights": "int4", "backup_precision": "none", **options}, "here"
        )
        own = replace(context, scratch=tmp_path / "work")  # with an export of this very model
        exported, _ = step.apply(copy.deepcopy(model), own)
        folder = tmp_path / str(size)
        exported.save_pretrained(folder)
        context.tokenizer.save_pretrained(folder)
        said = torch.log_softmax(load_engine("openvino", folder).logits(batch).float(), -1)
        errors[size] = float((said - log_probs(model, batch))[real].abs().max())
    assert errors[0] < 1e-4
    assert errors[0] < errors[None]


def test_int8_by_levels_from_the_least_weight(context):
    step = make_pass({"pass": "openvino", "weights": "int8", "sym": False}, "here")
    _, report = step.apply(model_of(context), replace(context))
    assert set(report.facts["formats"].values()) == {"u8"}


def test_scales_of_rows_and_inputs_are_no_movement_and_noise_is():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, generator=generator)
    rows, inputs = torch.rand(12, 1, generator=generator) + 0.5, torch.rand(16, generator=generator) + 0.5
    moved, change = check_scaled("w", weight, weight * rows)
    assert moved < 1e-6
    assert change == pytest.approx(float(rows.log().abs().max()), rel=1e-5)
    assert check_scaled("w", weight, weight * inputs)[0] < 0.15  # rows are fitted first
    noisy = weight + 0.1 * torch.randn(12, 16, generator=generator)
    assert check_scaled("w", weight, noisy)[0] == pytest.approx(0.1, rel=0.2)
    with pytest.raises(UserError, match=r"moved by .* of its norm, scales aside"):
        check_scaled("w", weight, torch.randn(12, 16, generator=generator))
