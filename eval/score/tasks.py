"""Marks of a model on the items of a task, by any engine. An item is a cluster."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import torch

from eval.core.documents import Row, batches, boundary_id
from eval.core.errors import UserError
from eval.core.records import Items
from eval.core.sections import Task
from eval.engines import Engine
from eval.metrics.answers import chosen, exact_match, token_f1
from eval.metrics.likelihood import likeliest, predicted
from eval.score.items import Item, read_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = {"exact_match": exact_match, "f1": token_f1}


def run_task(task: Task, engine: Engine, context: int, batch_tokens: int) -> Items:
    """Marks of a model, one per item: 0 or 1, or an F1 between them.

    Multiple choice takes the likeliest choice per byte, and tells the likeliest one in `raw`. Generated
    answers are greedy.

    Raises:
        UserError: the file is not sound, or an item does not fit into `context` tokens.
    """
    items = read_items(task)
    if task.kind == "multiple_choice":
        return choose(items, engine, context, batch_tokens)
    outputs = generate(items, engine, context, batch_tokens, task.new_tokens)
    marks = [MARKS[task.kind](text, item.answers) for text, item in zip(outputs, items, strict=True)]
    return Items(id=[item.id for item in items], value=marks, output=outputs)


def choose(items: list[Item], engine: Engine, context: int, batch_tokens: int) -> Items:
    """Log-likelihood of every choice after its prompt, and what is chosen by it."""
    tokenizer, found = engine.tokenizer, dict[str, float]()
    rows = [row for i, item in enumerate(items) for row in choice_rows(tokenizer, item, str(i), context)]
    for batch in batches(rows, boundary_id(tokenizer), batch_tokens):
        said = predicted(engine.borrowed(batch), batch)
        rows_of = batch.mask.nonzero()[:, 0]
        sums = torch.bincount(rows_of, said.nats.double().cpu(), minlength=len(batch.ids))
        found |= dict(zip(batch.ids, (-sums).tolist(), strict=True))
    even, raw = [], []
    for i, item in enumerate(items):
        likelihoods = [found[f"{i}#{j}"] for j in range(len(item.choices))]
        sizes = [len(choice.encode()) for choice in item.choices]
        even.append(float(item.choices[chosen(likelihoods, sizes)] in item.answers))
        raw.append(float(item.choices[chosen(likelihoods)] in item.answers))
    return Items(id=[item.id for item in items], value=even, raw=raw)


def choice_rows(tokenizer: "PreTrainedTokenizerBase", item: Item, name: str, context: int) -> Iterator[Row]:
    """One row per choice: the end of the prompt is given, the choice is predicted.

    Prompt and choice are tokenized as one text. A token that holds letters of both is predicted, so that no
    letter of a choice goes free.
    """
    if not tokenizer.is_fast:
        raise UserError("tokenizer", "it does not tell where its tokens lie", "save a tokenizer.json with it")
    for i, choice in enumerate(item.choices):
        made = tokenizer(
            item.prompt + choice, add_special_tokens=False, verbose=False, return_offsets_mapping=True
        )
        given = sum(end <= len(item.prompt) for _, end in made["offset_mapping"])
        tokens, size = made["input_ids"], len(made["input_ids"]) - given
        _check_fits(item, f"choice {choice[:40]!r} has {size} tokens", size, context)
        dropped = max(0, len(tokens) - (context - 1))
        yield Row(name, "", i, [boundary_id(tokenizer), *tokens[dropped:]], given - dropped)


def _check_fits(item: Item, found: str, size: int, context: int) -> None:
    if size >= context - 1:
        fix = f"a row holds {context - 1} tokens beside the boundary, and some of the prompt: shorten it"
        raise UserError(f"item {item.id!r}", found, fix)


def generate(
    items: list[Item], engine: Engine, context: int, batch_tokens: int, new_tokens: int
) -> list[str]:
    """Greedy answers: as many lines as the longest accepted answer has, white space before them dropped.

    Prompts of one length go together, so that nothing is padded.
    """
    tokenizer, kept = engine.tokenizer, context - 1 - new_tokens
    prompts = []
    for item in items:
        _check_fits(item, f"{new_tokens} new tokens are asked", new_tokens, context)
        tokens = tokenizer(item.prompt, add_special_tokens=False, verbose=False)["input_ids"]
        prompts.append([boundary_id(tokenizer), *tokens[-kept:]])
    outputs = [""] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    for length, group in groupby(order, key=lambda i: len(prompts[i])):
        places, step = list(group), max(1, batch_tokens // (length + new_tokens))
        for start in range(0, len(places), step):
            part = places[start : start + step]
            made = greedy(engine, [prompts[i] for i in part], new_tokens)
            for i, ids in zip(part, made, strict=True):
                outputs[i] = answer_text(tokenizer.decode(ids, skip_special_tokens=True), items[i])
    return outputs


def greedy(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest continuations of prompts of one length, each up to the end-of-text token."""
    known, end = len(engine.tokenizer), engine.tokenizer.eos_token_id
    logits, state = engine.prefill(torch.tensor(prompts))
    made: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step in range(new_tokens):
        tokens = likeliest(logits[:, :known].contiguous())
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token == end
            if not ended[i]:
                made[i].append(token)
        if all(ended) or step + 1 == new_tokens:
            break
        logits, state = engine.decode(tokens, state)
    return made


def answer_text(text: str, item: Item) -> str:
    lines = max(answer.strip().count("\n") for answer in item.answers) + 1
    return "\n".join(text.lstrip().split("\n")[:lines]).rstrip()
