"""Fixtures that take too long to build twice."""

import warnings

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny model in the transformers format."""
    from tests.eval.run_builder import torch_model

    folder = tmp_path_factory.mktemp("checkpoint")
    torch_model(seed=7)(folder)
    return folder


@pytest.fixture(scope="session")
def openvino_folder(checkpoint, tmp_path_factory):
    """The same model as optimum-intel exports it, in float32."""
    from eval.engines import load_tokenizer

    folder = tmp_path_factory.mktemp("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of optimum's sources, and of the tracer about transformers' branches
        from optimum.intel import OVModelForCausalLM

        model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, compile=False, load_in_8bit=False)
    model.save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def onnxruntime_folder(checkpoint, tmp_path_factory):
    """The same model as a graph for ONNX Runtime, in float32."""
    from compress.engine_files import EngineFiles
    from compress.onnx_graph import build, save
    from eval.engines.torch import load_checkpoint

    folder = tmp_path_factory.mktemp("onnxruntime")
    model, words = load_checkpoint(checkpoint)
    files = EngineFiles("onnxruntime", folder / "work", model)
    save(build(model, words, folder / "work"), files.folder)
    files.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def llama_cpp_folder(checkpoint, tmp_path_factory):
    """The same model as a GGUF file, in float32; without llama.cpp none."""
    from importlib.util import find_spec

    if find_spec("llama_cpp") is None:
        return None
    from compress.engine_files import EngineFiles
    from compress.gguf_file import MODEL, write
    from eval.engines.torch import load_checkpoint

    folder = tmp_path_factory.mktemp("llama_cpp")
    model, words = load_checkpoint(checkpoint)
    files = EngineFiles("llama_cpp", folder / "work", model)
    write(model, words, ["def f(x): return x"], files.folder / MODEL)
    files.save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def released_run(tmp_path_factory):
    """A run of real tiny models with its gate and a sign-off of the variant `small`."""
    from eval.signoff.keys import new_key
    from tests.eval.real_run import RECIPES, RealRun
    from tests.eval.run_builder import gate, sign

    folder = tmp_path_factory.mktemp("released")
    run = RealRun(folder, recipes=RECIPES).make()
    run.fallback_cost()
    gate(run)
    new_key(folder / "key")
    sign(run, folder / "key", "small")
    return run


@pytest.fixture(scope="session")
def release(released_run):
    """The release of that run, by its command."""
    from tests.helpers import run as command

    out = released_run.folder / "release"
    given = ["--study", released_run.path, "--variant", "small", "--owner", "Team A", "--out", out]
    keys = ["--key", released_run.folder / "key", "--public", released_run.folder / "key.pub"]
    done = command("-m", "eval.release", *given, *keys, "--json", released_run.folder / "release.json")
    assert done.returncode == 0, done.stderr
    (released_run.folder / "output").write_text(done.stdout)
    return out
