"""Fixtures that are too dear to make twice."""

import warnings

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny model in the transformers format."""
    from tests.eval.fake_run import torch_model

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
