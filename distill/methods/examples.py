"""Passages of training documents in front of every row, drawn anew for each seed."""

import json
import random
from collections.abc import Sequence

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.method import Card, Method, MethodContext, TeacherOutput
from distill.models.cached import NextLogProbs, reader_after
from distill.models.prefix import Prefix, read_prefix
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, Row, boundary_id
from eval.core.errors import UserError

PASSAGES = "passages.json"  # [{"document": id, "tokens": [id]}]


class Examples(Method):
    card = Card(
        title="Examples in front",
        paper="examples in front: Brown et al. 2020, arXiv:2005.14165; their distillation: Snell, Klein and "
        "Zhong 2022, arXiv:2209.15189",
        claim="a model predicts a text better after passages of other texts of the same kind",
        touches="the input: the same passages stand in front of every row",
        limits="plain training on the same rows may gain as much or more; a row of a document that is quoted "
        "is read without the passages, or its teacher would copy",
    )

    class Settings(Frozen):
        count: int = Field(4, gt=0, description="passages, each of another document")
        tokens: int = Field(250, gt=0, description="tokens of each passage, from the start of a row")

    def fit(self, context: MethodContext) -> None:
        """Draws the passages by the seed, and writes them.

        Raises:
            UserError: the training rows are of fewer documents than passages, or too short.
        """
        rows, wanted = context.rows(), self.settings
        places, passages = list(range(len(rows))), dict[str, list[int]]()
        random.Random(f"examples {context.seed}").shuffle(places)
        for place in places:
            row = rows[place]
            tokens = row.tokens[1 : 1 + wanted.tokens]
            if len(tokens) == wanted.tokens and not row.packed:
                passages.setdefault(row.document, tokens)
            if len(passages) == wanted.count:
                listed = [{"document": name, "tokens": ids} for name, ids in passages.items()]
                write_text(context.folder / PASSAGES, json.dumps(listed))
                return
        problem = f"{len(passages)} training documents have a row of {wanted.tokens} tokens, {wanted.count} "
        fix = "lower `count` or `tokens`, or take more rows (data.train_rows) that are not packed"
        raise UserError("method.settings", f"{problem}are needed", fix)

    def tokens_in_front(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self.settings.count * (1 + self.settings.tokens)

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> tuple[set[str], Prefix]:
        """The documents that are quoted, and the passages."""
        passages = json.loads((context.folder / PASSAGES).read_text(encoding="utf-8"))
        first = boundary_id(context.tokenizer)
        ids = [token for passage in passages for token in (first, *passage["tokens"])]
        return {passage["document"] for passage in passages}, read_prefix(teacher, ids)

    def _prefixes(self, documents: Sequence[str]) -> list[Prefix | None]:
        quoted, prefix = self.parts
        return [None if document in quoted else prefix for document in documents]

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return self.model_output_after(teacher, batch, self._prefixes(batch.documents))

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> NextLogProbs:
        return reader_after(teacher, prompts, self._prefixes([row.document for row in prompts]))
