"""Plain models: built from a config, loaded, checked against a tokenizer, exported."""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file
from transformers.utils.hub import list_repo_templates

from distill.models.gguf import build_tokenizer, find_model, load_gguf, read_fields
from eval.core.artifacts import digest, installed_versions, remembered_hashes
from eval.core.documents import Document, windows
from eval.core.documents.encoding import note_ends
from eval.core.errors import UserError, require_one_of
from eval.core.sections import Base, NamedModel
from eval.core.study import Study
from eval.engines import check_fast, check_template_names, load_tokenizer, tokens_beyond
from eval.engines.torch import (
    check_labels,
    load_checkpoint,
    load_encoder,
    model_class,
    stored_dtype,
    with_labels,
)

BOS = "<|endoftext|>"
BASE_FILES = "base-files.json"  # of the run folder: the hashes of local models
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
CONFIGS = ("generation_config.json", "config.json")
LEGACY_FIELDS = ("rope_theta", "rope_scaling", "torch_dtype")  # read, though no field of a config any more


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE: it encodes every text, so that bits per byte are always defined."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS)


def fresh_model(
    architecture: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    vocabulary: int | None = None,
    labels: Sequence[str] = (),
    where: str = "base.architecture",
) -> PreTrainedModel:
    """A model of random weights that `seed` decides.

    Args:
        vocabulary: rows of its embedding; None: as many as the tokenizer has tokens.
        labels: classes that it is to tell apart, in place of the next token.
        where: key of the architecture in the study, for errors.

    Raises:
        UserError: transformers does not know the family, or does not take a field.
    """
    config = with_labels(architecture_config(architecture, where, vocabulary or len(tokenizer)), labels)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    torch.manual_seed(seed)
    return _build(config, where).eval()


def architecture_config(architecture: dict[str, Any], where: str, vocabulary: int) -> PreTrainedConfig:
    """The transformers config of an `architecture` of a study.

    Raises:
        UserError: transformers does not know the family, or does not take a field or its value.
    """
    fields = dict(architecture)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{where}.model_type",
            repr(kind),
            f"{hint}give a model_type that transformers knows, such as llama",
        )
    family = CONFIG_MAPPING[kind]
    accepted = {*family().to_dict(), *family.attribute_map, *inspect.signature(family.__init__).parameters}
    accepted -= {"self", "args", "kwargs", "transformers_version", "model_type", "vocab_size"}
    for name in fields:
        if name not in LEGACY_FIELDS:
            require_one_of(f"{where}: unknown key of {kind}", name, sorted(accepted))
    with _refused_by_transformers(where, kind):
        return family(**fields, vocab_size=vocabulary)


def check_architecture(
    architecture: dict[str, Any], where: str, vocabulary: int, labels: Sequence[str] = ()
) -> PreTrainedConfig:
    """The config of an `architecture`, after a model of it was built without memory or random numbers."""
    config = with_labels(architecture_config(architecture, where, vocabulary), labels)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        _build(config, where)
    return config


def _build(config: PreTrainedConfig, where: str) -> PreTrainedModel:
    with _refused_by_transformers(where, config.model_type):
        return model_class(config).from_config(config, dtype=torch.float32)


