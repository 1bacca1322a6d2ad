"""Every YAML under configs/ is what its folder says, and an error names the place, the value and the fix."""

from importlib.util import find_spec

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from compress.recipe import load_recipe
from distill.method import make_method
from eval.core.budget import Budget, load_budget
from eval.core.config import ROOT, apply_overrides, find_config, read_yaml, validate_config
from eval.core.errors import UserError
from eval.core.sections import MethodChoice
from eval.core.study import (
    Study,
    check_trained,
    load_study,
    make_run_folder,
    mark_trained,
    read_recipe,
    save_study,
)
from eval.watch.routing import Plan
from scripts.write_config_docs import config_docs

LAUNCHED = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero3": "DEEPSPEED"}
CONFIGS = sorted((ROOT / "configs").rglob("*"))


def test_every_config_is_read():
    seen = {"studies": 0, "methods": 0, "recipes": 0, "budgets": 0, "accelerate": 0, "rollouts": 0}
    for path in (p for p in CONFIGS if p.is_file()):
        assert path.suffix == ".yaml", f"{path}: configs/ holds YAML alone"
        kind = path.parent.name
        seen[kind] += 1
        if kind in ("studies", "methods"):
            study = load_study(path)
            assert study.name == path.stem
            assert kind == "studies" or study.method.name == path.stem
            make_method(study.method)
            assert load_budget(study).targets
            assert [load_recipe(name) for name in study.recipes] or study.name == "try"
        elif path.stem.startswith("gguf") and find_spec("llama_cpp") is None:  # the lock leaves it out
            with pytest.raises(UserError, match=r"run `pip install '\.\[llama_cpp\]'`"):
                load_recipe(path.stem)
        elif kind == "recipes":
            assert load_recipe(path.stem).name == path.stem
        elif kind == "rollouts":
            assert validate_config(Plan, read_yaml(path, "rollouts"), str(path)).name == path.stem
        elif kind == "accelerate":
            settings = load_config_from_file(str(path))
            assert (settings.mixed_precision, settings.num_processes) == ("no", 2)
            assert settings.distributed_type == LAUNCHED[path.stem]
        else:
            assert validate_config(Budget, read_yaml(path, "budgets"), str(path)).name == path.stem
    assert seen == {"studies": 8, "methods": 13, "recipes": 20, "budgets": 4, "accelerate": 3, "rollouts": 1}


def test_mandatory_slices_of_a_studys_budget_are_slices_of_its_data():
    for path in [
        *(ROOT / "configs" / "studies").glob("*.yaml"),
        *(ROOT / "configs" / "methods").glob("*.yaml"),
    ]:
        study = load_study(path)
        assert set(load_budget(study).slices) <= set(study.data.shifted)


def raw():
    return read_yaml(ROOT / "configs" / "studies" / "default.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trian.steps", "5"], r"unknown key trian: 'trian'; did you mean 'train'"),
        (["--train.optimizer.momentun", "1"], r"train\.optimizer\.momentun.*did you mean 'momentum'"),
        (["--train.loss.weight", "1.5"], r"train\.loss\.weight: 1\.5; .*at most 1"),
        (["--train.rows", "4", "--train.accumulate", "3"], "multiple of accumulate"),
        (["--ce_train.optimizer.lrr", "1"], r"unknown key ce_train\.optimizer\.lrr.*did you mean 'lr'"),
        (["--ce_train.rows", "401"], r"ce_train\.rows is 401, more than data\.train_rows: 400"),
        (["--data.context", "many"], r"data\.context: 'many'"),
        (["train.steps", "5"], "overrides look like"),
        (["--name.first", "x"], "'name' holds no keys"),
    ],
)
def test_errors_name_the_place_the_value_and_the_fix(words, message):
    def read():
        settings = raw()
        apply_overrides(settings, words)
        return validate_config(Study, settings, "default.yaml")

    with pytest.raises(UserError, match=message):
        read()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("train.optimizer.lr", value, "expected a finite number") for value in (".inf", ".nan", "1e999")),
        ("train.optimizer.lr", "inf", "expected a finite number"),
        ("train.optimizer.lr", "true", "expected a number, not true or false"),
        ("train.optimizer.weight_decay", ".inf", "finite"),
        ("train.optimizer.betas", "[5, .nan]", "finite"),
        ("train.optimizer.betas", "[0.9, 1]", "less than 1"),
        ("train.loss.temperature", ".inf", "finite"),
        ("train.clip", ".inf", "finite"),
        ("base.architecture.rope_theta", ".inf", "finite"),
        ("base.vocab_size", "16777217", "at most 16777216"),
        ("seeds", "[true, false]", "not true or false"),
        ("seeds", "[4294967296]", "less than 4294967296"),
        ("workers", "true", "not true or false"),
    ],
)
def test_a_number_that_is_none_or_beyond_its_range_is_refused(key, value, message):
    with pytest.raises(UserError, match=rf"^.*default\.yaml: {key.removesuffix('.rope_theta')}.*{message}"):
        load_study(ROOT / "configs" / "studies" / "default.yaml", [f"--{key}", value])


