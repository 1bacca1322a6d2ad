"""Generation: a student or a teacher goes on from the first tokens of training rows.

Which number decides which token comes from a seed and the row, so that a text depends neither on the rows
around it nor on the number of processes, and a stopped run goes on to the same texts.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections import Generation


def uniforms(key: str, *shape: int) -> np.ndarray:
    """float64 numbers in [0, 1) of the given shape, decided by `key` alone (Philox, counter-based)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed)).random(shape)


def inverse_cdf(probabilities: Tensor, points: Tensor) -> Tensor:
    """[n, K] ids at which the cumulated probabilities pass `points` [n, K] in [0, 1); ids of weight 0 never.

    probabilities: [n, V], not negative; they need not sum to one. Cumulated in float64: at V = 152k a float32
    sum would lose the tail.
    """
    rise = probabilities.double().cumsum(-1)
    total = rise[:, -1:].contiguous()
    ids = torch.searchsorted(rise, points.double() * total, right=True)
    # A point that rounds up to the total belongs to the last id of positive weight.
    last = torch.searchsorted(rise, total, right=False)
    return torch.minimum(ids, last)


def make_prompts(rows: list[Row], generation: Generation) -> list[Row]:
    """What each row gives: the prompt of a document that has one, else its first tokens.

    Raises:
        UserError: a row is packed; its parts would be one text.
    """
    if any(row.packed for row in rows):
        raise UserError("data.packing", "true, and texts are written", "set data.packing: false")
    sizes = [1 + row.given if row.given else min(generation.prompt_tokens, len(row.tokens)) for row in rows]
    return [
        Row(row.document, row.domain, row.index, row.tokens[:size], size - 1)
        for row, size in zip(rows, sizes, strict=True)
    ]


def stop_ids(model: PreTrainedModel) -> set[int]:
    """Ids that end a text."""
    found = model.generation_config.eos_token_id
    found = model.config.get_text_config().eos_token_id if found is None else found
    return set(found) if isinstance(found, list) else {found} - {None}


def choose_tokens(log_probs: Tensor, points: Tensor, generation: Generation) -> Tensor:
    """[n] ids drawn from [n, V] log-probabilities by points [n] in [0, 1).

    At temperature 0 the likeliest. With top_p < 1 from the fewest likeliest ids that hold so much of the
    probability (Holtzman et al. 2020, arXiv:1904.09751).
    """
    if generation.temperature == 0:
        return log_probs.argmax(-1)
    probabilities = torch.softmax(log_probs.float() / generation.temperature, dim=-1)
    if generation.top_p < 1:
        ordered, ids = probabilities.sort(dim=-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= generation.top_p
        probabilities = probabilities.scatter(-1, ids, ordered.masked_fill(dropped, 0.0))
    return inverse_cdf(probabilities, points.to(log_probs.device)[:, None])[:, 0]


def uniform_points(rows: list[Row], generation: Generation, seed: object) -> Tensor:
    """[n, new_tokens] the numbers that decide what follows each row."""
    found = [uniforms(f"write {seed} {row.id}", generation.new_tokens) for row in rows]
    return torch.from_numpy(np.stack(found))


def sample_texts(
    following: Callable[[list[Row]], Tensor],
    prompts: list[Row],
    generation: Generation,
    seed: object,
    stops: set[int],
) -> list[list[int]]:
    """What follows each prompt, token by token, up to an id that stops it.

    Args:
        following: rows of one length -> [n, V] log-probabilities of the token after each.
    """
    points, new = uniform_points(prompts, generation, seed), [list[int]() for _ in prompts]
    for place in range(generation.new_tokens):
        at = [i for i, tokens in enumerate(new) if not stops & set(tokens[-1:])]
        if not at:
            break
        rows = [
            Row(prompts[i].document, prompts[i].domain, prompts[i].index, prompts[i].tokens + new[i])
            for i in at
        ]
        for i, token in zip(
            at, choose_tokens(following(rows), points[at, place], generation).tolist(), strict=True
        ):
            new[i].append(token)
    return new


class ChosenTokens(LogitsProcessor):
    """Leaves of the scores [n, V] only the id that the points of its row choose."""

    def __init__(self, points: Tensor, prompt: int, generation: Generation) -> None:
        self.points, self.prompt, self.generation = points, prompt, generation

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        points = self.points[:, input_ids.shape[1] - self.prompt]
        chosen = choose_tokens(torch.log_softmax(scores.float(), dim=-1), points, self.generation)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


@contextmanager
def _generation_mode(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, these settings in place of the model's own, and no trace on torch's random numbers."""
    trained, own = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.generation_config = settings
            yield
        finally:
            model.generation_config = own
            model.train(trained)


def generate_texts(
    model: PreTrainedModel, prompts: list[Row], generation: Generation, seed: object, pad: int
) -> list[list[int]]:
    """What a plain model writes after prompts of one length, with its cache of keys and values."""
    stops, size = stop_ids(model), len(prompts[0].tokens)
    settings = GenerationConfig(
        max_new_tokens=generation.new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
    )
    ids = torch.tensor([row.tokens for row in prompts], device=model.device)
    chooser = ChosenTokens(uniform_points(prompts, generation, seed), size, generation)
    with _generation_mode(model, settings):
        model.eval()
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=[chooser],
        )
    return [_cut_after_stop(tokens[size:], stops) for tokens in found.tolist()]


def _cut_after_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens through the first one that stops."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def groups_by_length(
    rows: list[Row], generation: Generation, context: int, most: int
) -> Iterator[tuple[list[Row], Generation]]:
    """Openings of one length, so many that they and what follows are at most `most` tokens."""
    ordered = sorted(rows, key=lambda row: (len(row.tokens), row.id))
    for size, group in groupby(ordered, key=lambda row: len(row.tokens)):
        room = context - size
        if room < 1:
            found = f"{size} tokens are given, and a row has {context}"
            raise UserError("targets.generation", found, "lower prompt_tokens, or raise data.context")
        settings = generation.model_copy(update={"new_tokens": min(generation.new_tokens, room)})
        same, count = list(group), max(1, most // (size + settings.new_tokens))
        yield from ((same[i : i + count], settings) for i in range(0, len(same), count))


def generated_row(row: Row, tokens: list[int]) -> Row:
    """A row that gives the opening `row`, and teaches the tokens that were written after it."""
    return Row(row.document, row.domain, row.index, row.tokens + tokens, len(row.tokens) - 1)
