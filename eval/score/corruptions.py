"""Damage to validation documents at a stated strength: the same in every run, on every machine and Python.

Damaged documents are a slice of their own and only ever scored: it asks whether the method's gain survives
input that is not clean. No file holds them: they are made where they are scored, so that no data and no model
depends on which damage a study asks for. Positions are drawn by SHA-256 of the kind, the strength and the
document's id.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from eval.core.documents import VALIDATION, Document, read_documents, scored_slices
from eval.core.errors import UserError
from eval.core.sections import Corruption

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def slice_names(data: Path, corruptions: Sequence[Corruption]) -> list[str]:
    """The slices that are scored: validation first, then the shifted and the damaged ones by name."""
    first, *shifted = scored_slices(data)
    return [first, *sorted([*shifted, *(one.slice for one in corruptions)])]


def slice_documents(data: Path, name: str, corruptions: Sequence[Corruption]) -> list[Document]:
    """The documents of a slice: of a damaged one those of validation, each damaged, under its own id.

    Raises:
        UserError: there is no such slice, or nothing is left of a document.
    """
    for corruption in corruptions:
        if corruption.slice == name:
            return [corrupted(document, corruption) for document in read_documents(data, VALIDATION)]
    return read_documents(data, name)


def corrupted(document: Document, corruption: Corruption) -> Document:
    """The document with its text damaged; where it has a prompt, the prompt and not the scored text.

    Raises:
        UserError: nothing is left to score.
    """
    name = f"{corruption.slice}:{document.id}"
    if document.prompt:
        return replace(document, prompt=_prompt(document.prompt, corruption, name))
    text = DAMAGES[corruption.kind](document.text, corruption.strength, name)
    if not text.strip():
        fix = "lower its strength in data.corruptions"
        raise UserError(f"slice {corruption.slice!r}", f"nothing is left of document {document.id!r}", fix)
    return replace(document, text=text)


def _prompt(
    prompt: str | list[dict[str, str]], corruption: Corruption, name: str
) -> str | list[dict[str, str]]:
    """A damaged prompt, or a chat of which the user's turns are damaged."""
    damage = DAMAGES[corruption.kind]
    if isinstance(prompt, str):
        return damage(prompt, corruption.strength, name)
    return [
        {**turn, "content": damage(turn["content"], corruption.strength, f"{name}:{i}")}
        if turn["role"] == "user"
        else turn
        for i, turn in enumerate(prompt)
    ]


def typos(text: str, strength: float, name: str) -> str:
    """A share of the letters is dropped, replaced, or swapped with the letter that follows.

    Exactly round(strength * letters) of them are hit. What is not a letter stays as it is and where it
    stands among the others, so that lines, numbers and code marks survive.
    """
    chance = _numbers(name)
    out = list(text)
    for place in _chosen([i for i, letter in enumerate(text) if letter.isalpha()], strength, chance):
        kind = next(chance) % 3
        following = place + 1
        if kind == 0:
            out[place] = ""
        elif kind == 1 and following < len(out) and text[following].isalpha():
            out[place], out[following] = out[following], out[place]
        else:
            out[place] = LETTERS[next(chance) % len(LETTERS)]
    return "".join(out)


def truncation(text: str, strength: float, name: str) -> str:
    """A share of the bytes is cut off the start, whole characters only.

    What is left is scored without what came before it. Cutting the end instead would leave the rest as easy
    as it was: it would lose documents and no context.
    """
    data = text.encode()
    return data[round(strength * len(data)) :].decode(errors="ignore")


def whitespace(text: str, strength: float, name: str) -> str:
    """Exactly round(strength * spaces) of the spaces, tabs and line ends are dropped; the rest stays."""
    spaces = [i for i, letter in enumerate(text) if letter.isspace()]
    dropped = set(_chosen(spaces, strength, _numbers(name)))
    return "".join(letter for i, letter in enumerate(text) if i not in dropped)


def lowercase(text: str, strength: float, name: str) -> str:
    """Exactly round(strength * words) of the words that have capitals are written in small letters."""
    words = list(re.finditer(r"\w+", text))
    capitals = [i for i, word in enumerate(words) if word[0] != word[0].lower()]
    out = list(text)
    for place in _chosen(capitals, strength, _numbers(name)):
        start, end = words[place].span()
        out[start:end] = [letter.lower() for letter in out[start:end]]
    return "".join(out)


DAMAGES: dict[str, Callable[[str, float, str], str]] = {
    "typos": typos,
    "truncation": truncation,
    "whitespace": whitespace,
    "lowercase": lowercase,
}


def _numbers(name: str) -> Iterator[int]:
    """Numbers below 2^32 that depend on the name alone."""
    count = 0
    while True:
        block = hashlib.sha256(f"{name}:{count}".encode()).digest()
        yield from (int.from_bytes(block[i : i + 4]) for i in range(0, len(block), 4))
        count += 1


def _chosen(places: list[int], strength: float, chance: Iterator[int]) -> list[int]:
    """round(strength * places) of the places, in ascending order."""
    ranked = sorted((next(chance), place) for place in places)
    return sorted(place for _, place in ranked[: round(strength * len(places))])
