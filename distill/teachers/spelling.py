"""Tokens that a server names by their texts: back to ids, exactly or not at all."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.teachers.alignment import Vocabulary
from eval.core.errors import UserError

BROKEN = "\ufffd"  # in a text: part of a character
BY_ID = "token_id:"  # how a server spells a token that it was asked to name by its id


class Unmapped(Exception):
    """The texts of tokens that a server names do not say which ids they are."""


class Spelling:
    """One way to spell the tokens of a vocabulary: which ids are certain by their text.

    Args:
        texts: of the ids 0, 1, ...
    """

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.ids = texts, dict[str, int | None]()
        for i, text in enumerate(texts):
            self.ids[text] = None if text in self.ids or not text or BROKEN in text else i

    def fits(self, tokens: list[int], texts: list[str]) -> bool:
        """True if tokens are spelled so; part of a character may have no text, or stand for others."""
        return all(
            text in (self.texts[token], f"{BY_ID}{token}") or (not text and BROKEN in self.texts[token])
            for token, text in zip(tokens, texts, strict=True)
        )

    def id(self, text: str) -> int | None:
        """The id of a text; None: several ids have it, or it is padding, so that it belongs to the tail.

        Raises:
            Unmapped: no id has it.
        """
        if text.startswith(BY_ID):
            number = int(text.removeprefix(BY_ID))
            return number if number < len(self.texts) else None
        if text and BROKEN not in text and text not in self.ids:
            raise Unmapped(f"{text!r} there is no token of the tokenizer of the base")
        return self.ids.get(text)


def spellings(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Spelling]:
    """The ways in which servers spell tokens: as `decode` does, which gives `texts`, and by their own bytes.

    They differ in the space that a word of SentencePiece begins with.
    """
    try:
        vocabulary = Vocabulary(tokenizer, "the base")
    except UserError:  # its tokens are no bytes of a text
        return [Spelling(texts)]
    pieces = [text.decode(errors="replace") for text in vocabulary.text]
    for i in tokenizer.all_special_ids:
        pieces[i] = str(tokenizer.convert_ids_to_tokens(i))
    return [Spelling(texts), Spelling(pieces)]


def columns(logprobs: dict[str, Any]) -> list[list[Any]]:
    """Texts of tokens, their log-probabilities, and a mapping of the likeliest, of either form of OpenAI's.

    In the new one (`content`, as llama.cpp writes it) an entry may name its id.
    """
    if "content" not in logprobs:
        return [logprobs[column] for column in ("tokens", "token_logprobs", "top_logprobs")]

    def name(entry: dict[str, Any]) -> str:
        return f"{BY_ID}{entry['id']}" if "id" in entry else str(entry["token"])

    content = logprobs["content"]
    tops = [{name(one): one["logprob"] for one in entry["top_logprobs"]} for entry in content]
    return [[name(entry) for entry in content], [entry["logprob"] for entry in content], tops]
