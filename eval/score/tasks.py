"""Scores of a model on the samples of a task, by any engine. A sample is a cluster of the crossed test."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from eval.core.documents import Row, batches, boundary_id
from eval.core.documents.encoding import text_ids
from eval.core.errors import UserError
from eval.core.records import SampleScores
from eval.core.sections import Task
from eval.engines import Engine
from eval.metrics.functions import exact_match, likeliest_choice, token_f1
from eval.metrics.likelihood import likeliest_tokens, predict_tokens
from eval.score.samples import Sample, read_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_METRICS = {"exact_match": exact_match, "f1": token_f1}


def run_task(task: Task, engine: Engine, context: int, batch_tokens: int) -> SampleScores:
    """Scores of a model, one per sample: 0 or 1, or an F1 between them.

    In multiple choice `value` is by the likelihood per byte, `raw` by the plain likelihood. Generated answers
    are greedy.

    Raises:
        UserError: the file is not sound, or a sample does not fit into `context` tokens.
    """
    samples = read_samples(task)
    if task.kind == "multiple_choice":
        return choose(samples, engine, context, batch_tokens)
    outputs = generate(samples, engine, context, batch_tokens, task.new_tokens)
    metric = ANSWER_METRICS[task.kind]
    values = [metric(text, sample.answers) for text, sample in zip(outputs, samples, strict=True)]
    return SampleScores(id=[sample.id for sample in samples], value=values, output=outputs)


def choose(samples: list[Sample], engine: Engine, context: int, batch_tokens: int) -> SampleScores:
    """Scores the choice of the highest log-likelihood after the prompt: per byte, and raw."""
    import torch

    tokenizer, log_likelihoods = engine.tokenizer, dict[str, float]()
    rows = [
        row for i, sample in enumerate(samples) for row in choice_rows(tokenizer, sample, str(i), context)
    ]
    for batch in batches(rows, boundary_id(tokenizer), batch_tokens):
        predictions = predict_tokens(engine.borrowed(batch), batch)
        row_of_token = batch.mask.nonzero()[:, 0]
        nats = torch.bincount(row_of_token, predictions.nats.double().cpu(), minlength=len(batch.ids))
        log_likelihoods |= dict(zip(batch.ids, (-nats).tolist(), strict=True))
    per_byte, raw = [], []
    for i, sample in enumerate(samples):
        values = [log_likelihoods[f"{i}#{j}"] for j in range(len(sample.choices))]
        sizes = [len(choice.encode()) for choice in sample.choices]
        per_byte.append(float(sample.choices[likeliest_choice(values, sizes)] in sample.answers))
        raw.append(float(sample.choices[likeliest_choice(values)] in sample.answers))
    return SampleScores(id=[sample.id for sample in samples], value=per_byte, raw=raw)


def choice_rows(
    tokenizer: "PreTrainedTokenizerBase", sample: Sample, name: str, context: int
) -> Iterator[Row]:
    """One row per choice: the end of the prompt is given, the choice is predicted.

    Prompt and choice are tokenized as one text. A token that holds letters of both is predicted, so that no
    letter of a choice goes unscored.
    """
    if not tokenizer.is_fast:
        raise UserError(
            "tokenizer",
            "a slow one, which gives no offsets of its tokens in the text",
            "save a fast one, with a tokenizer.json: multiple_choice needs the offsets",
        )
    for i, choice in enumerate(sample.choices):
        encoded = tokenizer(
            sample.prompt + choice,
            add_special_tokens=False,
            split_special_tokens=True,
            verbose=False,
            return_offsets_mapping=True,
        )
        given = sum(end <= len(sample.prompt) for _, end in encoded["offset_mapping"])
        tokens, size = encoded["input_ids"], len(encoded["input_ids"]) - given
        check_fits(sample, f"choice {choice[:40]!r} has {size} tokens", size, context)
        dropped = max(0, len(tokens) - (context - 1))
        yield Row(name, "", i, [boundary_id(tokenizer), *tokens[dropped:]], given - dropped)


def check_fits(sample: Sample, problem: str, size: int, context: int) -> None:
    """Refuses a sample of which `size` tokens and some of the prompt do not fit into one row."""
    if size >= context - 1:
        fix = f"at most {context - 2} fit beside the boundary token and a token of the prompt: shorten it"
        raise UserError(f"sample {sample.id!r}", problem, fix)


def generate(
    samples: list[Sample], engine: Engine, context: int, batch_tokens: int, new_tokens: int
) -> list[str]:
    """Greedy answers: as many lines as the longest accepted answer has, white space before them dropped.

    Prompts of one length go together, so that nothing is padded.
    """
    tokenizer, prompt_tokens = engine.tokenizer, context - 1 - new_tokens
    prompts = []
    for sample in samples:
        check_fits(sample, f"new_tokens is {new_tokens}", new_tokens, context)
        prompts.append([boundary_id(tokenizer), *text_ids(tokenizer, sample.prompt)[-prompt_tokens:]])
    outputs = [""] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))
    for length, group in groupby(order, key=lambda i: len(prompts[i])):
        places, step = list(group), max(1, batch_tokens // (length + new_tokens))
        for start in range(0, len(places), step):
            part = places[start : start + step]
            continuations = greedy(engine, [prompts[i] for i in part], new_tokens)
            for i, ids in zip(part, continuations, strict=True):
                outputs[i] = answer_text(tokenizer.decode(ids, skip_special_tokens=True), samples[i])
    return outputs


def greedy(engine: Engine, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest continuations of prompts of one length, each up to a token that ends a text."""
    import torch

    vocabulary, ends = len(engine.tokenizer), engine.end_ids
    logits, state = engine.prefill(torch.tensor(prompts))
    continuations: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    for step in range(new_tokens):
        tokens = likeliest_tokens(logits[:, :vocabulary].contiguous())
        for i, token in enumerate(tokens.tolist()):
            ended[i] = ended[i] or token in ends
            if not ended[i]:
                continuations[i].append(token)
        if all(ended) or step + 1 == new_tokens:
            break
        logits, state = engine.decode(tokens, state)
    return continuations


def answer_text(text: str, sample: Sample) -> str:
    """The part of a generated text that counts as the answer; see `generate`."""
    lines = max(answer.strip().count("\n") for answer in sample.answers) + 1
    return "\n".join(text.lstrip().split("\n")[:lines]).rstrip()