@contextmanager
def _refused_by_transformers(where: str, kind: str) -> Iterator[None]:
    """What transformers throws about a config, in one line; its strict dataclasses raise no ValueError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        fix = f"change that field of {where}: fields and values are those of {CONFIG_MAPPING[kind].__name__}"
        raise UserError(where, f"transformers cannot build this {kind} model ({cause})", fix) from error


def named_model(
    named: NamedModel,
    commit: str | None = None,
    where: str = "base.path",
    labels: Sequence[str] = (),
    head_seed: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that a study names, on the hub, a folder or a GGUF file: no pickle is read, no code is run.

    Args:
        commit: the one that its revision on the hub stands for.
        where: key of its path in the study, for errors.
        labels: classes that it tells apart, where the study classifies.
        head_seed: of the new head that it gets for them; None: it must have one for them.
    """
    assert named.path is not None
    place, revision = find_model(named.path, where), commit or named.revision or "main"
    if place is not None and place.is_file():
        return load_gguf(place)
    if place is None and labels:
        place = Path(snapshot_download(named.path, revision=revision, allow_patterns=MODEL_FILES))
    if place is not None and head_seed is not None:
        return load_encoder(place, labels, head_seed, where)
    if place is not None:
        model, tokenizer = load_checkpoint(place)
        check_labels(model.config, labels, where)
        return model, tokenizer
    try:
        tokenizer = load_hub_tokenizer(named.path, revision)
        model = AutoModelForCausalLM.from_pretrained(
            named.path, dtype=torch.float32, use_safetensors=True, revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, ImportError) as error:
        fix = "give a hub name that has safetensors, or a folder"
        raise UserError(where, f"{named.path} ({' '.join(str(error).split())[:200]})", fix) from error
    return model.eval(), tokenizer


def named_dtype(named: NamedModel, commit: str | None = None) -> torch.dtype:
    """The number format of the weights of a named model: its students are stored and served in it.

    A GGUF file has none of these: what is read from it is float32.
    """
    assert named.path is not None
    if (place := find_model(named.path)) is not None:
        return torch.float32 if place.is_file() else stored_dtype(place)
    config = cached_file(named.path, "config.json", revision=commit or named.revision or "main")
    assert config is not None
    return stored_dtype(Path(config).parent)


