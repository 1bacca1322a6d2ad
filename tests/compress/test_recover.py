"""Recovery on the levels of an export, and from the teacher of the method."""

import copy
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from compress.calibration import check_batch, log_probs
from compress.model_size import layer_inputs
from compress.openvino_ir import compressed_matrices, module_name
from compress.pipeline import pending_variants, unteachable_recipes
from compress.quantized_training import keep_rounded, put_on_grid
from compress.recipe import Grid, load_recipe, make_pass
from compress.tensors.grid import round_to_grid
from distill.losses.divergences import distillation_loss
from distill.teachers.target_source import open_target_source
from distill.train import distil
from distill.trainer.loop import row_order
from distill.trainer.optimizers import split_weights
from eval.core.artifacts import Key, build_artifact, content_hash, hash_files, link_files, read_manifest
from eval.core.documents import collate, pad_id
from eval.core.errors import UserError
from eval.core.sections import Loss
from eval.core.study import load_study
from eval.engines.torch import load_checkpoint
from tests.compress.student_run import build_student_run, context_of, model_of, recipe_file
from tests.helpers import run, tiny_study

GRID = Grid(4, 32)
TRAIN = {"steps": 6, "rows": 4, "optimizer": {"name": "muon", "lr": 0.01}}
ROUNDED = {"train": TRAIN, "quantize": {"group_size": 32}}
INT4 = {"pass": "openvino", "weights": "int4"}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    study = build_student_run(tmp_path_factory.mktemp("study"), [], layers=2)
    return context_of(study, tmp_path_factory.mktemp("work"))


def recover(**options):
    return make_pass({"pass": "recover", **options}, "here")


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    return content_hash(hash_files(folder))


def on_grid(context):
    model = model_of(context)
    put_on_grid(model, layer_inputs(model), GRID)
    keep_rounded(model, layer_inputs(model))
    return model


def exported(model, context, folder, **options):
    """Restored matrices of an int4 export by module, with their kind; and the exported model."""
    step = make_pass({**INT4, **options}, "here")
    made, report = step.apply(copy.deepcopy(model), replace(context, scratch=folder))
    found = {module_name(name): (kind, new) for name, kind, _, new in compressed_matrices(made.model)}
    return found, made, report.facts["worst_rounding"]


def test_levels_are_those_that_nncf_rounds_to(context, tmp_path):
    """But for ties, and for the last bits of a scale."""
    model = model_of(context)
    found, _, _ = exported(model, context, tmp_path)
    for name in layer_inputs(model):
        kind, new = found[name]
        weight = model.get_submodule(name).weight
        assert kind == "i4"
        largest = weight.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, dim=-1)
        apart = (new.reshape(weight.shape).float() - round_to_grid(weight, 4, 32)).abs() / largest
        assert (apart < 2**-8).float().mean() > 0.995, name
        assert apart.max() < 0.13, name


@pytest.mark.parametrize("group", [16, -1])
def test_rounding_twice_or_to_more_bits_changes_nothing(group):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] *= 1e-3
    weight[2, :32] = weight[2, :32].abs()
    for bits in (2, 3, 4):
        once = round_to_grid(weight, bits, group)
        assert len(once[3].unique()) <= 2**bits * (1 if group < 0 else 4)
        assert torch.equal(once == 0, (once == 0) | (weight == 0))
        for more in range(bits, 9):
            assert torch.equal(round_to_grid(once, more, group), once), (bits, more)
    assert (round_to_grid(weight, 8, group) - weight)[3:].abs().max() < 0.05


def test_on_the_grid_the_model_and_its_gradient_are_those_in_float(context, tmp_path):
    """Zero steps change nothing; the straight-through gradient is the plain one."""
    plain, rounded = on_grid(context), on_grid(context)
    names = list(layer_inputs(plain))
    put_on_grid(rounded, names, GRID)
    batch = check_batch(context.rows, context.pad)
    for model in (plain, rounded):
        model(**batch.inputs, labels=batch.input_ids).loss.backward()
    for name in names:
        weight = rounded.get_submodule(name).parametrizations.weight.original
        assert torch.equal(weight.grad, plain.get_submodule(name).weight.grad), name
    keep_rounded(rounded, names)
    assert not any(is_parametrized(module) for module in rounded.modules())
    assert saved(rounded, tmp_path / "one") == saved(plain, tmp_path / "two")