def test_numbers_of_a_budget_and_of_a_method_are_checked_in_the_same_way():
    budget = read_yaml(ROOT / "configs" / "budgets" / "tiny.yaml", "budgets")
    with pytest.raises(UserError, match="f: True; expected a number, not true or false"):
        validate_config(Budget, {**budget, "f": True}, "tiny")
    limit = {"cpu": {"device": "cpu", "limits": {"disk": {"at_most": True, "unit": "MiB"}}}}
    with pytest.raises(UserError, match="at_most: True; expected a number, not true or false"):
        validate_config(Budget, {**budget, "targets": limit}, "tiny")
    with pytest.raises(UserError, match="members: True; expected a number, not true or false"):
        make_method(MethodChoice(name="ensemble", settings={"members": True}))


@pytest.mark.parametrize("name", ["../../escaped", "/abs", "", "x y<b>", ".", "..", "a" * 101])
def test_a_name_that_becomes_a_file_name_stays_inside_the_run(tmp_path, name):
    source, task = [{"kind": "pydoc"}], {"kind": "f1", "path": "a.jsonl"}
    for key, content in (("shifted", {name: source}), ("tasks", {name: task})):
        path = write_yaml(tmp_path / "own.yaml", extends="tiny", name="own", data={key: content})
        with pytest.raises(UserError, match=rf"own\.yaml: data\.{key}\..*expected"):
            load_study(path)
    budget = read_yaml(ROOT / "configs" / "budgets" / "tiny.yaml", "budgets")
    with pytest.raises(UserError, match=r"targets\..*expected"):
        validate_config(Budget, {**budget, "targets": {name: {"device": "cpu"}}}, "tiny")


def test_a_missing_key_is_named():
    settings = raw()
    del settings["method"]
    with pytest.raises(UserError, match="method: missing; add this key"):
        validate_config(Study, settings, "default.yaml")


def test_overrides_take_both_forms_and_yaml_values():
    settings = raw()
    apply_overrides(settings, ["--train.steps=7", "--seeds", "[3, 4]", "--train.optimizer.lr", "1e-3"])
    study = validate_config(Study, settings, "default.yaml")
    assert (study.train.steps, study.seeds, study.train.optimizer.lr) == (7, [3, 4], 1e-3)


BOMB = "[" + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}' if i else '1'] * 10)}]" for i in range(8)) + "]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("&a {x: *a}", r"alias \*a stands inside what it names"),
        (BOMB, r"100,000 characters of aliases"),
        ("2024-13-45", r"'2024-13-45' cannot be read: month must be in 1\.\.12"),
        ("1" * 5000, "'1{40}' cannot be read"),
        ("0x" + "f" * 5000, "cannot be read: the integer has more than 64 bits"),
        ("[" * 3000, "more than 50 levels"),
    ],
    ids=["self", "bomb", "date", "digits", "bits", "nested"],
)
def test_yaml_that_cannot_be_read_is_refused_in_one_line(tmp_path, value, message):
    path = tmp_path / "a.yaml"
    path.write_text(f"settings: {value}\n")
    for read in (lambda: read_yaml(path), lambda: apply_overrides({}, ["--settings", value])):
        with pytest.raises(UserError, match=message) as error:
            read()
        assert len(str(error.value)) < 600


def test_an_override_does_not_reach_what_an_alias_shares(tmp_path):
    shared = tmp_path / "aliases.yaml"
    shared.write_text("a: &x {steps: 1, deep: [{lr: 1}]}\nb: *x\n")
    settings = read_yaml(shared)
    apply_overrides(settings, ["--a.steps", "5"])
    settings["a"]["deep"][0]["lr"] = 2
    assert settings["b"] == {"steps": 1, "deep": [{"lr": 1}]}


@pytest.fixture
def settled(tmp_path):
    study = validate_config(Study, raw(), "default.yaml").model_copy(update={"runs": str(tmp_path)})
    make_run_folder(study)
    save_study(study)
    return study


def test_a_settled_study_reads_back_the_same_from_wherever_its_folder_lies(settled, tmp_path):
    assert load_study(settled.folder) == settled
    check_trained(load_study(settled.folder))
    moved = tmp_path / "elsewhere" / "default"
    moved.parent.mkdir()
    settled.folder.rename(moved)
    assert load_study(moved).folder == moved
    assert load_study(moved).hash() == settled.hash()
    moved.rename(moved.with_name("other"))
    with pytest.raises(UserError, match=r"its study.yaml is of 'default'; rename"):
        load_study(moved.with_name("other"))


