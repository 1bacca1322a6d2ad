"""Engines: what they compute is what the model says, step by step or at once; what is damaged is refused."""

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from eval.core.documents import Row, collate
from eval.core.errors import UserError
from eval.engines import load_engine, load_tokenizer, silenced
from eval.engines.openvino import EXACT, compute_logits_from
from eval.engines.torch import load_checkpoint
from tests.eval.run_builder import tokenizer
from tests.helpers import run, tiny_model

ENGINES = ["torch", "openvino", "onnxruntime"]
ENGINES += ["llama_cpp"] if find_spec("llama_cpp") else []  # the lock leaves it out: it must be compiled


@pytest.fixture(scope="module")
def folders(checkpoint, openvino_folder, onnxruntime_folder, llama_cpp_folder):
    """The same model in the format of each engine, in float32."""
    ready = {"torch": checkpoint, "openvino": openvino_folder, "onnxruntime": onnxruntime_folder}
    return {**ready, "llama_cpp": llama_cpp_folder}


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = [20, 13, 5]
    tokens = [torch.randint(0, 280, (n,), generator=generator).tolist() for n in lengths]
    return collate([Row(f"d{i}", "code", 0, t) for i, t in enumerate(tokens)], pad=0)


@pytest.fixture
def engine(request, folders):
    return load_engine(request.param, folders[request.param])


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_prefill_and_decode_say_what_the_full_forward_says(engine, batch):
    full = engine.logits(batch)
    assert full.dtype == torch.float32
    assert full.shape == (3, 20, engine.vocabulary)
    for ids, wanted in ((batch.input_ids[:1, :20], full[:1]), (batch.input_ids[:2, :13], full[:2, :13])):
        logits, state = engine.prefill(ids[:, :9])  # the second prompts must not see the first one's cache
        torch.testing.assert_close(logits, wanted[:, 8], atol=1e-5, rtol=1e-4)
        for position in range(9, ids.shape[1]):
            logits, state = engine.decode(ids[:, position], state)
            torch.testing.assert_close(logits, wanted[:, position], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_padding_changes_nothing(engine, batch):
    together = engine.logits(batch)
    for i, length in enumerate(batch.attention_mask.sum(1).tolist()):
        row = Row("d", "code", 0, batch.input_ids[i, :length].tolist())
        alone = engine.logits(collate([row], pad=0))
        torch.testing.assert_close(together[i, :length], alone[0], atol=1e-5, rtol=1e-4)


def test_a_cpu_that_is_slow_in_the_stored_format_computes_in_float32(
    monkeypatch, tmp_path, checkpoint, batch
):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    shutil.copytree(checkpoint, tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    wanted = model.float()(**batch.inputs).logits  # the rounded weights
    for half_ms, dtype in ((1.0, torch.float32), (0.1, torch.bfloat16)):
        speeds = {torch.float32: 0.5, torch.bfloat16: half_ms}
        monkeypatch.setattr("eval.engines.torch._product_ms", speeds.__getitem__)
        engine = load_engine("torch", tmp_path / "half")
        assert engine.model.dtype == dtype
        assert engine.computed_in == (None if dtype == torch.bfloat16 else "float32")
        exact = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
        torch.testing.assert_close(engine.logits(batch), wanted, **exact)


@pytest.mark.parametrize("engine", ENGINES[1:], indirect=True)
def test_in_float32_it_says_what_torch_says_and_writes_the_same(engine, checkpoint, batch):
    torch_engine, real = load_engine("torch", checkpoint), batch.attention_mask.bool()
    wanted = torch_engine.logits(batch)[real]
    torch.testing.assert_close(engine.logits(batch)[real], wanted, atol=1e-5, rtol=1e-4)
    assert greedy(engine, batch.input_ids[:2, :9], 150) == greedy(torch_engine, batch.input_ids[:2, :9], 150)


def greedy(engine, ids, new_tokens):
    """The likeliest tokens after two prompts, one by one: more of them than a cache has room for at first."""
    logits, state = engine.prefill(ids)
    written = [logits.argmax(-1).tolist()]
    while len(written) < new_tokens:
        logits, state = engine.decode(torch.tensor(written[-1]), state)
        written.append(logits.argmax(-1).tolist())
    return written


def head_model(two_products):
    """A head with capped logits, or one whose logits are the sum of two products."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset13 as op

    hidden = op.parameter([-1, -1, 4], np.float32, name="hidden")
    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    logits = op.matmul(hidden, op.constant(weight), False, True)
    if two_products:
        logits = op.add(logits, op.matmul(hidden, op.constant(0.1 * weight), False, True))
    else:
        logits = op.multiply(
            op.tanh(op.divide(logits, op.constant(np.float32(3)))), op.constant(np.float32(3))
        )
    result = op.result(logits)
    result.output(0).set_names({"logits"})
    return openvino.Model([result], [hidden]), openvino


def test_a_head_of_openvino_computes_the_last_logits_alone_where_they_are_of_one_product():
    inputs = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)
    for two_products in (False, True):
        model, openvino = head_model(two_products)
        wanted = openvino.compile_model(model, "CPU", EXACT)([inputs])[0]
        compute_logits_from(model)
        run_model = openvino.compile_model(model, "CPU", EXACT)
        if two_products:
            assert len(run_model.inputs) == 1
            np.testing.assert_array_equal(run_model([inputs])[0], wanted)
        else:
            for first in (0, 4):
                np.testing.assert_allclose(run_model([inputs, [first]])[0], wanted[:, first:], rtol=1e-6)


def test_a_prompt_costs_openvino_the_logits_of_its_last_token(openvino_folder, batch):
    engine = load_engine("openvino", openvino_folder)
    engine.prefill(batch.input_ids[:2, :9])
    assert tuple(engine.request.get_tensor("logits").shape) == (2, 1, engine.vocabulary)


def test_load_checkpoint_gives_back_the_weights_silently(tmp_path, capfd):
    model = tiny_model(seed=3)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    loaded, words = load_checkpoint(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not loaded.training
    assert words.get_vocab() == tokenizer().get_vocab()
    for (name, left), right in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_a_bitsandbytes_checkpoint_keeps_its_format(checkpoint, tmp_path, batch):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    quantized.save_pretrained(tmp_path)
    load_tokenizer(checkpoint).save_pretrained(tmp_path)
    with torch.inference_mode():
        wanted = quantized(batch.input_ids, attention_mask=batch.attention_mask).logits
    loaded = load_engine("torch", tmp_path)
    assert type(loaded.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.equal(loaded.logits(batch), wanted)


def config_with(**fields):
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def cut_in_half(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def larger_tokenizer(folder: Path) -> None:
    words = tokenizer()
    words.add_tokens([f"<extra{i}>" for i in range(40)])
    words.save_pretrained(folder)


DAMAGES = {
    "truncated weights": (
        cut_in_half,
        "model.safetensors: .*delete the folder and run the command that makes it",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no \*\.safetensors; save the model"),
    "a weight is missing": (without_a_weight, "model.norm.weight is missing"),
    "more layers than weights": (config_with(num_hidden_layers=3), r"is missing \(9 such\)"),
    "fewer layers than weights": (config_with(num_hidden_layers=1), "layers.1.* is unexpected"),
    "another shape": (config_with(vocab_size=330), "embed_tokens.weight is mismatched"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json: Expecting property"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a list, expected a mapping"),
    "unknown architecture": (config_with(model_type="nope"), "model type `nope`"),
    "another quantizer": (
        config_with(quantization_config={"quant_method": "gptq"}),
        "accepted: bitsandbytes",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer of .*no tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of .*cannot be read"),
    "larger tokenizer": (larger_tokenizer, "ids up to 3.., the model has 320 rows"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(name, checkpoint, tmp_path):
    damage, message = DAMAGES[name]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "file", "content", "message"),
    [
        ("openvino", "openvino_model.xml", None, "no openvino_model.xml"),
        ("openvino", "openvino_model.xml", b"<net", "cannot be read"),
        ("openvino", "openvino_model.bin", b"0", "cannot be read"),
        ("onnxruntime", "model.onnx", None, r"no model\.onnx; make it with the pass onnxruntime"),
        ("onnxruntime", "model.onnx", b"<net", "cannot be read"),
        ("onnxruntime", "model.onnx.data", b"0", "cannot be read"),
        ("onnxruntime", "model.onnx.data", None, "cannot be read"),
        ("llama_cpp", "model.gguf", None, r"no model\.gguf; make it with the pass llama_cpp"),
        ("llama_cpp", "model.gguf", b"GGUF", "llama.cpp cannot read it; delete the folder"),
    ],
)
def test_a_damaged_folder_of_an_engine_is_refused(engine, file, content, message, folders, tmp_path):
    if engine not in ENGINES:
        pytest.skip(f"{engine} is not installed")
    folder = Path(shutil.copytree(folders[engine], tmp_path / "model"))
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_engine(engine, folder)
    assert "\n" not in str(caught.value)


def test_a_graph_of_another_maker_is_refused(tmp_path):
    helper = pytest.importorskip("onnx").helper
    port = [helper.make_tensor_value_info(name, 1, [1]) for name in ("pixels", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["pixels"], ["logits"])], "g", port[:1], port[1:])
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(UserError, match="it has an input 'pixels'; make it with the pass onnxruntime"):
        load_engine("onnxruntime", tmp_path)


def test_unknown_engines_and_devices_are_answered_with_what_there_is(checkpoint):
    with pytest.raises(UserError, match="did you mean 'openvino'"):
        load_engine("openvin", checkpoint)
    with pytest.raises(UserError, match=r"device of engine 'openvino': 'cuda'; .*accepted: cpu"):
        load_engine("openvino", checkpoint, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_a_device_is_refused(checkpoint):
    with pytest.raises(UserError, match="this machine has no CUDA device"):
        load_engine("torch", checkpoint, device="cuda")


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "llama_cpp"])
def test_a_missing_library_names_the_extra(name):
    script = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from eval.core.errors import entry\nfrom eval.engines import load_engine\n"
        f"entry(lambda: load_engine({name!r}, 'nowhere'))()"
    )
    done = run("-c", script)
    assert done.returncode == 3
    assert done.stderr == (
        f"error: engine '{name}': {name} is not installed; install the extra: pip install '.[{name}]'\n"
    )


@pytest.mark.parametrize("name", ENGINES[1:])
def test_a_lean_engine_imports_no_library_of_another_and_leaves_the_home_folder_alone(
    name, folders, tmp_path
):
    """What a measured process imports counts in its peak memory."""
    others = ("transformers", "optimum", "datasets", "onnx", "onnxruntime_genai", "gguf", *ENGINES[1:])
    script = (
        "import sys; from eval.engines import load_engine\n"
        f"load_engine({name!r}, {str(folders[name])!r})\n"
        f"print([name for name in {others!r} if name in sys.modules])"
    )
    assert run("-c", script, HOME=str(tmp_path)).stdout == f"['{name}']\n"
    assert not list(tmp_path.rglob("*"))


def test_libraries_are_silent_inside_and_as_they_were_after():
    bars = transformers_logging.is_progress_bar_enabled()
    logger, child = logging.getLogger("a_library"), logging.getLogger("a_library.part")
    logger.setLevel(logging.INFO)
    child.setLevel(logging.DEBUG)
    with silenced("a_library"):
        assert not logger.isEnabledFor(logging.WARNING)
        assert not child.isEnabledFor(logging.WARNING)
        assert child.isEnabledFor(logging.ERROR)
        assert not transformers_logging.is_progress_bar_enabled()
    assert (logger.level, child.level) == (logging.INFO, logging.DEBUG)
    assert transformers_logging.is_progress_bar_enabled() == bars