def named_tokenizer(named: NamedModel, where: str = "base.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a model that a study names; see `named_model`."""
    assert named.path is not None
    if (place := find_model(named.path, where)) is not None:
        return build_tokenizer(read_fields(place)) if place.is_file() else load_tokenizer(place)
    return load_hub_tokenizer(named.path, named.revision or "main")


def load_hub_tokenizer(path: str, revision: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model on the hub.

    Raises:
        UserError: it has no fast form, or a chat template whose name is none.
        OSError: the hub cannot be reached, or has no such model.
    """
    thing = f"tokenizer of {path}"
    config = cached_file(
        path, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    templates = list_repo_templates(path, local_files_only=False, revision=revision)
    check_template_names(thing, Path(config).read_bytes() if config else b"", templates)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        path, revision=revision, trust_remote_code=False
    )
    check_fast(thing, tokenizer)
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    note_ends(tokenizer, *(cached_file(path, name, **optional) for name in CONFIGS))
    return tokenizer


def check_unquantized(config: PreTrainedConfig, where: str) -> None:
    """Refuses quantized weights: no gradient moves them, and what is exported would be no plain model."""
    settings = getattr(config, "quantization_config", None)
    if settings is not None:
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        kind = settings.get("quant_method", "unknown method")
        fix = "give the model that it was made of; qlora and teacher.quantization do it by themselves"
        raise UserError(where, f"its weights are quantized ({kind})", fix)


def base_origin(base: Base, memory: Path) -> dict[str, Any]:
    """What a base is, wherever it lies: its architecture, or the origin of the model that it names.

    Args:
        memory: see `model_origin`.
    """
    if base.path is not None:
        return model_origin(base, memory)
    return {"architecture": base.architecture, "vocab_size": base.vocab_size}


def model_origin(named: NamedModel, memory: Path, where: str = "base.path") -> dict[str, Any]:
    """What a named model is, wherever it lies: the content of its files or its commit on the hub.

    Args:
        memory: a file that remembers the hashes of local files by size and time, so that each is read once.
        where: key of its path in the study, for errors.

    Raises:
        UserError: the hub does not know it, or cannot be reached and nothing of it lies in the local cache.
    """
    assert named.path is not None
    if (place := find_model(named.path, where)) is not None:
        hashes = local_hashes(place, memory)
        is_gguf = place.is_file()
        return (
            {"gguf": hashes.popitem()[1], **installed_versions(["gguf"])}
            if is_gguf
            else {"files": digest(hashes)}
        )
    return {"hub": named.path, "commit": hub_commit(named.path, named.revision or "main", where)}


def study_tokenizer(study: Study) -> PreTrainedTokenizerBase:
    """The tokenizer of the bases, before there are any."""
    trained = study.folder / "tokenizer"
    return load_tokenizer(trained) if study.base.architecture else named_tokenizer(study.base)


def named_models(study: Study) -> dict[str, NamedModel]:
    """Key of its path in the study -> each model that is named beside the base, or gives it its tokenizer."""
    base, student = study.base, study.student
    named: dict[str, NamedModel] = {}
    if base.tokenizer is not None:
        named["base.tokenizer"] = NamedModel(path=base.tokenizer, revision=base.revision)
    if study.teacher is not None and study.teacher.path is not None:
        named["teacher.path"] = study.teacher
    for number, member in enumerate(study.teacher.mix if study.teacher is not None else []):
        named[f"teacher.mix.{number}.path"] = member
    if student.path is not None:
        named["student.path"] = NamedModel(path=student.path, revision=student.revision)
    return named


def study_origins(study: Study) -> dict[str, dict[str, Any]]:
    """Key in the study -> origin of the base and of all models that are named beside it."""
    memory = study.folder / BASE_FILES
    beside = {where: model_origin(one, memory, where) for where, one in named_models(study).items()}
    return {"base": base_origin(study.base, memory), **beside}


def local_hashes(base: Path, memory: Path) -> dict[str, str]:
    """Name -> SHA-256 of the files of a local model; no model is made of hidden files and of Markdown."""
    folder, paths = (base.parent, [base]) if base.is_file() else (base, sorted(base.rglob("*")))
    names = {path.relative_to(folder): path for path in paths if path.is_file() and path.suffix != ".md"}
    shown = {name: path for name, path in names.items() if not any(p.startswith(".") for p in name.parts)}
    return remembered_hashes({name.as_posix(): path for name, path in shown.items()}, memory)


def hub_commit(path: str, revision: str, where: str = "base.path") -> str:
    """The commit that a revision on the hub stands for; offline that of the snapshot in the cache."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        commit = HfApi().model_info(path, revision=revision, timeout=10).sha
    except (OSError, ValueError) as error:  # offline, unreachable, unknown, no name of a repository
        try:
            snapshot = try_to_load_from_cache(path, "config.json", revision=revision)
        except ValueError:
            snapshot = None
        if not isinstance(snapshot, str):
            fix = "give a hub name that has safetensors, or a folder"
            cause = " ".join(str(error).split())[:200]
            raise UserError(where, f"{path} ({cause})", fix) from error
        commit = Path(snapshot).parent.name
    assert commit is not None
    return commit


def check_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    documents: Iterable[Document] = (),
    context: int = 256,
) -> None:
    """Refuses a tokenizer with ids that the model does not have, if texts are split into them.

    Args:
        documents: what is trained on and scored: special tokens beyond the model may stay where none has one.
        context: tokens of a row.
    """
    rows = model.get_input_embeddings().num_embeddings
    if not tokens_beyond(tokenizer, rows, f"tokenizer of {where}"):
        return
    for document in documents:
        largest = max(max(row.tokens) for row in windows(tokenizer, document, context))
        if largest >= rows:
            token = tokenizer.convert_ids_to_tokens(largest)
            problem = f"{document.id!r} has the token {token!r}, id {largest}; the model has {rows} rows"
            raise UserError(f"tokenizer of {where}", problem, "leave such documents out of the data")


def check_same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, where: str) -> None:
    """Refuses two tokenizers that differ, naming the first different token."""
    left, right = one.get_vocab(), other.get_vocab()
    if left == right:
        return
    for token, _ in sorted({**left, **right}.items(), key=lambda item: item[1]):
        if left.get(token) != right.get(token):
            problem = f"token {token!r} is id {left.get(token)} in one and {right.get(token)} in the other"
            fix = "use one tokenizer for teacher and student"
            if where.startswith("teacher."):
                fix += ", or compare them over bytes (targets.alignment: bytes)"
            raise UserError(f"tokenizer of {where}", problem, fix)