def test_the_optimizers_take_the_weights_as_before(context):
    model = model_of(context)
    before = [[id(w) for w in part] for part in split_weights(model)]
    put_on_grid(model, layer_inputs(model), GRID)
    assert [{id(w) for w in part} for part in split_weights(model)] == [set(part) for part in before]


def test_an_export_keeps_the_weights_that_were_trained(context, tmp_path):
    """Matrix by matrix to the last bit; what it answers is what the trained model does, within the engine."""
    model, report = recover(**ROUNDED).apply(model_of(context), context)
    names = layer_inputs(model)
    assert report.facts["matrices"] == len(names) == 14
    assert report.facts["grid"] == "4 bits, groups of 32"
    found, made, worst = exported(model, context, tmp_path, backup_precision="none")
    for name in names:
        kind, new = found[name]
        weight = model.get_submodule(name).weight
        assert not torch.equal(weight, context.parent.get_submodule(name).weight)
        assert kind == "i4"
        assert torch.equal(new.reshape(weight.shape).float(), weight), name
    assert worst == 0
    batch = check_batch(context.rows, context.pad)
    real = batch.attention_mask.bool()
    trained = log_probs(model, batch)[real]
    assert (log_probs(made, batch)[real] - trained).abs().max() < 0.05  # it rounds activations to 8 bits
    made.ov_config = {**made.ov_config, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # here it does not
    made.clear_requests()
    made.compile()
    assert (log_probs(made, batch)[real] - trained).abs().max() < 1e-5


def test_onnx_runtime_keeps_them_too(context, tmp_path):
    import onnx

    from compress.onnx_graph import MODEL, matrices, restored

    model = on_grid(context)
    work = replace(context, scratch=tmp_path)
    made, _ = make_pass({"pass": "onnxruntime", "weights": "int4"}, "here").apply(model, work)
    before, after = (onnx.load(folder / MODEL) for folder in (tmp_path / "onnx-fp32", made.folder))
    inside = [name for name in matrices(before) if "layers" in name]
    assert len(inside) == 10  # queries, keys and values of a layer are one
    for name in inside:
        assert torch.equal(restored(after, name, "int4"), torch.tensor(matrices(before)[name].T)), name


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
def test_llama_cpp_keeps_them_too(context, tmp_path):
    from compress.gguf_file import MODEL, tensors, values

    model = on_grid(context)
    work = replace(context, scratch=tmp_path)
    made, _ = make_pass({"pass": "llama_cpp", "weights": "q4_0"}, "here").apply(model, work)
    before, after = (tensors(folder / MODEL) for folder in (tmp_path / "gguf-f32", made.folder))
    kept = [name for name, tensor in after.items() if tensor.tensor_type.name == "Q4_0"]
    assert len(kept) == 14
    for name in kept:
        assert torch.equal(torch.tensor(values(after[name])), torch.tensor(before[name].data)), name


def test_three_bits_pass_through_an_export_of_four(context, tmp_path):
    options = {"train": TRAIN, "quantize": {"bits": 3, "group_size": 32}}
    model, _ = recover(**options).apply(model_of(context), context)
    found, _, _ = exported(model, context, tmp_path)
    for name in layer_inputs(model):
        weight = model.get_submodule(name).weight
        assert all(len(group.unique()) <= 8 for group in weight.unflatten(-1, (-1, 32)).flatten(0, 1)[:9])
        assert torch.equal(found[name][1].reshape(weight.shape).float(), weight), name


def test_targets_ignore_and_zeros(context):
    pruned, _ = make_pass({"pass": "wanda", "sparsity": 0.7}, "here").apply(model_of(context), context)
    options = {**ROUNDED, "quantize": {"group_size": 64, "targets": ["*.mlp.*"], "ignore": ["*.1.*"]}}
    model, report = recover(**options).apply(copy.deepcopy(pruned), context)
    assert report.facts["matrices"] == 3
    assert report.after.nonzeros < report.before.nonzeros
    for name in layer_inputs(model):
        weight, before = model.get_submodule(name).weight, pruned.get_submodule(name).weight
        assert not weight[before == 0].any(), name
        is_rounded = ".0.mlp." in name
        assert torch.equal(round_to_grid(weight, 4, 64), weight) == is_rounded, name


def test_stopped_in_the_middle_and_taken_up_again(context, tmp_path):
    options = {"train": {**TRAIN, "checkpoint_every": 2}, "quantize": {"group_size": 32}}

    def build(scratch, report=lambda share: None):
        return recover(**options).apply(model_of(context), replace(context, scratch=scratch, report=report))

    def stop(share):
        if share > 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", stop)
    shares = []
    again, _ = build(tmp_path / "stopped", shares.append)
    assert shares == pytest.approx([5 / 6, 1])
    whole, _ = build(tmp_path / "whole")
    assert saved(again, tmp_path / "one") == saved(whole, tmp_path / "two")


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ({"bits": 9}, r"quantize\.bits: 9, expected at most 8|at most 8"),
        ({"bits": 1}, "at least 2"),
        ({"group_size": 0}, "-1 for whole rows"),
        ({"groups": 64}, "unknown key quantize.groups"),
    ],
)
def test_levels_that_there_are_not(quantize, message):
    with pytest.raises(UserError, match=message):
        recover(train=TRAIN, quantize=quantize)


