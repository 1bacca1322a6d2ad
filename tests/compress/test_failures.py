"""A recipe that cannot be built is told in one line, and stops no other."""

import json
import shutil
import textwrap
from dataclasses import replace

import pytest
import torch
import yaml

from compress.build import Variant, VariantBuilder, build_variants
from compress.calibration import check_rows, own_rows
from compress.pipeline import empty_model, find_students
from compress.recipe import load_recipe, make_pass
from eval.core.checks import read_unbuilt
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections.recipe import RecipeFile
from eval.gate.decision import judge
from eval.score.__main__ import missing_lines
from tests.compress.student_run import build_student_run, context_of, recipe_file
from tests.eval.run_builder import Run
from tests.helpers import run, tiny_model

BROKEN = """
    from compress.recipe import Pass, Stage

    class Broken(Pass):
        stage = Stage.STRUCTURE

        def apply(self, model, context):
            raise RuntimeError("the library\\nhas its own error")
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A good recipe between one that is written wrong, one that does not fit and one that breaks at work."""
    folder = tmp_path_factory.mktemp("failures")
    (folder / "team").mkdir()
    (folder / "team" / "broken.py").write_text(textwrap.dedent(BROKEN))
    recipes = [
        recipe_file(folder, "wrong", {"pass": "wandaa"}),
        recipe_file(folder, "grouped", {"pass": "openvino", "weights": "int4", "group_size": 48}),
        recipe_file(folder, "broken", {"pass": "team.broken"}),
        recipe_file(folder, "w50", {"pass": "wanda", "rows": 4}),
    ]
    study = build_student_run(folder, recipes, layers=2)
    words = ("-m", "compress.run", "--study", study.folder)
    return study, run(*words, PYTHONPATH=str(folder)), folder


def test_the_others_are_built_and_each_failure_is_one_line(done):
    study, result, _ = done
    assert result.returncode == 3
    assert sorted(p.name for p in study.folder.glob("variants/*")) == ["w50"]
    assert f"variants: 2 in {study.folder / 'variants'}, 2 made now" in result.stdout
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines == result.stderr.splitlines()[-3:]
    wrong, grouped, broken = lines
    assert "recipe wrong was not built: " in wrong
    assert "'wandaa'; did you mean 'wanda'" in wrong
    assert (
        "openvino.group_size: the 64 inputs of model.layers.0.self_attn.q_proj are no multiple of 48"
        in grouped
    )
    assert "recipe broken was not built: S1/s0: RuntimeError: the library has its own error" in broken
    assert "RuntimeError" in (study.folder / "log.txt").read_text()


def test_what_does_not_fit_is_said_before_any_work(done):
    _, result, _ = done
    before, _, _ = result.stdout.partition("variants:")
    assert "recipe grouped is left out: openvino.group_size" in before
    assert "recipe wrong is left out" in before
    assert "recipe broken" not in before


def test_absorb_says_what_was_not_built_and_goes_on(done):
    study, _, _ = done
    shown = run("-m", "eval.cli", "--study", study.folder).stdout
    assert "✔ absorb compress" in shown
    assert "[2 of 2 variants; wrong was not built: " in shown
    assert "not there: recipe grouped was not built: openvino.group_size" in "".join(missing_lines(study))


def test_the_gate_judges_the_others_and_says_what_was_not_built(tmp_path):
    toy = Run(tmp_path).make()
    shutil.rmtree(toy.path / "records" / "score" / "half")
    with pytest.raises(UserError, match="recipe 'half'"):
        judge(toy.path)
    (toy.path / "unbuilt.json").write_text(
        json.dumps({"half": "some.option: too much; give less", "gone": ""})
    )
    verdict = judge(toy.path)
    assert {row.recipe for row in verdict.variants} == {"plain", "int8"}
    assert "recipe half was not built: some.option: too much; give less" in verdict.notes
    assert not any("gone" in note for note in verdict.notes)


def test_a_recipe_that_is_put_right_is_forgotten_and_one_that_is_not_asked_for_is_not(done):
    study, _, folder = done
    path = recipe_file(folder, "grouped", {"pass": "cast", "dtype": "bfloat16"})
    again = run("-m", "compress.run", "--study", study.folder, "--recipes", f"[{path}]")
    assert again.returncode == 0, again.stderr
    assert sorted(read_unbuilt(study.folder)) == ["broken", "wrong"]
    (study.folder / "unbuilt.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no recipes with reasons; delete it"):
        read_unbuilt(study.folder)


