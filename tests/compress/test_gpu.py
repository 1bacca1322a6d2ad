"""Variants where there is a GPU: passes that calibrate and retrain on it, formats that are for it. Not run by us yet."""

import copy

import pytest
import torch

from compress.build import build_folder, build_variants
from compress.pipeline import pending_variants
from compress.publish import publish_variant
from distill.trainer.loop import accelerator
from eval.core.artifacts import read_manifest
from eval.core.documents import collate
from eval.engines import load_engine
from tests.compress.student_run import build_student_run, context_of, recipe_file
from tests.compress.test_passes import make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RECOVER = {"pass": "recover", "train": {"steps": 4, "rows": 4, "optimizer": {"name": "muon", "lr": 0.01}}}
RECIPES = {
    "wanda": [{"pass": "wanda", "rows": 4}],
    "sparsegpt": [{"pass": "sparsegpt", "rows": 4}],
    "shallow": [{"pass": "drop_layers", "share": 0.25, "rows": 4}, RECOVER],
    "nf4": [{"pass": "bitsandbytes", "format": "nf4"}],
    "int8-bnb": [{"pass": "bitsandbytes", "format": "int8"}],
    "half": [{"pass": "cast", "dtype": "float16"}],
}


def test_every_recipe_is_built_verified_and_answers_on_the_gpu(tmp_path):
    names = [recipe_file(tmp_path, name, *passes, target="gpu") for name, passes in RECIPES.items()]
    study = build_student_run(tmp_path, names)
    variants = [variant for variant in pending_variants(study) if variant.student.arm == "S1"]
    build_variants(study, variants, lambda share: None)
    rows = context_of(study, tmp_path / "work").rows
    batch = collate(list(rows[:4]), 0)
    real = batch.attention_mask.bool()
    for variant in variants:
        assert build_folder(study, variant).is_dir()
        publish_variant(study, variant, lambda share: None)
        folder = study.folder / variant.name
        assert read_manifest(folder).facts["engine"] == "torch"
        cpu, gpu = (
            load_engine("torch", folder, device=device).logits(batch).cpu()[real]
            for device in ("cpu", "cuda")
        )
        assert torch.isfinite(gpu).all()
        near = {"nf4": 0.1, "int8-bnb": 0.2, "half": 0.02}.get(variant.recipe.name, 1e-3)
        assert float((cpu.log_softmax(-1) - gpu.log_softmax(-1)).abs().mean()) < near, variant.name


@pytest.mark.parametrize(("name", "options"), [("wanda", {"rows": 4}), ("drop_layers", {"share": 0.25})])
def test_calibration_on_the_gpu_changes_what_it_changes_on_a_cpu(tmp_path, name, options):
    study = build_student_run(tmp_path, [])
    context = context_of(study, tmp_path / "work")
    (cpu, one), (gpu, other) = (
        make(name, options).apply(copy.deepcopy(context.parent).to(place), context)
        for place in ("cpu", "cuda")
    )
    assert one.facts == other.facts, "the layers dropped"
    changed = total = 0
    for left, right in zip(cpu.parameters(), gpu.parameters(), strict=True):
        changed += int(((left == 0) != (right.cpu() == 0)).sum())
        total += left.numel()
    assert changed / total < 1e-3, "zeros where two scores are all but equal"


def test_recovery_trains_on_the_gpu_and_leaves_the_parent_on_the_cpu(tmp_path):
    study = build_student_run(tmp_path, [])
    context = context_of(study, tmp_path / "work")
    assert accelerator().device.type == "cuda"
    shallow, _ = make("drop_layers", {"share": 0.25}).apply(copy.deepcopy(context.parent), context)
    model, report = make("recover", {"train": RECOVER["train"]}).apply(shallow, context)
    assert {p.device.type for p in (*model.parameters(), *context.parent.parameters())} == {"cpu"}
    assert report.facts["loss_curve"][-1][1] < report.facts["loss_curve"][0][1] * 1.5
