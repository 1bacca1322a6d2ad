"""Texts that a teacher generates after the first tokens of training rows, on disk in shards."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distill.models.generation import generated_row, groups_by_length, make_prompts
from distill.teachers.cache import REBUILD, SHARDS, check_lineage, write_missing_shards
from eval.core.artifacts import verify_artifact
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections import Generation

Write = Callable[[list[Row], Generation], list[list[int]]]  # prompts of one length -> ids after each


def write_texts(
    folder: Path,
    rows: Sequence[Row],
    write: Write,
    generation: Generation,
    *,
    context: int,
    max_tokens: int,
    report: Callable[[float], None],
    process: int = 0,
    processes: int = 1,
) -> None:
    """Writes the texts of a teacher after the prompt of every row, in shards.

    Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947).

    Args:
        write: prompts of one length, and the settings -> ids after each.
        max_tokens: per call of `write`, with generated ones.
    """
    groups = list(groups_by_length(make_prompts(rows, generation), generation, context, max_tokens))
    done = 0

    def write_shard(path: Path, shard: list[tuple[list[Row], Generation]]) -> None:
        nonlocal done
        with path.open("w", encoding="utf-8") as out:
            for group, settings in shard:
                for row, tokens in zip(group, write(group, settings), strict=True):
                    text = generated_row(row, tokens)
                    line = {"row": row.id, "given": text.given, "tokens": text.tokens}
                    out.write(json.dumps(line) + "\n")
                done += 1
                report(min(1.0, processes * done / len(groups)))

    size = max(1, len(groups) // SHARDS)
    shards = [groups[i : i + size] for i in range(0, len(groups), size)]
    write_missing_shards(folder, "jsonl", shards, write_shard, process, processes)


def _read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("shard-*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def count_texts(folder: Path) -> int:
    """Number of generated tokens."""
    return sum(len(text["tokens"]) - 1 - text["given"] for text in _read_lines(folder))


def read_texts(
    folder: Path, rows: Sequence[Row], lineage: dict[str, str], generation: Generation
) -> list[Row]:
    """The rows with the texts of a teacher, one for each training row.

    Raises:
        UserError: the artifact is damaged, or of another teacher, tokenizer or data, or lacks a row.
    """
    check_lineage(folder, verify_artifact(folder, remembered=True), lineage)
    texts = {text["row"]: text for text in _read_lines(folder)}
    generated = []
    for row in make_prompts(rows, generation):
        text = texts.get(row.id)
        if text is None or text["tokens"][: len(row.tokens)] != row.tokens:
            raise UserError(f"targets {folder}", f"has no row {row.id} with these tokens", REBUILD)
        generated.append(generated_row(row, text["tokens"][len(row.tokens) :]))
    return generated