def test_groups_and_patterns_are_checked_by_shape(context):
    with pytest.raises(
        UserError, match=r"recover\.quantize\.group_size: the 64 inputs of .* multiple of 128"
    ):
        recover(train=TRAIN, quantize={"group_size": 128}).preview(model_of(context))
    down = {"group_size": 128, "targets": ["*.down_proj"]}
    recover(train=TRAIN, quantize=down).preview(model_of(context))
    with pytest.raises(UserError, match=r"'\*\.mpl\.\*': matches no module"):
        recover(train=TRAIN, quantize={"ignore": ["*.mpl.*"]}).preview(model_of(context))


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({**INT4, "group_size": 64}, r"rounds to levels of 4 bits, groups of 64, after .* groups of 32"),
        ({**INT4, "sym": False}, "not around zero"),
        ({**INT4, "awq": True}, r"openvino\.awq moves weights"),
        ({"pass": "openvino", "weights": "int8"}, "8 bits, whole rows"),
        ({"pass": "bitsandbytes", "format": "nf4"}, "levels of its own"),
        ({"pass": "recover", "train": TRAIN}, "recover trains off them"),
        ({"pass": "onnxruntime", "weights": "int4", "group_size": 64}, "onnxruntime rounds to levels of 4"),
        (INT4, None),
        ({"pass": "openvino", "weights": "fp32"}, None),
        ({"pass": "onnxruntime", "weights": "int4"}, None),
    ],
)
def test_what_would_round_them_otherwise_is_refused(tmp_path, after, message):
    place = recipe_file(tmp_path, "chain", {"pass": "recover", **ROUNDED}, after)
    if message is None:
        load_recipe(place)
    else:
        with pytest.raises(UserError, match=message):
            load_recipe(place)


def test_models_without_a_method(context):
    with pytest.raises(UserError, match=r"recover\.teacher: method, but .*; take teacher: student"):
        recover(train=TRAIN, teacher="method").apply(model_of(context), replace(context, method=None))


