"""What can be known about the method and the models of a study before the first one is trained."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from distill.method import Method, Plain, make_method
from distill.models.gguf import find_model, read_config
from distill.models.load import (
    architecture_config,
    check_architecture,
    check_same_tokenizer,
    check_unquantized,
    named_models,
    named_tokenizer,
)
from distill.models.lora import check_device
from distill.teachers.alignment import Vocabulary
from distill.teachers.target_source import check_target_source
from distill.trainer.loop import check_train, set_memory_and_attention
from distill.trainer.module import check_exits
from eval.core.errors import UserError
from eval.core.sections import NamedModel, Train
from eval.core.sections.models import Teacher
from eval.core.study import Study, arm_studies
from eval.engines import load_tokenizer
from eval.engines.torch import check_labels, model_class, with_labels


def check_plugins_and_models(study: Study) -> None:
    """All that can be known of a study and of its arms on any machine; see the three checks."""
    for one in (study, *arm_studies(study)):
        with _names_arm(study, one):
            check_target_source(one)
            check_method(one)
            check_models(one)


@contextmanager
def _names_arm(study: Study, one: Study) -> Iterator[None]:
    """Errors inside say which arm of the study they are of."""
    try:
        yield
    except UserError as error:
        if one is study:
            raise
        raise UserError(f"arms.{one.name}: {error.thing}", error.problem, error.fix) from error


def check_method(study: Study) -> None:
    """Makes the method and its control, and asks each for the bases of every seed.

    Raises:
        UserError: the method or its options are unknown, it refuses the bases of the study, or it does not go
            with the model that it is to run in.
    """
    thing = f"method {study.method.name}"
    method = make_method(study.method)
    method.check_task(study.task)
    if method.only_writes and study.targets.source != "sequence":
        problem = (
            f"chooses among texts, and targets.source is {study.targets.source}: nothing would be chosen"
        )
        raise UserError(thing, problem, "set targets.source: sequence")
    for one in (method, method.control()):
        models = max(len(one.bases(seed, study.seeds)) for seed in study.seeds)
        if one.model == "base" and study.teacher is None:
            problem = "compares a teacher with the student's own base, and the study names none"
            raise UserError(thing, problem, "set teacher.path to the larger model")
        if one.model == "teacher" and study.teacher is not None and models > 1:
            problem = "needs several models that differ, and teacher.path is one"
            raise UserError(thing, problem, "leave teacher out, or choose another method")
        if one.model == "teacher" and one.fits and study.teacher is not None and study.teacher.mix:
            problem = "fits a model, and teacher.mix is several"
            raise UserError(thing, problem, "choose a method that fits nothing, or give one teacher.path")
        if study.teacher is not None and study.teacher.file is not None:
            _check_file_method(study.teacher, method, one)
        server = study.teacher is not None and study.teacher.server is not None
        if server and one.model == "teacher" and not one.only_prompt:
            problem = "changes the model or its output, and a server takes a prompt alone"
            raise UserError(thing, problem, "use context or larger_teacher, or teacher.path")


def _check_file_method(teacher: Teacher, method: Method, one: Method) -> None:
    """Does a method, or its control, go with answers that lie in a file?"""
    if one.model == "teacher" and not isinstance(one, Plain):
        problem = "changes what a teacher says, and a file holds what was said"
        raise UserError("method", problem, "use elsewhere, with a control_file, or larger_teacher")
    needed = method.control().model == "teacher"
    if needed != (teacher.control_file is not None):
        problem = "none, and T0 is no base of the study" if needed else "given, and T0 is the base"
        fix = "give what it said without the method" if needed else "leave it out, or use method elsewhere"
        raise UserError("teacher.control_file", problem, fix)


def check_training(study: Study, device: torch.device) -> None:
    """Refuses a study that cannot be trained on this machine; its precision is settled.

    Raises:
        UserError: QLoRA or TF32 without CUDA, an optimizer whose library is not installed.
    """
    for one in (study, *arm_studies(study)):
        with _names_arm(study, one):
            check_device(one.student, device)
            for where, settings in {**_base_training(one), **_student_training(one)}.items():
                check_train(settings, device, where)


def _base_training(study: Study) -> dict[str, Train]:
    """Key in the study -> how its base is trained, if it is."""
    return {"base.train": study.base.train} if study.base.train else {}


def _student_training(study: Study) -> dict[str, Train]:
    """Key in the study -> how students are trained."""
    return {"train": study.train, **({"ce_train": study.ce_train} if study.ce_train else {})}


def check_models(study: Study) -> None:
    """Builds, reads and saves what a study names, all but the weights.

    Raises:
        UserError: an architecture cannot be built; rows or requests are longer than a model reads; a named
            base has no tokenizer, or one without the chat template that the data needs; it cannot be saved;
            a teacher or a pretrained student does not go with the base or with the method; a family has no
            such attention as it is to be trained with.
    """
    named = named_models(study)
    chats = has_chats(study)
    if study.base.architecture is not None:
        tokenizer = _read_tokenizer(named["base.tokenizer"]) if "base.tokenizer" in named else None
        size = study.base.vocab_size if tokenizer is None else len(tokenizer)
        config = check_architecture(study.base.architecture, "base.architecture", size, study.data.labels)
        source = "the tokenizer of base.architecture"
    else:
        config, tokenizer = _saved(study.base, "base.path")
        if study.base.train is not None:
            with_labels(config, study.data.labels)  # it gets a head for them
        check_labels(config, study.data.labels, "base.path")
        source = str(study.base.path)
    if chats and (tokenizer is None or tokenizer.chat_template is None):
        fix = "take an instruction-tuned base, or give a prompt column in place of messages"
        raise UserError("data: messages_column", f"{source} has no chat template", fix)
    if chats and tokenizer is not None:
        _render_chat(tokenizer, source)
    _check_lengths(study, config, "base")
    student = config
    for where, one in named.items():
        if where != "base.tokenizer":
            beside = _check_beside(study, one, where, tokenizer)
            student = beside if where == "student.path" else student
    if study.student.architecture is not None:
        vocabulary, labels = config.get_text_config().vocab_size, study.data.labels
        student = check_architecture(study.student.architecture, "student.architecture", vocabulary, labels)
        _check_lengths(study, student, "student.architecture")
    _check_attention(config, _base_training(study))
    _check_attention(student, _student_training(study))
    _check_exits(study, config, student)


def _check_exits(study: Study, base: PreTrainedConfig, student: PreTrainedConfig) -> None:
    """Are early exits middle layers of the base, of its method's teacher and of the student?"""
    layers = base.get_text_config().num_hidden_layers
    train = getattr(make_method(study.method).settings, "train", None)
    of_method = {"method.settings.train": train} if train is not None and study.teacher is None else {}
    for where, settings in {**_base_training(study), **of_method}.items():
        check_exits(settings, layers, where)
    layers = study.student.layers or student.get_text_config().num_hidden_layers
    for where, settings in _student_training(study).items():
        check_exits(settings, layers, where)


