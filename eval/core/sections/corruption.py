"""Damage to validation documents, as a study asks for it."""

from typing import Literal

from pydantic import Field

from eval.core.config import Frozen

# What is damaged, of which `strength` is the share.
DAMAGED = {
    "typos": "the letters",
    "truncation": "the bytes",
    "whitespace": "the spaces",
    "lowercase": "the words with capitals",
}


class Corruption(Frozen):
    """Damage done to every validation document, the same in every run."""

    kind: Literal["typos", "truncation", "whitespace", "lowercase"] = Field(
        description="letters are mistyped; the start of the text, or some of its spaces are dropped; words "
        "with capitals are written without"
    )
    strength: float = Field(
        gt=0, le=1, description="share of the letters, of the bytes, of the spaces, or of those words"
    )

    @property
    def slice(self) -> str:
        return f"{self.kind}-{self.strength:g}"
