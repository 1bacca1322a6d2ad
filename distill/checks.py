"""What can be known about the method and the models of a study before the first one is trained."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from distill.method import make_method
from distill.models.gguf import build_tokenizer, find_gguf, read_config, read_fields
from distill.models.load import check_architecture
from eval.core.errors import UserError
from eval.core.sections import Base
from eval.core.study import Study
from eval.engines import load_tokenizer


def check_method(study: Study) -> None:
    """Makes the method and its control, and asks each for the bases of every seed.

    Raises:
        UserError: the method or its options are unknown, or it refuses the bases of the study.
    """
    method = make_method(study.method)
    for one in (method, method.control()):
        for seed in study.seeds:
            one.bases(seed, study.seeds)


def check_models(study: Study) -> None:
    """Builds, reads and saves what a study names, all but the weights.

    Raises:
        UserError: an architecture cannot be built; rows or requests are longer than a model reads; a named
            base has no tokenizer, or one without the chat template that the data needs; it cannot be saved.
    """
    sources = [*study.data.documents, *(s for each in study.data.shifted.values() for s in each)]
    chats = any(source.messages_column for source in sources)
    if study.base.architecture is not None:
        config = check_architecture(study.base.architecture, "base.architecture", study.base.vocab_size)
        if chats:
            fix = "name an instruction-tuned base, or give a prompt column in place of messages"
            raise UserError(
                "data: messages_column", "the tokenizer of base.architecture has no template", fix
            )
    else:
        config, tokenizer = _saved_base(study)
        if chats and tokenizer.chat_template is None:
            fix = "take an instruction-tuned base, or give a prompt column in place of messages"
            raise UserError("data: messages_column", f"{study.base.path} has no chat template", fix)
        if chats:
            _render_chat(tokenizer, str(study.base.path))
    _check_lengths(study, config, "base")
    if study.student.architecture is not None:
        vocabulary = config.get_text_config().vocab_size
        student = check_architecture(study.student.architecture, "student.architecture", vocabulary)
        _check_lengths(study, student, "student.architecture")


def _saved_base(study: Study) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a named base, saved once: transformers checks a generation config only then."""
    path = str(study.base.path)
    if study.base.is_gguf:
        config, generation, tokenizer = _read_gguf(find_gguf(path))
    else:
        config, generation, tokenizer = _read_configs(study.base)
    fix = "correct its config files in a local copy, and give that folder as base.path"
    with tempfile.TemporaryDirectory() as folder, _refused_by_libraries(f"{path} cannot be saved again", fix):
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return config, tokenizer


def _render_chat(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Lays out a question and its answer, so that a template that cannot be rendered is known now."""
    turns = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
    with _refused_by_libraries(f"the chat template of {path} fails", "correct it in a local copy"):
        tokenizer.apply_chat_template(turns, tokenize=False)


@contextmanager
def _refused_by_libraries(problem: str, fix: str) -> Iterator[None]:
    """What transformers, Jinja or the hub throw at a broken base, in one line: they share no class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError("base.path", f"{problem} ({cause})", fix) from error


def _read_gguf(file: Path) -> tuple[PreTrainedConfig, GenerationConfig, PreTrainedTokenizerBase]:
    config = read_config(file)
    return config, GenerationConfig.from_model_config(config), build_tokenizer(read_fields(file))


def _read_configs(base: Base) -> tuple[PreTrainedConfig, GenerationConfig, PreTrainedTokenizerBase]:
    """Configs and tokenizer of a base in a folder or on the hub."""
    path, is_folder = str(base.path), Path(str(base.path)).is_dir()
    settings: dict[str, Any] = {"revision": base.revision or "main", "trust_remote_code": False}
    fix = "give a hub name that has safetensors, a folder or a .gguf file"
    with _refused_by_libraries(f"{path} cannot be read", fix):
        config = AutoConfig.from_pretrained(path, **settings)
        tokenizer = (
            load_tokenizer(Path(path)) if is_folder else AutoTokenizer.from_pretrained(path, **settings)
        )
    try:
        generation = GenerationConfig.from_pretrained(path, revision=settings["revision"])
    except OSError:  # it has none: the model makes its own
        generation = GenerationConfig.from_model_config(config)
    return config, generation, tokenizer


def _check_lengths(study: Study, config: PreTrainedConfig, model: str) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "data.context": study.data.context,
        "cost.prompt_tokens + cost.new_tokens": study.cost.prompt_tokens + study.cost.new_tokens,
    }
    for name, length in lengths.items():
        if positions is not None and length > positions:
            problem = f"{length} tokens, more than max_position_embeddings of {model}: {positions}"
            raise UserError(name, problem, f"set it to at most {positions}")
