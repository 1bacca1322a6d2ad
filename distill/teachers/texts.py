"""Texts that a teacher writes after the first tokens of training rows, kept on disk by shards."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distill.models.generation import generated_row, groups_by_length, make_prompts
from distill.teachers.cache import REBUILD, SHARDS, check_lineage, write_missing_shards
from eval.core.artifacts import verify_artifact
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections import Generation

Write = Callable[[list[Row], Generation], list[list[int]]]  # openings of one length -> what follows each


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
    groups = list(groups_by_length(make_prompts(rows, generation), generation, context, most))
    done = 0

    def shard(aside: Path, held: list[tuple[list[Row], Generation]]) -> None:
        nonlocal done
        with aside.open("w", encoding="utf-8") as out:
            for group, settings in held:
                for row, tokens in zip(group, write(group, settings), strict=True):
                    whole = generated_row(row, tokens)
                    line = {"row": row.id, "given": whole.given, "tokens": whole.tokens}
                    out.write(json.dumps(line) + "\n")
                done += 1
                report(min(1.0, processes * done / len(groups)))

    size = max(1, len(groups) // SHARDS)
    shards = [groups[i : i + size] for i in range(0, len(groups), size)]
    write_missing_shards(place, "jsonl", shards, shard, process, processes)


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
    check_lineage(folder, verify_artifact(folder), lineage)
    texts = {found["row"]: found for found in _lines(folder)}
    learned = []
    for row in make_prompts(rows, generation):
        found = texts.get(row.id)
        if found is None or found["tokens"][: len(row.tokens)] != row.tokens:
            raise UserError(f"targets {folder}", f"row {row.id} is not of these tokens", REBUILD)
        learned.append(generated_row(row, found["tokens"][len(row.tokens) :]))
    return learned
