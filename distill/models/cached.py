"""Token by token after texts that stand in front, whose keys and values are those that were read once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.models.generation import CachedReader
from distill.models.lm_head import capture_input, output_embedding
from distill.models.prefix import Prefix
from eval.core.documents import Row

NextLogProbs = Callable[[list[Row]], Tensor]  # rows of one length -> [n, V] of the token after each


def reader_after(
    model: PreTrainedModel, prompts: Sequence[Row], prefixes: Sequence[Prefix | None]
) -> NextLogProbs:
    """Reads on from prompts of one length, each after its prefix or after nothing.

    Equal up to rounding to the whole text read anew for every token.
    """
    groups: dict[int, list[int]] = {}
    for place, prefix in enumerate(prefixes):
        groups.setdefault(id(prefix), []).append(place)
    readers = [
        _Reader(model, [prompts[place] for place in places], prefixes[places[0]])
        for places in groups.values()
    ]

    def next_log_probs(rows: list[Row]) -> Tensor:
        own = [[place for place, row in enumerate(rows) if row.id in reader.names] for reader in readers]
        parts = [
            reader([rows[i] for i in places]) for reader, places in zip(readers, own, strict=True) if places
        ]
        order = torch.tensor([place for places in own for place in places])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    return next_log_probs


class _Reader:
    """The reader of prompts that stand after one prefix."""

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, prompts: list[Row], prefix: Prefix | None) -> None:
        self.names = {row.id for row in prompts}
        self._front = [] if prefix is None else prefix.ids.tolist()
        reader = CachedReader([model], self._after_front(prompts))
        if prefix is not None and prefix.cache is not None and id(prefix.reader) == id(model):
            cache = prefix.expanded(len(prompts))
            # The reader itself reads the last token of the prompts.
            ids = torch.tensor([row.tokens[:-1] for row in prompts], dtype=torch.int64, device=model.device)
            if ids.shape[1]:
                mask = ids.new_ones(len(ids), len(self._front) + ids.shape[1])
                with capture_input(output_embedding(model)):
                    model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            reader.caches[0] = cache
        self._read = reader

    def _after_front(self, rows: list[Row]) -> list[Row]:
        return [Row(row.document, row.domain, row.index, [*self._front, *row.tokens]) for row in rows]

    def __call__(self, rows: list[Row]) -> Tensor:
        return self._read(self._after_front(rows))
