"""Recipes: every file parses, order is kept, and each mistake is refused in one clear line."""

import re
import textwrap
from importlib.util import find_spec

import pytest
import yaml

from compress.recipe import Pass, Stage, load_recipe, load_recipes, pass_class
from eval.core.config import ROOT, plugin_names
from eval.core.errors import UserError
from eval.core.study import load_study
from tests.compress.student_run import recipe_file
from tests.helpers import tiny_model, tiny_study

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
PRUNE = {"pass": "wanda", "sparsity": 0.5}
DROP = {"pass": "drop_layers", "share": 0.25}
EXPORT = {"pass": "openvino", "weights": "int8"}
NF4 = {"pass": "bitsandbytes", "format": "nf4"}

OWN = """
    from compress.recipe import Pass, PassReport, Stage

    class Own(Pass):
        stage = Stage.STRUCTURE
        {more}
        def apply(self, model, context):
            raise NotImplementedError
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes a pass into a module outside of the project."""

    def write(name: str, more: str = "") -> str:
        package = tmp_path / "team"
        package.mkdir(exist_ok=True)
        (package / f"{name}.py").write_text(textwrap.dedent(OWN.format(more=more)))
        return f"team.{name}"

    monkeypatch.syspath_prepend(tmp_path)
    return write


def test_every_recipe_parses():
    here = [path for path in RECIPES if find_spec("llama_cpp") or not path.stem.startswith("gguf")]
    names = {load_recipe(str(path)).name for path in here}
    assert (
        names
        == {path.stem for path in here}
        >= {"int8", "int4", "wanda50", "depth25", "depth25-int8", "nf4", "int8-bnb", "onnx-int8"}
    )


def test_targets_and_engines():
    assert (load_recipe("int8").target, load_recipe("int8").engine) == ("cpu", "openvino")
    assert (load_recipe("nf4").target, load_recipe("nf4").engine) == ("gpu", "torch")
    assert load_recipe("wanda50").engine == "torch"


def test_every_pass_is_found_and_stands_in_a_stage():
    names = [
        "bitsandbytes",
        "cast",
        "drop_layers",
        "llama_cpp",
        "magnitude",
        "onnxruntime",
        "openvino",
        "recover",
    ]
    assert plugin_names("compress.passes") == [*names, "sparsegpt", "vocabulary", "wanda", "width"]
    for name in plugin_names("compress.passes"):
        if name == "llama_cpp" and not find_spec("llama_cpp"):  # the lock leaves it out
            continue
        kind = pass_class(name, "here")
        assert issubclass(kind, Pass)
        assert isinstance(kind.stage, Stage)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [EXPORT, PRUNE],
            r"passes\.1: wanda \(SPARSITY\) after openvino \(EXPORT\); order the passes by stage",
        ),
        ([PRUNE, DROP], r"passes\.1: drop_layers \(STRUCTURE\) after wanda \(SPARSITY\)"),
        ([NF4, EXPORT], "passes.1: openvino after bitsandbytes; bitsandbytes must be the last pass"),
        ([EXPORT, EXPORT], "openvino must be the last pass"),
        ([{"pass": "wandaa"}], "passes.0.pass: 'wandaa'; did you mean 'wanda'"),
        ([{"pass": "no.such_module"}], "is it on PYTHONPATH"),
        ([{"pass": "compress.recipe"}], "Pass must define `stage` and `apply`"),
        ([{"sparsity": 0.5}], "passes.0.pass: None; name one of"),
        ([{**PRUNE, "sparsty": 1}], "unknown key sparsty.*did you mean 'sparsity'"),
        ([{**PRUNE, "sparsity": 1.5}], "passes.0: sparsity: 1.5; expected less than 1"),
        ([{**PRUNE, "pattern": "2:4"}], "not both"),
        ([{"pass": "wanda", "pattern": "4:4"}], "keeps everything"),
        ([{"pass": "magnitude", "pattern": "2:4", "allocation": "owl"}], "owl needs `sparsity`"),
        ([{"pass": "wanda", "pattern": "two"}], "pattern"),
        ([{"pass": "recover"}], "passes.0: train: missing"),
        ([], "passes"),
    ],
)
def test_mistakes(tmp_path, passes, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_file(tmp_path, "wrong", *passes))


def test_a_name_that_means_something_else(tmp_path):
    with pytest.raises(UserError, match="means the uncompressed student"):
        load_recipe(recipe_file(tmp_path, "plain", PRUNE))
    path = tmp_path / "up.yaml"
    path.write_text(yaml.safe_dump({"name": "../up", "target": "cpu", "passes": [PRUNE]}))
    with pytest.raises(UserError, match=r"name: '\.\./up'"):
        load_recipe(str(path))


def test_two_recipes_of_one_name(tmp_path):
    study = load_study(tiny_study(tmp_path, recipes=["wanda50", recipe_file(tmp_path, "wanda50", PRUNE)]))
    with pytest.raises(UserError, match="'wanda50'; another recipe has it"):
        load_recipes(study)


def test_a_pass_of_ones_own(tmp_path, outside):
    recipe = load_recipe(recipe_file(tmp_path, "own", {"pass": outside("mine")}))
    assert recipe.passes[0].name == "team.mine"


def test_a_missing_library_is_named(tmp_path, outside):
    own = outside("needy", more='needs = ("library_that_nobody_has",)')
    with pytest.raises(
        UserError, match="needs library_that_nobody_has, which is not installed; install its package"
    ):
        load_recipe(recipe_file(tmp_path, "own", {"pass": own}))


def test_the_identity_follows_options_and_code(tmp_path, outside):
    def identity(**options):
        recipe = load_recipe(recipe_file(tmp_path, "one", {**PRUNE, **options}))
        return [recipe.settings, recipe.code]

    assert identity() == identity() != identity(sparsity=0.4)


def test_the_pass_of_the_guide_works_as_printed(tmp_path, monkeypatch):
    code, text = re.findall(
        r"```(?:python|yaml)\n(.*?)```", (ROOT / "docs" / "own-pass.md").read_text(), re.S
    )
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "round_embeddings.py").write_text(code)
    (tmp_path / "rounded.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = load_recipe(str(tmp_path / "rounded.yaml"))
    model = tiny_model()
    rounded, report = recipe.passes[1].apply(model, None)
    grid = rounded.get_input_embeddings().weight
    assert grid.unique().numel() <= 257
    assert report.after.parameters == report.before.parameters
