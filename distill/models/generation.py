"""Generation: a student or a teacher continues the first tokens of training rows.

The random numbers of a text come from a seed and the row id, so that it depends neither on the other rows of
its batch nor on the number of processes, and an interrupted run continues to the same texts.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from eval.core.documents import Row
from eval.core.documents.encoding import end_ids
from eval.core.errors import UserError
from eval.core.sections import Generation


def uniforms(key: str, *shape: int) -> np.ndarray:
    """float64 numbers in [0, 1) of the given shape, decided by `key` alone (Philox, counter-based)."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed)).random(shape)


def inverse_cdf(probabilities: Tensor, points: Tensor) -> Tensor:
    """[n, K] ids at which the cumulative probability passes `points` [n, K] in [0, 1).

    Never an id of probability 0. Summed in float64: at V = 152k a float32 sum would lose the tail.

    Args:
        probabilities: [n, V], not negative; they need not sum to one.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    ids = torch.searchsorted(cumulative, points.double() * total, right=True)
    # A point that rounds up to the total belongs to the last id of positive weight.
    last = torch.searchsorted(cumulative, total, right=False)
    return torch.minimum(ids, last)


def refuse_packing(packed: bool, reason: str) -> None:
    """Refuses rows that hold several documents each.

    Raises:
        UserError: they do; `reason` says why they must not.
    """
    if packed:
        raise UserError("data.packing", f"true, but {reason}", "set data.packing: false")


def make_prompts(rows: Sequence[Row], generation: Generation) -> list[Row]:
    """The prompt in each row: that of its document if it has one, else its first tokens.

    Raises:
        UserError: a row is packed: texts are generated from single documents.
    """
    refuse_packing(any(row.packed for row in rows), "texts are generated from single documents")
    sizes = [1 + row.given if row.given else min(generation.prompt_tokens, len(row.tokens)) for row in rows]
    return [
        Row(row.document, row.domain, row.index, row.tokens[:size], size - 1)
        for row, size in zip(rows, sizes, strict=True)
    ]


def list_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds to a model's generation config the ends that its tokenizer knows: then texts stop there."""
    listed = stop_ids(model) if model.can_generate() else end_ids(tokenizer)
    if missing := sorted(end_ids(tokenizer) - listed):
        every = [*sorted(listed), *missing]
        model.generation_config.eos_token_id = every if len(every) > 1 else every[0]


def stop_ids(model: PreTrainedModel) -> set[int]:
    """Ids that end a text, as its configs list them; those of its tokenizer are added by `list_ends`."""
    eos = model.generation_config.eos_token_id
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return set(eos) if isinstance(eos, list) else {eos} - {None}


