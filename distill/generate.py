"""Writing: a student or a teacher goes on from the first tokens of training rows.

Which number decides which token is told by a seed and the row, so that a text depends neither on the rows
around it nor on the number of processes, and a stopped run goes on to the same texts.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from distill.draws import invert, uniforms
from distill.signals import AGAIN, SHARDS, check_lineage, fill
from eval.artifacts import verified
from eval.documents import Row
from eval.errors import UserError
from eval.sections import Generation

AT_ONCE = 2**14  # tokens whose keys and values a student that writes holds; of logits it needs the last alone

Write = Callable[[list[Row], Generation], list[list[int]]]  # openings of one length -> what follows each


def openings(rows: list[Row], generation: Generation) -> list[Row]:
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


def choose(log_probs: Tensor, points: Tensor, generation: Generation) -> Tensor:
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
    return invert(probabilities, points.to(log_probs.device)[:, None])[:, 0]


def points_of(rows: list[Row], generation: Generation, seed: object) -> Tensor:
    """[n, new_tokens] the numbers that decide what follows each row."""
    found = [uniforms(f"write {seed} {row.id}", generation.new_tokens) for row in rows]
    return torch.from_numpy(np.stack(found))


def sample(
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
    points, new = points_of(prompts, generation, seed), [list[int]() for _ in prompts]
    for place in range(generation.new_tokens):
        at = [i for i, tokens in enumerate(new) if not stops & set(tokens[-1:])]
        if not at:
            break
        rows = [
            Row(prompts[i].document, prompts[i].domain, prompts[i].index, prompts[i].tokens + new[i])
            for i in at
        ]
        for i, token in zip(at, choose(following(rows), points[at, place], generation).tolist(), strict=True):
            new[i].append(token)
    return new


class Chooser(LogitsProcessor):
    """Leaves of the scores [n, V] only the id that the points of its row choose."""

    def __init__(self, points: Tensor, prompt: int, generation: Generation) -> None:
        self.points, self.prompt, self.generation = points, prompt, generation

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        points = self.points[:, input_ids.shape[1] - self.prompt]
        chosen = choose(torch.log_softmax(scores.float(), dim=-1), points, self.generation)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


@contextmanager
def _writing(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
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


def student_writes(
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
    chooser = Chooser(points_of(prompts, generation, seed), size, generation)
    with _writing(model, settings):
        model.eval()
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=[chooser],
        )
    return [_up_to(tokens[size:], stops) for tokens in found.tolist()]


def _up_to(tokens: list[int], stops: set[int]) -> list[int]:
    """The tokens through the first one that stops."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def _groups(
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


def written(row: Row, tokens: list[int]) -> Row:
    """A row that gives the opening `row`, and teaches the tokens that were written after it."""
    return Row(row.document, row.domain, row.index, row.tokens + tokens, len(row.tokens) - 1)


@dataclass(frozen=True)
class OnPolicy:
    """A share of the steps learns from what the student writes (Agarwal et al. 2024, arXiv:2306.13649)."""

    share: float
    generation: Generation
    context: int
    seed: int
    pad: int

    def turn(self, step: int) -> bool:
        """Whether the student writes the rows of this step: told by the seed and the step alone."""
        return bool(uniforms(f"on-policy {self.seed} {step}", 1)[0] < self.share)

    def __call__(self, acc: Accelerator, student: PreTrainedModel, step: int, rows: list[Row]) -> list[Row]:
        """The rows that a step learns from: each process writes its share, and all of them know all texts.

        Raises:
            UserError: no process has the whole student.
        """
        if not self.turn(step):
            return rows
        if acc.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            mend = "run on_policy with plain data parallelism, or take another targets.source"
            raise UserError("targets.source", "on_policy, and no process has the whole student", mend)
        prompts = openings(rows, self.generation)
        mine = prompts[acc.process_index :: acc.num_processes]
        texts: dict[str, list[int]] = {}
        for group, settings in _groups(mine, self.generation, self.context, AT_ONCE):
            found = student_writes(student, group, settings, f"{self.seed} {step}", self.pad)
            texts |= {row.id: tokens for row, tokens in zip(group, found, strict=True)}
        if acc.num_processes > 1:
            texts = {name: tokens for part in gather_object([texts]) for name, tokens in part.items()}
        return [written(row, texts[row.id]) for row in prompts]


def write_texts(
    place: Path,
    rows: list[Row],
    write: Write,
    generation: Generation,
    *,
    context: int,
    most: int,
    report: Callable[[float], None],
    process: int = 0,
    processes: int = 1,
) -> None:
    """What a teacher writes after the opening of every row, in shards (Kim and Rush 2016, arXiv:1606.07947).

    Args:
        write: openings of one length, and the settings -> what follows each.
        most: tokens, written ones included, that the teacher sees at once.
    """
    groups = list(_groups(openings(rows, generation), generation, context, most))
    done = 0

    def shard(aside: Path, held: list[tuple[list[Row], Generation]]) -> None:
        nonlocal done
        with aside.open("w", encoding="utf-8") as out:
            for group, settings in held:
                for row, tokens in zip(group, write(group, settings), strict=True):
                    whole = written(row, tokens)
                    line = {"row": row.id, "given": whole.given, "tokens": whole.tokens}
                    out.write(json.dumps(line) + "\n")
                done += 1
                report(min(1.0, processes * done / len(groups)))

    size = max(1, len(groups) // SHARDS)
    shards = [groups[i : i + size] for i in range(0, len(groups), size)]
    fill(place, "jsonl", shards, shard, process, processes)


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("shard-*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def count_texts(place: Path) -> int:
    """Number of tokens that were written."""
    return sum(len(found["tokens"]) - 1 - found["given"] for found in _lines(place))


def read_texts(folder: Path, rows: list[Row], lineage: dict[str, str], generation: Generation) -> list[Row]:
    """The rows that a teacher wrote, one for each row.

    Raises:
        UserError: the artifact is damaged, or of another teacher, tokenizer or data, or lacks a row.
    """
    check_lineage(folder, verified(folder), lineage)
    texts = {found["row"]: found for found in _lines(folder)}
    learned = []
    for row in openings(rows, generation):
        found = texts.get(row.id)
        if found is None or found["tokens"][: len(row.tokens)] != row.tokens:
            raise UserError(f"targets {folder}", f"row {row.id} is not of these tokens", AGAIN)
        learned.append(written(row, found["tokens"][len(row.tokens) :]))
    return learned
