"""Privileged text in front of every row: the teacher reads it, the student never does."""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from distill.method import OTHERS, Card, InFront, Method, Plain
from distill.models.prefix import Text, front_ids
from eval.core.config import Frozen
from eval.core.errors import UserError


class Context(InFront):
    card = Card(
        title="Text in front",
        paper="context distillation: Askell et al. 2021, arXiv:2112.00861; Snell, Klein and Zhong 2022, "
        "arXiv:2209.15189; its control: arXiv:2606.11709 and arXiv:2608.09228",
        claim="instructions, worked examples or a document in front of a text make it easier to predict",
        touches="the input: the same tokens stand in front of every row, or of every row of a domain",
        limits="a student keeps what the text says about all rows, not what must be looked up in it; any "
        "text in front teaches some style, so that the control has another text of the same length",
    )

    class Settings(Frozen):
        text: str | None = Field(None, min_length=1, description="stands in front of every row")
        file: Path | None = Field(None, description="a UTF-8 file that holds this text")
        domains: dict[str, Text] = Field(
            {},
            description="domain -> the text for its rows; where there is none, `text` or `file`, or nothing",
        )
        max_tokens: int | None = Field(None, gt=0, description="of each text the first so many tokens")
        control: Literal["wrong", "none"] = Field(
            "wrong", description="in front of the control's rows: as many tokens of a wrong text, or nothing"
        )
        wrong: Text | None = Field(
            None, description="the wrong text; none: each domain gets the text of the next one"
        )

        @model_validator(mode="after")
        def one_text(self) -> Self:
            if self.text is not None and self.file is not None:
                raise ValueError("give at most one of `text` and `file`")
            return self

    def __init__(self, settings: Frozen, wrong: bool = False) -> None:
        super().__init__(settings)
        self._wrong = wrong  # whether it is its own control
        self.texts = self._read_texts()

    def _read_texts(self) -> dict[str, tuple[str, str]]:
        """Domain -> its text and the wrong one.

        Raises:
            UserError: a file cannot be read, or there is no text or no wrong one.
        """
        settings = self.settings
        texts = {name: text.read() for name, text in sorted(settings.domains.items())}
        if settings.text is not None or settings.file is not None:
            texts[OTHERS] = Text(text=settings.text, file=settings.file).read()
        fix = "give `text`, `file` or `domains`"
        if not texts:
            raise UserError("method.settings", "no text to stand in front", fix)
        if settings.control == "none":
            return {name: (text, "") for name, text in texts.items()}
        following = dict(zip(texts, [*texts, *texts][1:], strict=False))
        wrong = {name: settings.wrong.read() if settings.wrong else texts[following[name]] for name in texts}
        if same := [name for name in texts if wrong[name] == texts[name]]:
            problem = "the control needs a wrong text, found the right one"
            where = f" of domain {same[0]!r}" if same[0] else ""
            fix = "give another text of the same kind as `wrong`, or set `control: none`"
            raise UserError(f"method.settings{where}", problem, fix)
        return {name: (text, wrong[name]) for name, text in texts.items()}

    @cached_property
    def identity(self) -> list[Any]:
        """The texts themselves: a file that moved is the same method, one that changed another."""
        return [type(self).__qualname__, self.texts, self.settings.max_tokens, self._wrong]

    def control(self) -> Method:
        """The same base after another text of as many tokens; with `control: none` after nothing."""
        return Plain(Frozen()) if self.settings.control == "none" else Context(self.settings, wrong=True)

    def in_front(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
        """Domain -> the ids in front of its rows: the boundary token, then the text.

        A wrong text is cut to the length of the right one, or repeated up to it.
        """

        ids, most = {}, self.settings.max_tokens
        for name, (text, wrong) in self.texts.items():
            right = front_ids(tokenizer, text, most)
            if self._wrong:
                first, *other = front_ids(tokenizer, wrong, most)
                right = [first, *(other * (1 + len(right) // len(other)))[: len(right) - 1]]
            ids[name] = right
        return ids