def test_later_stages_refuse_models_of_two_settings(settled):
    """Training with other settings that was stopped midway leaves some models of the old ones."""
    changed = load_study(settled.folder, ["--train.optimizer.lr", "0.5"])
    save_study(changed)
    save_study(changed)  # gone on with, and stopped again
    with pytest.raises(UserError, match="its models are of both; run `absorb train --config"):
        check_trained(changed)
    mark_trained(changed)
    check_trained(changed)
    save_study(changed)
    check_trained(changed)


def test_later_stages_refuse_other_settings(settled):
    changed = load_study(settled.folder, ["--train.optimizer.lr", "0.5"])
    with pytest.raises(
        UserError, match=r"train\.optimizer\.lr of run .*was 0\.01 when it was trained, here it is 0\.5"
    ):
        check_trained(changed)
    check_trained(load_study(settled.folder, ["--recipes", "[int8]", "--workers", "1"]))
    with pytest.raises(UserError, match=r"no study\.yaml; run `absorb train"):
        check_trained(changed.model_copy(update={"name": "unknown"}))


def test_a_study_is_frozen_and_its_hash_covers_what_decides_the_models():
    study = validate_config(Study, raw(), "default.yaml")
    with pytest.raises(ValueError, match="frozen"):
        study.name = "other"  # type: ignore[misc]
    assert study.model_copy(update={"recipes": []}).hash() == study.hash()
    assert study.model_copy(update={"seeds": [0, 1]}).hash() != study.hash()


def test_wrong_names_and_broken_files_are_refused(tmp_path):
    with pytest.raises(
        UserError,
        match=r"configs/budgets: 'defalt'; no such file; known by name: default, smollm2, spam, tiny",
    ):
        find_config("budgets", "defalt")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [1, 2")
    with pytest.raises(UserError, match="fix the YAML"):
        load_study(broken)
    broken.write_text("- a\n- list\n")
    with pytest.raises(UserError, match="list; the file must hold a mapping"):
        load_study(broken)


def test_the_readmes_own_study_is_accepted(tmp_path):
    block = (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "mine.yaml").write_text(block)
    study = load_study(tmp_path / "mine.yaml")
    assert (study.base.path, study.base.architecture) == ("Qwen/Qwen3-0.6B", None)
    assert study.method.settings == {}
    assert set(load_budget(study).slices) <= set(study.data.shifted)


def test_a_run_folder_of_another_format_is_refused_with_what_to_do(tmp_path):
    study = load_study(ROOT / "configs" / "studies" / "tiny.yaml", ["--runs", str(tmp_path)])
    settle_in = make_run_folder(study) / "study.yaml"
    settle_in.write_text("name: tiny\ndata: {heldout: 4, sealed: 2}\n")  # as version 0.2 wrote it
    for refused in (
        lambda: load_study(study.folder),
        lambda: save_study(study),
        lambda: check_trained(study),
    ):
        with pytest.raises(
            UserError, match=r"the format of its study.yaml is 1, this version reads 2; delete the folder"
        ):
            refused()
    assert "heldout" in settle_in.read_text()


def write_yaml(path, **content):
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_config_lays_its_keys_over_those_it_extends(tmp_path):
    write_yaml(tmp_path / "a.yaml", name="a", seeds=[1, 2], train={"rows": 4, "clip": 2.0}, budget="default")
    write_yaml(tmp_path / "b.yaml", name="b", train={"rows": 8, "decay": 0.1}, title="of b")
    child = write_yaml(
        tmp_path / "child.yaml",
        extends=["a", "b.yaml"],
        name="c",
        seeds=[3],
        train={"clip": None, "steps": 5},
    )
    assert read_yaml(child) == {
        "name": "c", "seeds": [3], "budget": "default", "train": {"rows": 8, "decay": 0.1, "steps": 5}
    }  # fmt: skip
    heir = write_yaml(tmp_path / "heir.yaml", extends="tiny", name="heir", train={"epochs": 3})
    study, tiny = load_study(heir), load_study(ROOT / "configs" / "studies" / "tiny.yaml")
    assert (study.title, study.train.epochs, study.train.optimizer) == ("", 3, tiny.train.optimizer)
    assert load_budget(study, str(write_yaml(tmp_path / "g.yaml", extends="tiny", name="g", f=0.9))).f == 0.9


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("heir", r"heir\.yaml: extends: heir\.yaml -> heir\.yaml; files name each other in a circle"),
        ("other", r"other\.yaml: extends: heir\.yaml -> other\.yaml -> heir\.yaml; files name each other"),
        ("tinny", r"heir\.yaml: a file of configs/studies: 'tinny'; no such file; known by name: default"),
        ({"a": 1}, r"heir\.yaml: extends: \{'a': 1\}; give a name, a path or a list of them"),
        ([], r"heir\.yaml: extends: \[\]; give a name"),
    ],
)
def test_what_a_config_cannot_extend_is_refused_in_one_line(tmp_path, extends, message):
    write_yaml(tmp_path / "other.yaml", extends="heir", name="other")
    with pytest.raises(UserError, match=message):
        load_study(write_yaml(tmp_path / "heir.yaml", extends=extends, name="heir"))