def test_a_run_that_cannot_teach_is_one_line_before_any_work(tmp_path):
    """Its students were trained elsewhere."""
    place = recipe_file(tmp_path, "taught", {"pass": "recover", "train": TRAIN, "teacher": "method"})
    study = build_student_run(tmp_path, [place], layers=2)
    result = run("-m", "compress.run", "--study", study.folder)
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1, result.stderr
    assert "recipe taught was not built: recover.teacher: method, artifact" in result.stderr
    assert "train the study here first, or take teacher: student" in result.stderr
    assert not (study.folder / "variants").exists()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A study trained by the real pipeline, of one seed, and a recipe that learns from its method."""
    folder = tmp_path_factory.mktemp("taught")
    recipes = [
        recipe_file(folder, "taught", {"pass": "recover", **ROUNDED, "teacher": "method"}, INT4),
        recipe_file(folder, "parent", {"pass": "recover", **ROUNDED}, INT4),
    ]
    study = load_study(tiny_study(folder, recipes=recipes, seeds=[0], workers=1))
    distil(study)
    return load_study(study.folder)


def first_loss(study, arm, taught_as):
    """Of the rounded student of an arm on its first rows, by the targets of an arm, without the trainer."""
    model, tokenizer = load_checkpoint(study.folder / "students" / arm / "s0")
    put_on_grid(model, layer_inputs(model), GRID)
    with open_target_source(study, taught_as, 0, tokenizer) as source, torch.no_grad():
        rows = [source.rows[i] for i in row_order(len(source.rows), 6, 4, 0)[0]]
        batch = collate(rows, pad_id(tokenizer))
        target = source.teacher(batch)
        logits = model(**batch.inputs).logits[:, :-1][batch.mask]
        whole = target.logits(0, len(logits))
        labels = batch.labels[batch.mask]
        return float(distillation_loss(logits, labels, whole, Loss())) / len(labels)


@pytest.mark.slow
def test_the_teacher_of_the_method_teaches(taught):
    """S1's variants from T1, S0's from T0: the first loss is that of the rounded student against its own."""
    result = run("-m", "compress.run", "--study", taught.folder)
    assert result.returncode == 0, result.stderr
    for arm, other in (("S1", "S0"), ("S0", "S1")):
        report = read_manifest(taught.folder / "variants" / "taught" / arm / "s0").facts["reports"][0]
        assert report["facts"]["matrices"] == 14
        step, loss = report["facts"]["loss_curve"][0]
        assert step == 1
        assert loss == pytest.approx(first_loss(taught, arm, arm), rel=1e-4)
        assert loss != pytest.approx(first_loss(taught, arm, other), rel=1e-3)
    assert pending_variants(taught) == []


@pytest.mark.slow  # needs the variants of the test before
def test_other_targets_of_the_teacher_are_another_key(taught, tmp_path):
    shutil.copytree(taught.folder, tmp_path / taught.name)
    study = taught.model_copy(update={"runs": str(tmp_path)})
    recipes = [load_recipe(place) for place in study.recipes]
    assert pending_variants(study) == []
    assert unteachable_recipes(study, recipes) == {}
    folder = study.folder / "targets" / "T1" / "s0"
    manifest, aside = read_manifest(folder), tmp_path / "aside"
    folder.rename(aside)
    with pytest.raises(UserError, match=r"targets/T1/s0: no manifest\.json"):
        pending_variants(study)
    assert set(unteachable_recipes(study, recipes)) == {"taught"}
    fields = {"kind": manifest.kind, "name": manifest.name, "key": Key(manifest.inputs, manifest.code)}
    with build_artifact(folder, **fields, parents=manifest.parents, facts=manifest.facts) as made:
        link_files(aside, made, manifest.files)
        (made / "note").write_text("as if drawn anew")
    assert [v.name for v in pending_variants(study)] == ["variants/taught/S1/s0"]


@pytest.mark.slow
def test_what_the_targets_are_not_made_for(taught, tmp_path):
    def why(*passes, **changes):
        study = taught.model_copy(update={"targets": taught.targets.model_copy(update=changes)})
        place = recipe_file(tmp_path, "x", *passes)
        return unteachable_recipes(study, [load_recipe(place)])["x"]

    step = {"pass": "recover", "teacher": "method", "train": TRAIN}
    assert "pass vocabulary: gives the model other tokens" in why({"pass": "vocabulary"}, step)
    reverse = {**step, "train": {**TRAIN, "loss": {"divergence": "reverse_kl"}}}
    assert "only forward_kl has an unbiased gradient" in why(reverse, form="sampled")
    warm = {**step, "train": {**TRAIN, "loss": {"temperature": 2.0}}}
    assert "2.0, but the targets were sampled at 1.0; set it to 1.0" in why(warm, form="sampled")
