"""Documents as tokens: prompts with their answers, chats through their template, windows of a context."""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from eval.core.documents.chats import Answers, Readable, lay_out
from eval.core.errors import UserError

LISTED_ENDS = "listed_ends"  # attribute of a tokenizer: it goes wherever the tokenizer does
STAND_IN = 0x10FFFD  # of Unicode's private characters the last: they stand in for special tokens in a turn

Span = tuple[int, int]  # start and end


@dataclass(frozen=True)
class Learned:
    """What of a document is predicted beside its text; by default nothing, as in scoring."""

    turns: Literal["last", "all"] = "last"  # which answers of a chat
    end_of_answer: bool = False  # EOS after an answer, where the chat template writes no end
    end_of_text: bool = False  # EOS after a document without a prompt


SCORED = Learned()


class Encoding(NamedTuple):
    """The tokens of a document."""

    ids: list[int]
    given: int  # so many of them, the first ones, are only read
    skipped: tuple[Span, ...] = ()  # spans of later ones that are only read
    front: int | None = None  # written in front of every window; None: a window starts with what came before


class Window(NamedTuple):
    """A part of an encoding; where nothing is written in front of it, its first token takes that place."""

    start: int
    stop: int
    given: int  # so many after the token in front are only read


def boundary_id(tokenizer) -> int:
    """The token that every row starts with: BOS, or EOS where a tokenizer has no BOS; CLS of an encoder."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return token
    raise UserError("tokenizer", "neither BOS nor EOS token", "name one in its tokenizer_config.json")


def end_ids(tokenizer) -> set[int]:
    """Ids that end a text: EOS, and those that the configs of its model list, where a model came with it."""
    return {tokenizer.eos_token_id, *getattr(tokenizer, LISTED_ENDS, ())} - {None}


def special_ends(tokenizer) -> set[int]:
    """Those of them that no text is split into: what ends a turn of a chat, or a text."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i for i in end_ids(tokenizer) if i in special or i == tokenizer.eos_token_id}


def note_ends(tokenizer, *files: str | Path | None) -> None:
    """Notes on a tokenizer the ends of its model: of the first of the config files that lists some.

    Raises:
        ValueError: a file is no JSON.
    """
    for file in files:
        if file is not None and Path(file).is_file():
            config = json.loads(Path(file).read_text(encoding="utf-8"))
            ends = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
            if ends is not None:
                setattr(tokenizer, LISTED_ENDS, sorted(ends if isinstance(ends, list) else [ends]))
                return


def text_ids(tokenizer, text: str) -> list[int]:
    """The tokens of a text alone; a special token that it spells out is text: templates write those."""
    read = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return read["input_ids"]


def encode(
    tokenizer, documents: Sequence[Readable], learned: Learned = SCORED, most: int | None = None
) -> list[Encoding]:
    """The tokens of documents. Special tokens that a text spells out are text, those of a template tokens.

    A prompt is tokenized together with its text: a token that reaches from one into the other is predicted.

    Args:
        most: tokens of a labelled text with its label, which is cut behind; others are cut into windows.

    Raises:
        UserError: a document has no tokens, or a chat cannot be laid out.
    """
    if documents and documents[0].label is not None:
        return [_labelled(tokenizer, document, most) for document in documents]
    texts = [document.text for document in documents if not document.prompt]
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    read = partial(tokenizer, add_special_tokens=False, split_special_tokens=True, **options)
    ids = iter(read(texts)["input_ids"] if texts else [])
    return [
        _prompted(tokenizer, document, learned)
        if document.prompt
        else _plain(tokenizer, document, next(ids), learned)
        for document in documents
    ]


def windows_of(encoding: Encoding, context: int) -> list[Window]:
    """Windows of up to `context` tokens that predict each token once; nothing is dropped.

    A window of a document with a prompt starts with what came just before its share of the text, in at most
    half of its places.
    """
    bare = int(encoding.front is None)  # the first token stands in front of the others
    before, total = encoding.given - bare, len(encoding.ids) - bare
    given = before if total < context else min(before, (context - 1) // 2)
    step = context - 1 - given
    return [
        Window(start - given, min(start + step, total) + bare, given) for start in range(before, total, step)
    ]


def window_tokens(encoding: Encoding, window: Window) -> tuple[list[int], int, tuple[Span, ...]]:
    """The tokens of a row, how many after the first are given, and spans of later ones that are only read."""
    front, (start, stop, given) = encoding.front, window
    tokens = encoding.ids[start:stop] if front is None else [front, *encoding.ids[start:stop]]
    shift, least = start - (front is not None), start + given + (front is None)
    cut = ((max(begin, least), min(end, stop)) for begin, end in encoding.skipped)
    return tokens, given, tuple((begin - shift, end - shift) for begin, end in cut if begin < end)


def _plain(tokenizer, document: Readable, ids: list[int], learned: Learned) -> Encoding:
    """A document without a prompt: all of it is predicted."""
    _check_tokens(document, ids)
    if learned.end_of_text:
        if tokenizer.eos_token_id is None:
            raise UserError("data.end_of_text", "true, but the tokenizer has no EOS token", "set it to false")
        ids = [*ids, tokenizer.eos_token_id]
    return Encoding(ids, 0, front=boundary_id(tokenizer))


def _labelled(tokenizer, document: Readable, most: int | None) -> Encoding:
    """A text as its tokenizer writes it for an encoder, or after the boundary token, then its label."""
    assert document.label is not None
    front = [] if tokenizer.num_special_tokens_to_add() else [boundary_id(tokenizer)]
    limit: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most - 1 - len(front)}
    ids = tokenizer(document.text, split_special_tokens=True, verbose=False, **limit)["input_ids"]
    _check_tokens(document, ids)
    return Encoding([*front, *ids, document.label], len(front) + len(ids))


