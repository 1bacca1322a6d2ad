"""A run folder with tiny students that no distillation was needed for.

Not `run_builder.fake_run`, because a recipe calibrates and retrains: its students are slightly trained, on prepared
data and with a tokenizer of that data.
"""

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.passes.recover import parent_target
from compress.recipe import Context, MethodTargets
from distill.data.rows import training_documents, training_rows
from distill.data.split import prepare
from distill.models.load import train_tokenizer
from distill.teachers.target_source import TargetSource
from distill.trainer.loop import train
from eval.core.sections import Train
from eval.core.study import Study, load_study, save_study
from eval.engines.torch import load_checkpoint
from tests.distill.test_families import FAMILIES
from tests.eval.run_builder import facts, put
from tests.helpers import WORDS, text, tiny_model, tiny_study, tiny_tokenizer

VOCAB = 320


def recipe_file(folder: Path, name: str, *passes: dict, target: str = "cpu") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "target": target, "passes": list(passes)}))
    return str(path)


def build_student_run(
    folder: Path, recipes: list[str], seeds: list[int] | None = None, layers: int = 4, tokenizer=None
) -> Study:
    """A settled study with data and with students S1 and S0 of every seed, slightly trained."""
    tokenizer = tokenizer or tiny_tokenizer(VOCAB)
    torch.set_num_threads(1)
    study = load_study(tiny_study(folder, recipes=recipes, seeds=seeds or [0], workers=1))
    save_study(study)
    prepare(study)
    rows = training_rows(study, tokenizer)
    for seed in study.seeds:
        model = tiny_model(len(tokenizer), seed=seed, num_hidden_layers=layers)
        settings = Train(steps=15, rows=4)
        train(model, rows, settings, pad=0, seed=seed, teacher=None, scratch=folder / "nothing")
        for arm in ("S1", "S0"):
            add_student(study, arm, seed, model, tokenizer)
            with torch.no_grad():
                model.model.norm.weight *= 1.05
    return study


def add_student(study: Study, arm: str, seed: int, model: PreTrainedModel, tokenizer) -> None:
    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    put(study.folder, f"students/{arm}/s{seed}", fill, **facts(arm, seed=seed))


def wide_tokenizer():
    """With tokens that no document of the study has, merged in between those that they have."""
    texts = [text(domain, i) for domain in WORDS for i in range(5)]
    return train_tokenizer([*texts, "zebras quickly jumped over 1234 lazy oxen " * 40], 360)


def family(name: str, **changes) -> PreTrainedModel:
    """A model of a family at random, of few layers; without the window of Mistral, which no engine file has."""
    torch.manual_seed(0)
    fields = {**FAMILIES[name], **({"sliding_window": None} if name == "mistral" else {}), **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))  # norms and biases too
    return model.eval()


def small_context(folders: pytest.TempPathFactory) -> Context:
    """What the passes get for a student of two layers."""
    study = build_student_run(folders.mktemp("study"), [], layers=2)
    return context_of(study, folders.mktemp("work"))


def context_of(study: Study, scratch: Path) -> Context:
    """What the passes of a recipe get for S1 of the first seed."""
    scratch.mkdir(parents=True, exist_ok=True)
    parent, tokenizer = load_checkpoint(study.folder / "students" / "S1" / f"s{study.seeds[0]}")
    rows = training_rows(study, tokenizer)
    documents, seed = partial(training_documents, study), study.seeds[0]
    other = tiny_model(len(tokenizer), seed=7)  # stands at the place of a teacher with a method
    source = TargetSource(rows, partial(parent_target, other))
    method = MethodTargets("another model", lambda: nullcontext(source))
    quiet, dtype = lambda share: None, torch.float32
    return Context(parent, tokenizer, rows, 0, seed, scratch, quiet, dtype, documents, method)


def model_of(context: Context) -> PreTrainedModel:
    return copy.deepcopy(context.parent)
