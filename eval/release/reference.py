"""How the documents of a study look, kept with a release so that new ones can be held against them."""

from collections import Counter
from pathlib import Path

from eval.core.config import Stored
from eval.core.documents import TRAIN, read_documents, stream_documents
from eval.core.documents.encoding import text_ids
from eval.stats.drift import surprise


class Reference(Stored):
    """How the documents of a study look; no text of theirs is kept."""

    counts: dict[int, int]  # token -> its number in the training documents
    vocabulary: int
    unigram: dict[str, list[float]]  # slice -> bits per token of each document


def reference(data: Path, slices: list[str], tokenizer) -> Reference:
    """Of the slices of a data artifact that are documents of their own."""
    counts: Counter[int] = Counter()
    for document in stream_documents(data, TRAIN):
        counts.update(text_ids(tokenizer, document.text))
    size = len(tokenizer)
    whole = [name for name in slices if (data / f"{name}.jsonl").is_file()]
    unigram = {
        name: [surprise(counts, size, text_ids(tokenizer, d.text)) for d in read_documents(data, name)]
        for name in whole
    }
    return Reference(counts=dict(counts), vocabulary=size, unigram=unigram)
