"""What a study of `task: classification` has that others have not, and what it cannot have."""

from collections.abc import Iterator
from typing import Any

from eval.core.sections.source import Source

# Settings of a study that speak of text that is continued -> what they must be where texts are classified.
SETTINGS: dict[str, Any] = {
    "data.packing": False,
    "data.end_of_text": False,
    "data.loss_on": "last",
    "data.tasks": {},
    "train.future": None,
    "ce_train.future": None,
    "base.train.future": None,
    "train.exits": None,
    "ce_train.exits": None,
    "base.train.exits": None,
    "targets.alignment": "tokens",
    "teacher.server": None,
    "teacher.file": None,
    "cost.new_tokens": 1,
}
# What sentences call things that are others here: one example takes the place of all bytes of a text.
BITS = {
    "bits/byte": "bits/example",
    "Bits per byte": "Bits per example",
    "bits per byte": "bits per example",
}
WORDS = {  # and tables
    **BITS,
    "bits/token": "bits/example",
    "per token": "per example",
    "J/token": "J/example",
    "tokens/s": "examples/s",
    "next token right": "class right",
    "decode p50": "prefill p50",
    "Decode latency": "Prefill latency",
    "decode latency": "prefill latency",
}
SOURCES = ("cached", "online")  # of targets: a classifier writes nothing


def in_words(text: str, task: str, words: dict[str, str] = WORDS) -> str:
    """A text for people with the words of its task."""
    if task == "classification":
        for word, other in words.items():
            text = text.replace(word, other)
    return text


def latency_of(task: str) -> str:
    """The quantity by which variants are compared: a classifier decodes nothing."""
    return "prefill_p50" if task == "classification" else "decode_p50"


def check_task(study: Any) -> None:
    """Do labels, sources and settings fit to the task?

    Args:
        study: an `eval.core.study.Study`.

    Raises:
        ValueError: they do not; it says which.
    """
    labels, sources = study.data.labels, study.data.sources
    if study.task == "causal_lm":
        if labels or any(source.has_labels for source in sources):
            raise ValueError("`data.labels` and labels of sources are for `task: classification`")
        if study.cost.new_tokens < 2:
            raise ValueError("cost.new_tokens is 1; a text that goes on has at least 2")
        return
    if len(set(labels)) < len(labels) or len(labels) < 2:
        raise ValueError(f"`task: classification` needs two or more names in `data.labels`, found {labels}")
    for source in sources:
        _check_source(source, labels)
    for name, wrong in _wrong_settings(study):
        raise ValueError(f"{name} is {wrong!r}; with `task: classification` it is {SETTINGS[name]!r}")
    if study.targets.source not in SOURCES:
        raise ValueError(
            f"targets.source is {study.targets.source}; a classifier writes no texts: take cached"
        )


def _check_source(source: Source, labels: list[str]) -> None:
    if not source.has_labels:
        raise ValueError(f"source {source.path!r} has no label, label_column or label_by_folder")
    if source.label is not None and source.label not in labels:
        raise ValueError(f"label {source.label!r} of a source is none of data.labels: {', '.join(labels)}")
    if source.messages_column or source.prompt_column or source.prompt_template:
        raise ValueError("`task: classification` has texts alone, and no prompts or chats")


def _wrong_settings(study: Any) -> Iterator[tuple[str, Any]]:
    for name, expected in SETTINGS.items():
        value: Any = study
        for part in name.split("."):
            value = getattr(value, part, None)  # a section that is not there asks for nothing
        if value is not None and value != expected:
            yield name, value