def _check_attention(config: PreTrainedConfig, trainings: Mapping[str, Train]) -> None:
    """Sets up a model without memory as it is to be trained."""
    asked = {w: t for w, t in trainings.items() if t.attention != "auto" or t.gradient_checkpointing}
    if asked:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = model_class(config).from_config(config, dtype=torch.float32)
        for where, settings in asked.items():
            set_memory_and_attention(model, settings, where)


def chat_tokenizers(study: Study) -> list[PreTrainedTokenizerBase]:
    """Those whose templates lay out the chats of a study, if it has some; `check_models` has read them."""
    if not has_chats(study):
        return []
    from_name = study.base if study.base.architecture is None else named_models(study)["base.tokenizer"]
    tokenizers = [named_tokenizer(from_name)]
    if study.teacher is not None and study.targets.alignment == "bytes":
        tokenizers.append(named_tokenizer(study.teacher, "teacher.path"))
    return tokenizers


def has_chats(study: Study) -> bool:
    return any(source.messages_column for source in study.data.sources)


def check_text_in_front(study: Study) -> None:
    """Counts what a teacher reads before each row: it needs the tokenizer, which may just have been trained.

    Raises:
        UserError: with data.context it is longer than the model that teaches reads.
    """
    method, base = make_method(study.method), study.base
    if Method.in_front is type(method).in_front and type(method).tokens_in_front is Method.tokens_in_front:
        return
    if study.teacher is not None and method.model == "teacher":  # a server says itself what is too long
        named = {where: one for where, one in named_models(study).items() if where.startswith("teacher.")}
    else:
        named = {} if base.architecture else {"base.path": base}
        if base.architecture is not None:
            config = architecture_config(base.architecture, "base.architecture", base.vocab_size)
            _check_front(study, method, config, load_tokenizer(study.folder / "tokenizer"))
    for where, one in named.items():
        config, _, tokenizer = _read_configs(one, where)
        _check_front(study, method, config, tokenizer)