def test_a_config_that_extends_another_needs_a_name_of_its_own(tmp_path):
    with pytest.raises(UserError, match=r"heir\.yaml: name: missing; add this key"):
        load_study(write_yaml(tmp_path / "heir.yaml", extends="tiny"))


def test_a_recipe_includes_the_passes_of_others(tmp_path):
    both = read_recipe("depth25-int8")[1].passes
    assert both == read_recipe("depth25")[1].passes + read_recipe("int8")[1].passes
    for passes, message in (
        ([{"include": "own.yaml"}], r"own\.yaml: passes\.0\.include: own\.yaml -> own\.yaml; .* circle"),
        ([{"include": "int9"}], r"own\.yaml: a file of configs/recipes: 'int9'; no such file"),
        ([{"include": "int8", "weights": "int4"}], r"passes\.0: .*; give `include: NAME`"),
        ([{"include": "nf4"}], r"passes\.0\.include: nf4 is for gpu; include recipes for cpu"),
    ):
        own = write_yaml(tmp_path / "own.yaml", name="own", target="cpu", passes=passes)
        with pytest.raises(UserError, match=message):
            read_recipe(str(own))


@pytest.mark.parametrize("number", ["1e-6", "1.5e3", "-2E+4", ".5e1", "1.e-3"])
def test_a_number_with_an_exponent_is_a_number(tmp_path, number):
    path = tmp_path / "a.yaml"
    path.write_text(f"eps: {number}\nname: a1e6\nhash: 1e6a\n")
    assert read_yaml(path) == {"eps": float(number), "name": "a1e6", "hash": "1e6a"}
    raw = {}
    apply_overrides(raw, ["--base.architecture.rms_norm_eps", "1e-6"])
    assert raw["base"]["architecture"]["rms_norm_eps"] == 1e-6


def test_a_file_that_is_read_twice_is_not_what_became_of_it_in_between(tmp_path):
    (path := tmp_path / "a.yaml").write_text("name: a\nseeds: [0]\n")
    read_yaml(path)["seeds"].append(1)
    assert read_yaml(path)["seeds"] == [0]
    path.write_text("seeds: [2]\n")
    assert read_yaml(path)["seeds"] == [2]


def test_the_document_of_all_keys_is_as_written_by_its_script():
    assert (ROOT / "docs" / "config.md").read_text() == config_docs(), (
        "run python scripts/write_config_docs.py"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--seeds", "[0, 0]"], "tiny.yaml: seeds are [0, 0]; give each seed once"),
        (["--workers", "many"], "tiny.yaml: workers: 'many'; expected a whole number"),
        (["--workers", "0"], "tiny.yaml: workers: 0; expected more than 0"),
        (["--seeds", "0"], "tiny.yaml: seeds: 0; expected a list, such as [0, 1]"),
        (["--data.packing", "7"], "tiny.yaml: data.packing: 7; expected true or false"),
        (["--ce_arm", "7"], "tiny.yaml: ce_arm: 7; expected True, False or 'on_policy'"),
        (["--train", "7"], "tiny.yaml: train: 7; expected keys with values, such as {key: value}"),
        (["--data.train_rows", "0"], "tiny.yaml: data.train_rows: 0; expected more than 0"),
        (["--train.optimizer.betas", "[0.9]"], "tiny.yaml: train.optimizer.betas: [0.9]; expected 2 of them"),
        (["--seeds", "[0, a]"], "tiny.yaml: seeds.1: 'a'; expected a whole number"),
        (
            ["--accept_old", "[student, students]"],
            "tiny.yaml: accept_old.1: 'students'; accepted: data, tokenizer, tokens, base, method, targets, "
            "student, variant",
        ),
    ],
)
def test_what_is_wrong_with_a_key_is_said_in_our_words_and_no_more(words, text):
    with pytest.raises(UserError) as caught:
        load_study("tiny", words)
    assert str(caught.value).endswith(text)


def test_paths_in_a_study_are_from_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "budget.yaml").write_text("extends: tiny\nname: own\n")
    (tmp_path / "first.yaml").write_text("extends: tiny\nname: first\nbudget: budget.yaml\n")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "second.yaml").write_text("extends: ../first.yaml\nname: second\n")
    for name in ("first.yaml", "below/second.yaml"):
        assert load_budget(load_study(tmp_path / name)).name == "own"
    monkeypatch.chdir(tmp_path)
    assert load_budget(load_study("tiny", ["--budget", "budget.yaml"])).name == "own"
