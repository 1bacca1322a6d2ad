"""What can be known before the first model is trained is refused then, in one line."""

import json
import re
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer, CTRLTokenizer

from distill.checks import check_models
from distill.train import check_stages, distil
from eval.core.budget import load_budget
from eval.core.checks import check_plan
from eval.core.errors import UserError
from eval.core.sections import Source
from eval.core.study import load_study, make_run_folder, save_study
from eval.engines import load_tokenizer
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
        (
            ["--budget", "defalt"],
            r"configs/budgets: 'defalt'; no such file; known by name: default, smollm2, spam, tiny",
        ),
        (["--recipes", "[int9]"], r"configs/recipes: 'int9'; no such file"),
        (["--recipes", "[int8, int8]"], r"recipes: 'int8' twice; name each recipe once"),
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
    with pytest.raises(UserError, match="configs/recipes: 'int9'"):
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
    ("entry", "message"),
    [
        ({"pass": "magnitude", "sparsty": 0.5}, "passes.0: unknown key sparsty"),
        ({"pass": "magnitud"}, "did you mean 'magnitude'"),
        ({"pass": "magnitude", "sparsity": 2}, "passes.0: sparsity: 2; expected less than 1"),
    ],
)
def test_train_refuses_a_recipe_that_compress_would_refuse(tmp_path, entry, message):
    recipe = {"name": "half", "target": "cpu", "passes": [entry]}
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(recipe))
    study = tiny_study(tmp_path, recipes=[str(tmp_path / "half.yaml")])
    done = run("distill/train.py", "--config", study)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_train_asks_for_no_package_of_a_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.core.errors.find_spec", lambda module: None)
    check_stages(load_study(tiny_study(tmp_path, recipes=["int8"])))


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


def on_the_hub(folder, cache, monkeypatch):
    """A copy of `folder` in the cache of the hub, as the name `some/base`."""
    repository = cache / "models--some--base"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    return "some/base"


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "", "a.b", 7])
def test_a_chat_template_with_a_path_for_a_name_is_refused_before_it_is_loaded(
    tmp_path, base, where, name, monkeypatch
):
    """transformers 5.5 writes a file of that name when the tokenizer is saved: CVE-2026-9856."""
    broken = shutil.copytree(base, tmp_path / "deep" / "er" / "broken")
    config = json.loads((broken / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": "x"}]
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    path = str(broken) if where == "folder" else on_the_hub(broken, tmp_path / "hub", monkeypatch)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"tokenizer of .*: a chat template named .*could be a path") as error:
        check_models(load_study(tiny_study(tmp_path, base={"path": path})))
    assert "\n" not in str(error.value)


def test_chat_templates_of_plain_names_are_kept_and_a_file_of_another_name_is_refused(
    tmp_path, base, monkeypatch
):
    named = shutil.copytree(base, tmp_path / "named")
    tokenizer = AutoTokenizer.from_pretrained(named)
    tokenizer.chat_template = {"default": "x", "tool_use-2": "y"}
    tokenizer.save_pretrained(named)
    assert (named / "additional_chat_templates" / "tool_use-2.jinja").is_file()
    hub = on_the_hub(named, tmp_path / "hub", monkeypatch)
    for path in (str(named), hub):
        check_models(load_study(tiny_study(tmp_path, base={"path": path})))
    (named / "additional_chat_templates" / "a b.jinja").write_text("z")
    with pytest.raises(UserError, match="a chat template named 'a b'"):
        load_tokenizer(named)


def test_a_tokenizer_without_a_fast_form_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text(
        json.dumps({t: i for i, t in enumerate(["<unk>", "a</w>", "<eos>"])})
    )
    (tmp_path / "merges.txt").write_text("#version\na b</w>\n\n")
    slow = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), eos_token="<eos>")
    tiny_model(320).save_pretrained(tmp_path / "base")
    slow.save_pretrained(tmp_path / "base")
    study = load_study(tiny_study(tmp_path, base={"path": str(tmp_path / "base")}))
    with pytest.raises(
        UserError, match=r"CTRLTokenizer has no fast form; give a base with a tokenizer\.json"
    ):
        check_models(study)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--base.train.attention", "flash_attention_2"], r"base\.train: LlamaForCausalLM: .*leave base\.train\."),
        (["--train.attention", "flash_attention_2"], r"train: LlamaForCausalLM: .*leave train\.attention"),
        (["--student.start", "fresh", "--student.architecture.model_type", "bloom", "--train.attention", "sdpa"],
         r"train: BloomForCausalLM: it stays with eager attention; leave train\.attention"),
    ],
)  # fmt: skip
def test_attention_that_a_family_has_not_is_refused_before_the_base_is_trained(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        check_models(load_study(tiny_study(tmp_path), words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("where", ["train", "base.train", "ce_train"])
def test_tf32_without_cuda_is_refused_before_anything_is_made(tmp_path, where):
    study = load_study(tiny_study(tmp_path), [f"--{where}.precision", "tf32", f"--{where}.rows", "4"])
    with pytest.raises(
        UserError, match=rf"^{where}\.precision: tf32 needs CUDA, the device is cpu; take fp32"
    ):
        distil(study)
    assert [path.name for path in study.folder.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"method": {"name": "ensembel"}}, r"arms\.other: .*did you mean 'ensemble'"),
        ({"method": {"settings": {"membres": 1}}}, r"arms\.other: .*membres.*did you mean 'members'"),
        pytest.param(
            {"train": {"precision": "tf32"}},
            r"arms\.other: train\.precision: tf32 needs CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
        ({"train": {"rows": 2}}, r"arms\.other\.train\.rows: 2, not 4"),
    ],
)
def test_an_arm_is_refused_by_the_command_before_anything_is_made(tmp_path, arm, message):
    path = tiny_study(tmp_path, arms={"other": arm})
    done = run("distill/train.py", "--config", path)
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert re.search(message, done.stderr)
    assert not [*tmp_path.rglob("base")]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_base_of_quantized_weights_is_refused(tmp_path, base, tuning):
    """4-bit weights have no gradient: `tuning: full` would train the norms alone, without a word."""
    quantized = shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    words = ["--student.tuning", tuning]
    study = load_study(tiny_study(tmp_path, base={"path": str(quantized)}), words)
    with pytest.raises(UserError, match=r"base\.path .*: its weights are quantized \(bitsandbytes\)"):
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


def test_what_a_flag_sets_is_no_key_to_choose_from():
    with pytest.raises(UserError) as caught:
        load_study("tiny", ["--accept_olt", "[student]"])
    assert "accept_old" not in str(caught.value)


def test_an_empty_name_of_a_budget_is_none_of_a_file():
    with pytest.raises(UserError, match="configs/budgets: ''; no such file"):
        load_budget(load_study("tiny"), "")