def _check_front(
    study: Study, method: Method, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    front = method.tokens_in_front(tokenizer)
    if positions is not None and front + study.data.context > positions:
        problem = f"{front} tokens in front of rows of data.context = {study.data.context}, more than the "
        fix = f"shorten the text to at most {positions - study.data.context} tokens, or lower data.context"
        raise UserError("method", f"{problem}max_position_embeddings of its model: {positions}", fix)


def _check_beside(
    study: Study, named: NamedModel, where: str, tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedConfig:
    """The config of a teacher or pretrained student that goes with the base's tokenizer and the data."""
    config, own = _saved(named, where)
    is_teacher = where.startswith("teacher.")
    if is_teacher and study.targets.alignment == "bytes":
        for each, whose in ((own, where), (tokenizer, "base.path")):
            if each is not None:  # one that is trained is of bytes
                Vocabulary(each, whose)
    elif tokenizer is None:
        problem = f"none: it is trained, and {named.path} has one of its own"
        fix = f"set base.tokenizer to {named.path}"
        if is_teacher:
            fix += ", or compare over bytes (targets.alignment: bytes)"
        raise UserError("base.tokenizer", problem, fix)
    else:
        check_same_tokenizer(tokenizer, own, where)
    _check_lengths(study, config, where, requests=where == "student.path")
    return config


def _read_tokenizer(named: NamedModel) -> PreTrainedTokenizerBase:
    fix = "give a hub name, a folder or a .gguf file that has a tokenizer"
    with _refused_by_libraries(f"{named.path} cannot be read", fix, "base.tokenizer"):
        return named_tokenizer(named, "base.tokenizer")


def _saved(named: NamedModel, where: str) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Config and tokenizer of a model, saved once: transformers checks a generation config only then."""
    path = str(named.path)
    config, generation, tokenizer = _read_configs(named, where)
    fix = f"correct config.json or generation_config.json in a copy of it, and give that folder as {where}"
    refused = _refused_by_libraries(f"{path} cannot be saved again", fix, where)
    with tempfile.TemporaryDirectory() as folder, refused:
        config.save_pretrained(folder)
        generation.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return config, tokenizer


def _render_chat(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Lays out a question and its answer, so that a template that cannot be rendered is known now."""
    turns = [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": "Answer."}]
    fix = "correct chat_template.jinja (or tokenizer_config.json) in a copy of it, and give that folder"
    with _refused_by_libraries(f"the chat template of {path} fails", fix):
        tokenizer.apply_chat_template(turns, tokenize=False)


@contextmanager
def _refused_by_libraries(problem: str, fix: str, where: str = "base.path") -> Iterator[None]:
    """What transformers, Jinja or the hub throw at a broken base, in one line: they share no class."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(where, f"{problem} ({cause})", fix) from error


def _read_configs(
    named: NamedModel, where: str
) -> tuple[PreTrainedConfig, GenerationConfig, PreTrainedTokenizerBase]:
    """Configs and tokenizer of a named model."""
    path = str(named.path)
    settings: dict[str, Any] = {"revision": named.revision or "main", "trust_remote_code": False}
    fix = "give a hub name that has safetensors, a folder or a .gguf file"
    with _refused_by_libraries(f"{path} cannot be read", fix, where):
        place = find_model(path, where)
        if is_gguf := place is not None and place.is_file():
            config = read_config(place)
        else:
            path = path if place is None else str(place)
            config = AutoConfig.from_pretrained(path, **settings)
            check_unquantized(config, f"{where} {path}")
        tokenizer = named_tokenizer(named, where)
    if is_gguf:
        return config, GenerationConfig.from_model_config(config), tokenizer
    try:
        generation = GenerationConfig.from_pretrained(path, revision=settings["revision"])
    except OSError:  # it has none: the model makes its own
        generation = GenerationConfig.from_model_config(config)
    return config, generation, tokenizer


def _check_lengths(study: Study, config: PreTrainedConfig, model: str, requests: bool = True) -> None:
    """Refuses rows, and requests to a model that is measured, that are longer than it reads."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.context": study.data.context}
    if requests:
        lengths["cost.prompt_tokens + cost.new_tokens"] = study.cost.prompt_tokens + study.cost.new_tokens
    for name, length in lengths.items():
        if positions is not None and length > positions:
            problem = f"{length} tokens, more than max_position_embeddings of {model}: {positions}"
            raise UserError(name, problem, f"set it to at most {positions}")
