"""What can be known before the first model is trained is refused then, in one line."""

import json
import shutil

import pytest

from distill.checks import check_models
from distill.pipeline import distil
from eval.core.checks import check_plan
from eval.core.errors import UserError
from eval.core.sections import Source
from eval.core.study import load_study, make_run_folder, save_study
from tests.helpers import run, tiny_model, tiny_study, tiny_tokenizer

GENERATES = ["--targets.source", "on_policy", "--train.loss.weight", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("named") / "base", tiny_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--budget", "default"],
            r"budget 'default': slice without any scored document: 'near'; accepted: far",
        ),
        (["--budget", "defalt"], r"budgets config: 'defalt'; no such file; known by name: default, tiny"),
        (["--recipes", "[int9]"], r"recipes config: 'int9'; no such file"),
        (["--recipes", "[int8, int8]"], r"name: 'int8'; another recipe has it"),
        (
            [*GENERATES, "--targets.generation.prompt_tokens", "32"],
            r"prompt_tokens: 32, and rows have 32 tokens",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        check_plan(load_study(tiny_study(tmp_path), words))


def test_such_a_plan_is_refused_before_anything_is_built_by_command_and_from_python(tmp_path):
    path, words = tiny_study(tmp_path), ["--recipes", "[int9]"]
    done = run("distill/train.py", "--config", path, *words)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    study = load_study(path, words)
    with pytest.raises(UserError, match="recipes config: 'int9'"):
        distil(study)
    assert not study.folder.exists()


def test_a_budget_relative_to_a_variant_that_is_not_built_is_refused(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("{extends: tiny, name: own, targets: {cpu: {limits: {disk: {of: int4}}}}}")
    with pytest.raises(UserError, match=r"targets\.cpu: variant: 'int4'; accepted: plain"):
        check_plan(load_study(tiny_study(tmp_path), ["--budget", str(own)]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base.architecture.hidden_sise", "8"], r"unknown key of llama: 'hidden_sise'; did you mean"),
        (["--base.architecture.model_type", "[1]"], r"base\.architecture.*: \[1\]; give a model_type that"),
        (["--base.architecture.hidden_act", "gleu"], r"base\.architecture: transformers cannot build"),
        (["--base.architecture.max_position_embeddings", "16"], r"data\.context: 32 tokens, more than .* 16"),
        (
            ["--base.architecture.max_position_embeddings", "100"],
            r"cost\.prompt_tokens \+ cost\.new_tokens: 160",
        ),
        (
            [
                "--student.start",
                "fresh",
                "--student.architecture",
                "{model_type: llama, max_position_embeddings: 8}",
            ],
            r"data\.context: 32 tokens, more than max_position_embeddings of student\.architecture: 8",
        ),
    ],
)
def test_an_architecture_that_cannot_serve_the_study_is_refused(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        check_models(load_study(tiny_study(tmp_path), words))


def test_chats_need_a_template(tmp_path, base):
    study = load_study(tiny_study(tmp_path))
    for changes in ({}, {"base": {"path": str(base)}}):
        source = {"kind": "dataset", "path": "json", "messages_column": "chat"}
        data = {**study.data.model_dump(), "documents": [source]}
        chats = load_study(tiny_study(tmp_path, data=data, **changes))
        with pytest.raises(UserError, match=r"messages_column: .* has no .*template"):
            check_models(chats)


def test_a_named_base_is_read_and_saved_before_training(tmp_path, base):
    check_models(load_study(tiny_study(tmp_path, base={"path": str(base)})))
    for words, message in (
        (["--base.path", "nobody/has-this"], r"base\.path: nobody/has-this"),
        (["--base.path", str(tmp_path)], r"base\.path: "),
    ):
        study = tiny_study(tmp_path, base={"path": str(base)})
        with pytest.raises(UserError, match=message):
            check_models(load_study(study, words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "default"], "without any scored"),
        (["--base.architecture.hidden_sise", "8"], "'hidden_size'"),
    ],
)
def test_train_refuses_them_before_it_makes_anything(tmp_path, words, message):
    done = run("distill/train.py", "--config", tiny_study(tmp_path), *words)
    assert done.returncode == 3
    assert [message in line for line in done.stderr.splitlines()] == [True], done.stderr
    assert not list((tmp_path / "runs").rglob("manifest.json"))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"hidden_size": "x"}, r"base.path: .* cannot be read \(.*hidden_size"),
        (
            "generation_config.json",
            {"temperature": 0.5, "do_sample": False},
            r"base.path: .*saved again .*temperature",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": "{{ raise_exception('no system') }}"},
            r"template of .* fails .*no system",
        ),
        (
            "tokenizer_config.json",
            {"chat_template": "{% if %}"},
            r"template of .* fails .*TemplateSyntaxError",
        ),
    ],
)
def test_a_base_with_broken_files_is_refused_in_one_line(tmp_path, base, file, changes, message):
    broken = shutil.copytree(base, tmp_path / "broken")
    content = json.loads((broken / file).read_text()) if (broken / file).is_file() else {}
    (broken / file).write_text(json.dumps({**content, **changes}))
    source = {"kind": "dataset", "path": "json", "data_files": "x.jsonl", "messages_column": "messages"}
    study = load_study(tiny_study(tmp_path, base={"path": str(broken)}))
    study = study.model_copy(update={"data": study.data.model_copy(update={"documents": [Source(**source)]})})
    with pytest.raises(UserError, match=message):
        check_models(study)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.name", "ensembel"], "did you mean 'ensemble'"),
        (["--method.settings.memberz", "2"], "method.settings: unknown key 'memberz'|memberz"),
        (["--method.settings.members", "1"], "members"),
    ],
)
def test_a_method_that_cannot_be_made_leaves_a_run_as_it_was(tmp_path, words, message):
    study = load_study(tiny_study(tmp_path))
    make_run_folder(study)
    save_study(study)
    before = {path: path.read_bytes() for path in study.folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        distil(load_study(study.folder, words), until="data")
    assert {p: p.read_bytes() for p in study.folder.rglob("*") if p in before} == before
    assert not (study.folder / "data").exists()
