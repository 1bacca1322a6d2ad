"""A teacher that was asked elsewhere: a file of JSON Lines with what it said of the rows of a study.

Each line has `row` and `hash` of a row as in the `rows.jsonl` that a run writes, and of the n tokens of that
row after the first `ids` and `log_probs` (n lists, each of the likeliest ids) and `own` (n log-probabilities,
of the tokens themselves). Other keys are not read.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from distill.data.rows import distilled_split, training_rows
from distill.method import Method
from distill.models.load import BASE_FILES
from distill.teachers.answers import ROUNDING, Answer, AnsweringTeacher, check_answer, likeliest
from distill.trainer.artifact_training import build_shared, is_missing, rows_shape
from distill.trainer.loop import accelerator
from eval.core.artifacts import digest, make_key, read_manifest, remembered_hashes, write_text
from eval.core.documents import Batch, Row, slices_of_test, windows
from eval.core.errors import UserError
from eval.core.study import Study
from eval.score.corruptions import slice_documents, slice_names

ROWS = "rows.jsonl"  # of a run folder: what a teacher elsewhere is asked
INDEX = "index.safetensors"
KEY_BYTES = 16  # stored of the hash of a row


def token_hash(tokens: list[int]) -> str:
    """32 hexadecimal digits of the SHA-256 of the ids, in decimal with commas between them."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:32]


def _key(row: str, tokens_hash: str) -> bytes:
    return hashlib.sha256(f"{row} {tokens_hash}".encode()).digest()[:KEY_BYTES]


def asked_rows(study: Study, tokenizer: PreTrainedTokenizerBase) -> tuple[Sequence[Row], list[Row]]:
    """The rows that a student learns from, and those of scored documents."""
    data = study.folder / "data"
    damage = study.data.corruptions
    slices = [*slice_names(data, damage), *slices_of_test(data)]
    documents = [document for name in slices for document in slice_documents(data, name, damage)]
    scored = [row for each in documents for row in windows(tokenizer, each, study.data.context)]
    return training_rows(study, tokenizer, distilled_split(study)), scored


def write_asked_rows(
    path: Path, learned: Sequence[Row], scored: list[Row], tokenizer: PreTrainedTokenizerBase
) -> None:
    """What a teacher elsewhere is asked: a line for each row."""
    with path.with_suffix(".tmp").open("w", encoding="utf-8") as out:
        for number, row in enumerate(chain(learned, scored)):
            line = {"row": row.id, "hash": token_hash(row.tokens), "domain": row.domain, "given": row.given}
            line |= {"scored": number >= len(learned), "tokens": row.tokens}
            line["text"] = tokenizer.decode(row.tokens)
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").replace(path)


def _read_line(line: bytes, where: str) -> tuple[str, str, Answer]:
    """`row`, `hash` and the answer in a line.

    Raises:
        UserError: it has another form.
    """
    fix = "write row, hash, ids, log_probs and own of one row, see docs/distillation.md"
    try:
        entry = json.loads(line)
        row, tokens_hash, own = str(entry["row"]), str(entry["hash"]), np.array(entry["own"], np.float32)
        pairs = [list(zip(*pair, strict=True)) for pair in zip(entry["ids"], entry["log_probs"], strict=True)]
        k = max(1, *map(len, pairs)) if pairs else 1
        ids, values = zip(*(likeliest(entries, k) for entries in pairs), strict=True)
        answer = Answer(np.array(ids, np.int64), np.array(values, np.float32), own)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"no answer to a row ({type(error).__name__}: {' '.join(str(error).split())[:100]})"
        raise UserError(where, problem, fix) from error
    if own.shape != (len(ids),):
        raise UserError(where, f"{own.size} numbers in own, {len(ids)} lists in ids", fix)
    return row, tokens_hash, answer


def _check_row(answer: Answer, row: Row, where: str) -> None:
    """Does an answer speak of the tokens of its row, each at its own place?"""
    if len(answer.own) != len(row.tokens) - 1:
        problem = f"answers for {len(answer.own)} tokens, of a row with {len(row.tokens) - 1} after the first"
        raise UserError(where, problem, "answer for every token but the first")
    labels = np.array(row.tokens[1:])[:, None]
    named = (answer.ids == labels) & (answer.log_probs > -np.inf)
    apart = np.abs(answer.log_probs - answer.own[:, None]) > ROUNDING
    if (named & apart).any():
        token, place = (int(each[0]) for each in np.nonzero(named & apart))
        value, own = answer.log_probs[token, place], answer.own[token]
        problem = f"token {token + 1} is {value:.4f} in log_probs and {own:.4f} in own"
        raise UserError(
            where, problem, "give of the token at place p + 1 what is said after the tokens up to p"
        )