def choose_tokens(log_probs: Tensor, points: Tensor, generation: Generation) -> Tensor:
    """[n] ids drawn from [n, V] log-probabilities by points [n] in [0, 1).

    At temperature 0 the most likely id. With top_p < 1 from the smallest set of most likely ids with at least
    that probability (Holtzman et al. 2020, arXiv:1904.09751).
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
    """[n, new_tokens] uniform random numbers, one for each token after each row."""
    points = [uniforms(f"write {seed} {row.id}", generation.new_tokens) for row in rows]
    return torch.from_numpy(np.stack(points))


def sample_texts(
    next_log_probs: Callable[[list[Row]], Tensor],
    prompts: list[Row],
    generation: Generation,
    seed: object,
    stops: set[int],
) -> list[list[int]]:
    """The ids generated after each prompt, token by token, up to a stop id.

    Args:
        next_log_probs: rows of one length -> [n, V] log-probabilities of the token after each.
    """
    points, new = uniform_points(prompts, generation, seed), [list[int]() for _ in prompts]
    for position in range(generation.new_tokens):
        unfinished = [i for i, tokens in enumerate(new) if not stops & set(tokens[-1:])]
        if not unfinished:
            break
        rows = [
            Row(prompts[i].document, prompts[i].domain, prompts[i].index, prompts[i].tokens + new[i])
            for i in unfinished
        ]
        chosen = choose_tokens(next_log_probs(rows), points[unfinished, position], generation)
        for i, token in zip(unfinished, chosen.tolist(), strict=True):
            new[i].append(token)
    return new


class CachedReader:
    """Log-probabilities of the token after each row, of the mean of models with their key-value caches.

    One is made for one call of `sample_texts`: rows grow by a token between two calls, and some of them end.
    """

    def __init__(self, models: Sequence[PreTrainedModel], prompts: list[Row], **inputs: Any) -> None:
        """`inputs`: further arguments of the forward passes, for all prompts."""
        self.models, self.inputs = models, inputs
        self.tokens = {row.id: row.tokens for row in prompts}  # as last read; those of an ended row stay
        self.caches: list[Any] = [None] * len(models)

    @torch.no_grad()
    def __call__(self, rows: list[Row]) -> Tensor:
        """[n, V] of the rows that have not ended, all of one length."""
        latest = {row.id: row.tokens for row in rows}
        size = len(rows[0].tokens)
        self.tokens = {name: latest.get(name, [*tokens, 0][:size]) for name, tokens in self.tokens.items()}
        ids = torch.tensor(list(self.tokens.values()))
        log_probs = torch.stack([self._read(place, ids) for place in range(len(self.models))])
        active = [place for place, name in enumerate(self.tokens) if name in latest]
        return (log_probs.logsumexp(0) - math.log(len(log_probs)))[active]

    def _read(self, place: int, ids: Tensor) -> Tensor:
        """[B, V] of one model: of the last token alone where it has a cache, else of all."""
        model, cache = self.models[place], self.caches[place]
        ids = ids.to(model.device)
        unread = ids if cache is None else ids[:, -1:]
        mask = torch.ones_like(ids)
        output = model(
            input_ids=unread, attention_mask=mask, past_key_values=cache, use_cache=True, **self.inputs
        )
        self.caches[place] = getattr(output, "past_key_values", None)  # state spaces keep other states
        return output.logits[:, -1].float().log_softmax(-1).to(self.models[0].device)


class ChosenTokens(LogitsProcessor):
    """Keeps of the scores [n, V] only the id that the random numbers of its row choose."""

    def __init__(self, points: Tensor, prompt: int, generation: Generation) -> None:
        self.points, self.prompt, self.generation = points, prompt, generation

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        points = self.points[:, input_ids.shape[1] - self.prompt]
        chosen = choose_tokens(torch.log_softmax(scores.float(), dim=-1), points, self.generation)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


@contextmanager
def _generation_mode(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Sets the generation settings, and restores them, the mode and torch's random state on exit."""
    training, own_settings = model.training, model.generation_config
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.generation_config = settings
            yield
        finally:
            model.generation_config = own_settings
            model.train(training)


def generate_texts(
    model: PreTrainedModel, prompts: list[Row], generation: Generation, seed: object, pad: int
) -> list[list[int]]:
    """The ids that a plain model generates after prompts of one length, with its key-value cache."""
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
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=[chooser],
        )
    return [_cut_after_stop(tokens[size:], stops) for tokens in generated.tolist()]


def _cut_after_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens up to and including the first stop id."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def groups_by_length(
    rows: list[Row], generation: Generation, context: int, max_tokens: int
) -> Iterator[tuple[list[Row], Generation]]:
    """Groups of prompts of one length, each with its texts at most `max_tokens` tokens."""
    ordered = sorted(rows, key=lambda row: (len(row.tokens), row.id))
    for size, group in groupby(ordered, key=lambda row: len(row.tokens)):
        room = context - size
        if room < 1:
            problem = f"a prompt of {size} tokens leaves no room in data.context = {context}"
            raise UserError("targets.generation", problem, "lower prompt_tokens, or raise data.context")
        settings = generation.model_copy(update={"new_tokens": min(generation.new_tokens, room)})
        same, count = list(group), max(1, max_tokens // (size + settings.new_tokens))
        yield from ((same[i : i + count], settings) for i in range(0, len(same), count))


def generated_row(row: Row, tokens: list[int]) -> Row:
    """A row with the prompt `row` as given, and the tokens generated after it as what is predicted."""
    return Row(row.document, row.domain, row.index, row.tokens + tokens, len(row.tokens) - 1)
