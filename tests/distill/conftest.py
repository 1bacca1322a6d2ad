"""What tests of methods share: bases, rows, a context to fit in, and checked answers."""

import pytest

from distill.method import Method, MethodContext
from distill.models.export import export
from distill.models.generation import sample_texts, stop_ids
from distill.trainer.loop import train
from eval.core.documents import Document, windows
from tests.helpers import WORDS, text, tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def rows(tokenizer):
    documents = [Document(f"{d}-{i}", d, text(d, i, 60)) for i in range(6) for d in WORDS]
    return [row for document in documents for row in windows(tokenizer, document, 32)]


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("bases")
    for seed in (0, 1):
        export(tiny_model(seed=seed), tokenizer, folder / f"s{seed}", "a card", [])
    return {seed: folder / f"s{seed}" for seed in (0, 1)}


def written_anew(method, teacher, prompts, generation, seed):
    """What a method writes where its `output` is asked about the whole text for every token, without caches."""
    reader = Method.reader(method, teacher, prompts)
    return sample_texts(reader, prompts, generation, seed, stop_ids(teacher))


def method_context(folder, tokenizer, rows, bases):
    """A context to fit a method in, whose training is the real one."""
    (folder / "fitted").mkdir()

    def fit(model, some, config, name):
        return train(model, some, config, pad=0, seed=0, teacher=None, scratch=folder / "scratch" / name)

    return MethodContext(folder / "fitted", 0, [0, 1], bases, tokenizer, lambda: rows, fit)


@pytest.fixture
def context(tmp_path, tokenizer, rows, bases):
    return method_context(tmp_path, tokenizer, rows, bases)