def test_shapes_are_followed_through_the_passes_before(tmp_path, done):
    """A width that is cut first makes the group size fit, or not."""
    study, _, _ = done
    model = empty_model(study.folder / "students" / "S1" / "s0")
    narrow = make_pass({"pass": "width", "ffn": 0.25, "multiple": 32}, "here").preview(model)
    assert narrow.config.intermediate_size == 96
    with pytest.raises(
        UserError, match=r"the 96 inputs of model\.layers\.0\.mlp\.down_proj are no multiple of 64"
    ):
        make_pass({"pass": "bitsandbytes", "format": "nf4"}, "here").preview(narrow)
    short = make_pass({"pass": "drop_layers", "share": 0.5}, "here").preview(tiny_model(num_hidden_layers=4))
    assert short.config.num_hidden_layers == 2


def test_calibration_that_is_empty_or_of_another_tokenizer(done, tmp_path):
    study, _, _ = done
    context = context_of(study, tmp_path / "work")
    check_rows(context, context.parent)
    with pytest.raises(UserError, match="calibration: no rows"):
        check_rows(replace(context, rows=[]), context.parent)
    with pytest.raises(
        UserError, match="token id 999, the model has 320 tokens; give rows of the model's own"
    ):
        check_rows(replace(context, rows=[Row("d", "x", 0, [1, 999])]), context.parent)


def recipe_with(folder, name, text, passes, **calibration):
    """A recipe with documents of its own."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in text))
    source = {"kind": "dataset", "path": "json", "data_files": str(folder / f"{name}.jsonl")}
    settings = {
        "name": name,
        "target": "cpu",
        "passes": passes,
        "calibration": {"documents": [source], **calibration},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / f"{name}.yaml")


def test_a_recipe_calibrates_on_documents_of_its_own(done, tmp_path):
    study, _, _ = done
    passes, train = [{"pass": "wanda", "rows": 8}], {"steps": 1, "rows": 4}
    place = recipe_with(tmp_path, "own", ["stone river " * 40, "rain under trees " * 40], passes)
    plain, own = load_recipe(recipe_file(tmp_path, "plain-rows", *passes)), load_recipe(place)
    assert plain.passes[0].identity != own.passes[0].identity
    student = find_students(study)[0]
    zeros = []
    for recipe in (plain, own):
        builder = VariantBuilder(study, [Variant(student, recipe)])
        model, _ = builder.apply_passes(recipe.passes)
        zeros.append(model.model.layers[1].mlp.down_proj.weight == 0)
    assert not torch.equal(*zeros)
    rows = own_rows(own.passes[0].calibration, builder.context.tokenizer, 32)
    assert "river" in builder.context.tokenizer.decode(rows[0].tokens)
    with_recovery = recipe_with(
        tmp_path, "both", ["a"], [*passes, {"pass": "recover", "train": train}], rows=5
    )
    wanda, recover = load_recipe(with_recovery).passes
    assert (wanda.calibration.rows, recover.calibration) == (5, None)
    before = own.passes[0].settings
    (tmp_path / "own.jsonl").write_text('{"text": "another"}\n')
    assert load_recipe(place).passes[0].settings != before, "the state of the sources is in the key"


def test_own_documents_without_text_and_calibration_in_an_included_recipe(done, tmp_path):
    study, _, _ = done
    place = recipe_with(tmp_path, "none", [], [{"pass": "wanda"}])
    failures = build_variants(
        study, [Variant(find_students(study)[0], load_recipe(place))], lambda share: None
    )
    assert "no rows" in failures["none"] or "no row" in failures["none"] or "empty" in failures["none"]
    with pytest.raises(UserError, match=r"passes\.0\.include: .*none.yaml has a calibration of its own"):
        load_recipe(recipe_file(tmp_path, "outer", {"include": place}))


def test_a_recipe_without_calibration_is_written_as_before():
    """The hash of a plan that was fixed earlier stays as it was."""
    file = RecipeFile(name="a", target="cpu", passes=[{"pass": "wanda"}])
    assert list(file.model_dump(mode="json")) == ["name", "target", "passes"]
