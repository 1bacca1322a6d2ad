"""A base in 16 bits: it, its students and their variants are stored and served in 16 bits, trained in 32."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from compress.build import TrainedStudent, Variant, build_folder, build_variants
from compress.publish import publish_variant
from compress.recipe import load_recipes
from distill.pipeline import make_base, make_student, prepare_inputs
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest, verify_artifact
from eval.core.errors import UserError
from eval.core.study import load_study
from eval.engines.torch import load, load_model, stored_dtype
from tests.compress.student_run import recipe_file
from tests.compress.test_passes import make
from tests.helpers import tiny_model, tiny_study, tiny_tokenizer

RECIPES = {
    "half": {"pass": "wanda", "sparsity": 0.5},
    "fp16": {"pass": "cast", "dtype": "float16"},
    "nf4": {"pass": "bitsandbytes", "format": "nf4"},
    "int8": {"pass": "openvino", "weights": "int8"},
}


def quiet(share, tokens=0):
    return None


def dtypes(folder):
    return {w.dtype for file in folder.glob("*.safetensors") for w in load_file(file).values()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    tiny_model(330).to(torch.bfloat16).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    recipes = [recipe_file(folder, name, step) for name, step in RECIPES.items()]
    study = load_study(tiny_study(folder, seeds=[0], base={"path": str(folder / "model")}, recipes=recipes))
    prepare_inputs(study, accelerator())
    make_base(study, 0, quiet)
    make_student(study, "CE", 0, quiet)
    return study


def test_base_and_student_are_stored_and_served_in_bf16(study):
    for name in ("base/s0", "students/CE/s0"):
        assert dtypes(study.folder / name) == {torch.bfloat16}
        assert load(study.folder / name, 1, "cpu").model.dtype == torch.bfloat16
    base, student = (load_model(study.folder / n).state_dict() for n in ("base/s0", "students/CE/s0"))
    assert any(not torch.equal(base[name], student[name]) for name in base), "the student was not trained"


@pytest.mark.parametrize("recipe", RECIPES)
def test_variants_keep_it_unless_they_say_otherwise(study, recipe):
    folder = study.folder / "students/CE/s0"
    rows = study.data.context, study.data.train_rows
    data = verify_artifact(study.folder / "data").hash
    student = TrainedStudent("CE", 0, folder, verify_artifact(folder).hash, data, rows)
    variant = Variant(student, next(r for r in load_recipes(study) if r.name == recipe))
    build_variants(study, [variant], quiet)
    assert build_folder(study, variant).is_dir()
    publish_variant(study, variant, quiet)
    report = read_manifest(study.folder / variant.name).facts["reports"][-1]
    student_bytes = sum(w.nbytes for w in load_file(folder / "model.safetensors").values())
    assert report["before"]["bytes"] == student_bytes
    if recipe == "int8":
        assert report["after"]["bytes"] < student_bytes
        return
    stored = dtypes(study.folder / variant.name)
    if recipe == "nf4":
        assert stored == {torch.bfloat16, torch.uint8, torch.float32}  # float32: scales of blocks
        return
    wanted = torch.float16 if recipe == "fp16" else torch.bfloat16
    assert stored == {wanted}
    assert report["after"]["bytes"] == student_bytes
    assert stored_dtype(study.folder / variant.name) == wanted


def test_a_cast_rounds_each_weight_once(study):
    from compress.recipe import Context

    model = tiny_model(330)
    context = Context(model, tiny_tokenizer(), [], 0, 0, study.folder, quiet, torch.float32, lambda: iter(()))
    cast, report = make("cast", {"dtype": "bfloat16"}).apply(copy.deepcopy(model), context)
    for (name, weight), (_, new) in zip(model.named_parameters(), cast.named_parameters(), strict=True):
        assert torch.equal(weight.to(torch.bfloat16), new), name
    assert 0 < report.facts["worst_rounding"] <= 2**-8, "half of the spacing of 8 significant bits"
    assert report.after.bytes * 2 == report.before.bytes
    assert report.reached == report.named == report.after.parameters
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(
        UserError, match=r"model.embed_tokens.weight: a weight of 1e\+05 is beyond .*6.55e\+04"
    ):
        make("cast", {"dtype": "float16"}).apply(model, context)