def _prompted(tokenizer, document: Readable, learned: Learned) -> Encoding:
    """A document with a prompt, or a chat: the text or the answers are predicted."""
    answers: Answers
    if isinstance(document.prompt, str):
        answers = [(len(document.prompt), None)]
        ids, ends = _ids_and_ends(tokenizer, document.prompt + document.text, with_special=False)
    else:
        ids, ends, answers = _chat(tokenizer, document, learned.turns)
    places = [(bisect(ends, start), len(ids) if end is None else bisect(ends, end)) for start, end in answers]
    given, last = places[0][0], places[-1][0]
    ids = ids[: places[-1][1]]
    _check_tokens(document, ids[last:])
    bare = given > 0 and not isinstance(document.prompt, str)  # a template writes what stands in front
    if learned.end_of_answer and tokenizer.eos_token_id is not None:
        ended = bare and not special_ends(tokenizer).isdisjoint(ids[last:])
        ids = ids if ended else [*ids, tokenizer.eos_token_id]
    gaps = tuple((end, start) for (_, end), (start, _) in pairwise(places) if end < start)
    return Encoding(ids, given, gaps, None if bare else boundary_id(tokenizer))


def _check_tokens(document: Readable, ids: list[int]) -> None:
    if not ids:
        raise UserError(f"document {document.id!r}", "no tokens", "drop empty documents")


def _ids_and_ends(tokenizer, text: str, *, with_special: bool) -> tuple[list[int], list[int]]:
    """The tokens of a text, and the place after the last character of each.

    Args:
        with_special: special tokens that the text spells out are such tokens.

    Raises:
        UserError: the tokenizer is a slow one.
    """
    read = partial(tokenizer, add_special_tokens=False, split_special_tokens=not with_special, verbose=False)
    if not tokenizer.is_fast:
        fix = "give a base with a tokenizer.json"
        raise UserError("tokenizer", "a slow one, which does not say where in a text its tokens lie", fix)
    backend = tokenizer.backend_tokenizer
    processor, backend.post_processor = backend.post_processor, None  # it may leave spaces out of the places
    try:
        encoding = read(text, return_offsets_mapping=True)
    finally:
        backend.post_processor = processor
    return encoding["input_ids"], list(accumulate((end for _, end in encoding["offset_mapping"]), max))


def _chat(
    tokenizer, document: Readable, turns: Literal["last", "all"]
) -> tuple[list[int], list[int], Answers]:
    """The tokens of a chat, the place after each, and where its answers stand.

    What the template writes after an answer belongs to it. A special token that a turn spells out is one
    private character while the template runs, and text again afterwards.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spelled = [token for token in sorted(special, key=len, reverse=True) if _holds(document, token)]
    stand_ins = {token: chr(STAND_IN - i) for i, token in enumerate(spelled)}
    whole, answers = lay_out(tokenizer, document, turns, partial(_exchange, stand_ins))
    if not spelled:
        return *_ids_and_ends(tokenizer, whole, with_special=True), answers
    restore = partial(_exchange, {character: token for token, character in stand_ins.items()})
    ids, ends, place = list[int](), list[int](), 0
    for piece in re.split(f"({'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})", whole):
        text = restore(piece)
        if piece:
            some, places = _ids_and_ends(tokenizer, text, with_special=piece in special)
            ids, ends, place = ids + some, ends + [place + end for end in places], place + len(text)
    moved = [
        (len(restore(whole[:start])), None if end is None else len(restore(whole[:end])))
        for start, end in answers
    ]
    return ids, ends, moved


def _holds(document: Readable, token: str) -> bool:
    return any(token in str(part) for part in (document.text, document.prompt, document.tools))


def _exchange(strings: dict[str, str], value: Any) -> Any:
    """A value with strings in its texts exchanged, however deep they lie."""
    if isinstance(value, str):
        for old, new in strings.items():
            value = value.replace(old, new)
        return value
    if isinstance(value, dict):
        return {name: _exchange(strings, part) for name, part in value.items()}
    return [_exchange(strings, part) for part in value] if isinstance(value, list) else value