def _read_file(
    file: Path, vocabulary: int, find: Callable[[bytes], Row | None], thing: str
) -> dict[str, np.ndarray]:
    """The keys of the rows that are asked and answered in a file, and where their lines begin."""
    keys, places, at = [], [], 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{thing} {file}, line {number}"
                name, tokens_hash, answer = _read_line(line, where)
                key = _key(name, tokens_hash)
                if (row := find(key)) is not None:
                    check_answer(answer, vocabulary, where, name)
                    _check_row(answer, row, where)
                    keys.append(np.frombuffer(key, np.uint8))
                    places.append(at)
            at += len(line)
    return {"key": np.array(keys, np.uint8).reshape(-1, KEY_BYTES), "place": np.array(places, np.int64)}


def make_file_teacher(study: Study, tokenizer: PreTrainedTokenizerBase, where: str, name: str) -> None:
    """Reads and checks a file of answers; the artifact `name` knows it by its content.

    Args:
        where: key of the file in the study: `teacher.file` or `teacher.control_file`.

    Raises:
        UserError: there is no such file yet, a line is no answer to its row, or one to a row of a scored
            document is missing.
    """
    file, memory = Path(str(getattr(study.teacher, where.partition(".")[2]))), study.folder / BASE_FILES
    data, vocabulary = read_manifest(study.folder / "data").hash, 1 + max(tokenizer.get_vocab().values())
    origin = remembered_hashes({where: file}, memory)[where] if file.is_file() else ""
    made_of = [where, origin, data, rows_shape(study), digest(tokenizer.get_vocab())]
    key = make_key("base", [*made_of, *(one.slice for one in study.data.corruptions)])
    if origin and not is_missing(study, name, key):
        return
    facts: dict[str, Any] = {"arm": "T", "origin": {"sha256": origin}}
    with build_shared(study, name, kind="teacher", key=key, parents={}, facts=facts) as folder:
        if not accelerator().is_main_process:
            return
        learned, scored = asked_rows(study, tokenizer)
        asked = study.folder / ROWS
        write_asked_rows(asked, learned, scored, tokenizer)
        if not origin:
            fix = f"ask the teacher for the rows in {asked}, see docs/distillation.md, then go on"
            raise UserError(where, f"no such file: {file}", fix)
        places = {_key(row.id, token_hash(row.tokens)): i for i, row in enumerate(chain(learned, scored))}

        def find(key: bytes) -> Row | None:
            if (place := places.get(key)) is None:
                return None
            return learned[place] if place < len(learned) else scored[place - len(learned)]

        index = _read_file(file, vocabulary, find, where)
        present = {one.tobytes() for one in index["key"]}
        missing = [row.id for row in scored if _key(row.id, token_hash(row.tokens)) not in present]
        if missing:
            problem = f"{len(missing)} of {len(scored)} rows of scored documents have no answer: {missing[0]}"
            raise UserError(f"{where} {file}", problem, f"answer for every row that is `scored` in {asked}")
        save_file(index, folder / INDEX)
        write_text(folder / "origin.json", json.dumps(facts["origin"]))


class FileTeacher(AnsweringTeacher):
    """A teacher that was asked elsewhere.

    Args:
        file: its answers.
        folder: what `make_file_teacher` made of it.
        k: ids of a token, at most.
    """

    unanswered = "rows that the file has no answer to"

    def __init__(self, file: Path, folder: Path, method: Method, vocabulary: int, k: int) -> None:
        super().__init__(method, vocabulary)
        self.file, self.k = file, k
        index = load_file(folder / INDEX)
        self.places = {
            key.tobytes(): place for key, place in zip(index["key"], index["place"].tolist(), strict=True)
        }

    def answers(self, batch: Batch) -> list[Answer | None]:
        with self.file.open("rb") as lines:
            return [self._answer(lines, batch, i) for i in range(len(batch.ids))]

    def _answer(self, lines: Any, batch: Batch, i: int) -> Answer | None:
        tokens = batch.input_ids[i, : int(batch.attention_mask[i].sum())].tolist()
        place = self.places.get(_key(batch.ids[i], token_hash(tokens)))
        if place is None:
            return None
        lines.seek(place)
        *_, answer = _read_line(lines.readline(), f"{self.file}, row {batch.ids[i]}")
        width = min(self.k, answer.ids.shape[1])
        unused = self.k - width
        ids = np.pad(answer.ids[:, :width], ((0, 0), (0, unused)), mode="edge")
        log_probs = np.pad(answer.log_probs[:, :width], ((0, 0), (0, unused)), constant_values=-np.inf)
        return Answer(ids, log_probs, answer.own)
