"""A student's rows in the tokens of a teacher with another tokenizer, and the pieces that both cut out."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill.losses.teacher_output import Aligned, Dense, States
from eval.core.documents import Batch, Row, boundary_id, collate, pad_id
from eval.core.documents.encoding import special_ends, text_ids
from eval.core.errors import UserError

END = b"\xff\xfe\xff"  # stands for the end of a text, and is in none: it is no UTF-8
NO_TEXT = b"\xfe"  # stands for any other control token: nothing after it is aligned
SAMPLE = "def f(x):\n    return {'naïve': x + 10}  # 'Straße', 東京\n"


class Vocabulary:
    """The bytes of every token of a tokenizer.

    Raises:
        UserError: its tokens are no bytes of the text (byte level, or SentencePiece), or it changes a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        self.tokenizer = tokenizer
        ids = tokenizer.get_vocab()
        control, ends = set(tokenizer.all_special_ids), special_ends(tokenizer)
        read = _token_reader(tokenizer, where)
        self.size = 1 + max(ids.values())
        self.text = [NO_TEXT] * self.size
        self.names = [b""] * self.size  # what a token is recognised by in another vocabulary
        for token, i in ids.items():
            self.text[i] = END if i in ends else NO_TEXT if i in control else read(token)
            self.names[i] = token.encode() if self.text[i] == NO_TEXT else self.text[i]
        if self.joined(self.encode(SAMPLE)).removeprefix(b" ") != SAMPLE.encode():
            problem = "does not give a text back byte by byte: it changes what it reads"
            raise UserError(
                f"tokenizer of {where}", problem, "take a byte-level tokenizer without a normalizer"
            )

    def encode(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)

    def joined(self, ids: list[int]) -> bytes:
        return b"".join(self.text[i] if i < self.size else NO_TEXT for i in ids)

    def ends(self, ids: list[int]) -> list[int]:
        """The byte after each token."""
        return list(accumulate(len(self.text[i] if i < self.size else NO_TEXT) for i in ids))

    def read(self, data: bytes) -> tuple[list[int], list[int], int]:
        """Ids of the text in `data`, the byte after each token, and the byte where the text begins.

        It begins at the first whole character and ends before what is no text, or before what the tokenizer
        changed: no token ends after that.
        """
        start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
        ids, ends, at = [], [], start
        parts = data[start:].split(END)
        for number, part in enumerate(parts):
            text = _longest_text(part)
            tokens = self.encode(text)
            whole, joined = text.encode(), self.joined(tokens)
            added = int(joined[:1] == b" " and whole[:1] != b" ")  # SentencePiece begins a text with a space
            agreed = _common_prefix(whole, joined[added:])
            ends += [at + end - added if end - added <= agreed else -1 for end in self.ends(tokens)]
            ids += tokens
            at += len(part) + len(END)
            if not len(whole) == agreed == len(part):
                break
            if number < len(parts) - 1 and self.tokenizer.eos_token_id is not None:
                ids.append(self.tokenizer.eos_token_id)
                ends.append(at)
        return ids, ends, start

    def events(self, shared: list[int], places: dict[bytes, int]) -> Tensor:
        """[size] for each token the place of the longest shared one that it begins with; len(shared): none.

        Args:
            shared: ids of the shared tokens, in the order of their places.
            places: name of a shared token -> its place.
        """
        events = torch.full((self.size,), len(shared))
        for i, text in enumerate(self.text):
            if text != NO_TEXT:
                prefixes = (text[:end] for end in range(len(text), 0, -1))
                events[i] = next((places[one] for one in prefixes if one in places), len(shared))
        events[torch.tensor(shared, dtype=torch.int64)] = torch.arange(len(shared))
        return events

    @cached_property
    def by_name(self) -> dict[tuple[bytes, int], int]:
        """Name of a token, and how many before it bear the same, -> id; EOS is the first of the ends."""
        counts: dict[bytes, int] = {}
        ids: dict[tuple[bytes, int], int] = {}
        for i in sorted(range(self.size), key=lambda i: i != self.tokenizer.eos_token_id):
            if name := self.names[i]:
                ids[name, counts.setdefault(name, 0)] = i
                counts[name] += 1
        return ids


def _token_reader(tokenizer: PreTrainedTokenizerBase, where: str):
    """Token -> its bytes, by the decoder of the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else "none"
    if '"ByteLevel"' in decoder:
        alphabet = byte_alphabet()
        return lambda token: b"".join(alphabet.get(c, c.encode()) for c in token)
    if "\\u2581" in decoder:

        def read(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()

        return read
    fix = "take a tokenizer.json of byte-level BPE or SentencePiece"
    raise UserError(
        f"tokenizer of {where}", f"the bytes of its tokens are not known (decoder {decoder[:60]})", fix
    )


def byte_alphabet() -> dict[str, bytes]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2): itself where printable."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): bytes([byte]) for byte in printed}
    return letters | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _longest_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


def _common_prefix(one: bytes, other: bytes) -> int:
    if one == other:
        return len(one)
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


@dataclass(frozen=True)
class Translation:
    """A batch in the teacher's tokens, and the piece of each valid token of student and teacher, -1: none."""

    batch: Batch
    own: Tensor  # [N]
    its: Tensor  # [M]
    pieces: int


class Alignment:
    """From batches of a student to those of a teacher with another tokenizer.

    Args:
        limit: tokens of a row that the teacher reads at most; what comes after them is not aligned.

    Raises:
        UserError: see `Vocabulary`.
    """

    def __init__(
        self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, limit: int | None = None
    ) -> None:
        self.student, self.teacher = Vocabulary(student, "the student"), Vocabulary(teacher, "the teacher")
        self.first, self.pad, self.limit = boundary_id(teacher), pad_id(teacher), limit
        pairs = [
            (i, its)
            for n, i in self.student.by_name.items()
            if (its := self.teacher.by_name.get(n)) is not None
        ]
        self.shared = torch.tensor(sorted(pairs)).reshape(-1, 2).T  # [2, K]
        own, its = self.shared.tolist()
        places = {self.student.names[i]: place for place, i in reversed(list(enumerate(own)))}
        self.own_events = self.student.events(own, places)
        self.its_events = self.teacher.events(its, places)

    def row(self, tokens: list[int], given: int) -> tuple[list[int], int, list[int], list[int], int]:
        """One row: the teacher's tokens, how many are given; the pieces of predicted tokens, and how many."""
        ids, data = tokens[1:], self.student.joined(tokens[1:])
        own_ends = [0, *self.student.ends(ids)]
        its_ids, ends, begin = self.teacher.read(data)
        its_ids, ends = (
            its_ids[: (self.limit or len(its_ids) + 1) - 1],
            ends[: (self.limit or len(ends) + 1) - 1],
        )
        its_ends = [begin, *ends]
        seam = own_ends[given]
        its_given = sum(0 <= end <= seam for end in ends)
        common, at, its_at = np.intersect1d(own_ends, its_ends, return_indices=True)
        own, its = [-1] * (len(ids) - given), [-1] * (len(its_ids) - its_given)
        first = int(np.searchsorted(common, seam))
        pieces = max(0, len(common) - 1 - first)
        for piece, i in enumerate(range(first, first + pieces)):
            for places, which, skipped in ((own, at, given), (its, its_at, its_given)):
                for place in range(which[i] - skipped, which[i + 1] - skipped):
                    places[place] = piece
        return [self.first, *its_ids], its_given, own, its, pieces

    def prompt(self, row: Row) -> Row:
        """A prompt in the teacher's tokens."""
        tokens, given, *_ = self.row(row.tokens, row.given)
        return Row(row.document, row.domain, row.index, tokens, given)

    def written(self, tokens: list[int], stops: set[int]) -> list[int]:
        """What the teacher wrote, in the student's tokens; the end of the text where it wrote none."""
        ended = tokens[-1] in stops
        data = self.teacher.joined(tokens[:-1] if ended else tokens) + (END if ended else b"")
        ids, _, _ = self.student.read(data)
        return ids or [boundary_id(self.student.tokenizer)]

    def translate(self, batch: Batch) -> Translation:
        """The rows of a batch with the teacher's tokens, under their own names."""
        rows, own, its, pieces = [], [], [], 0
        lengths = batch.attention_mask.sum(1).tolist()
        predicted = batch.mask.sum(1).tolist()
        for i, (length, count) in enumerate(zip(lengths, predicted, strict=True)):
            tokens = batch.input_ids[i, :length].tolist()
            its_tokens, given, own_pieces, its_pieces, count_of_pieces = self.row(tokens, length - 1 - count)
            rows.append(Row(batch.documents[i], batch.domains[i], i, its_tokens, given))
            own += [piece if piece < 0 else piece + pieces for piece in own_pieces]
            its += [piece if piece < 0 else piece + pieces for piece in its_pieces]
            pieces += count_of_pieces
        translated = replace(collate(rows, self.pad), ids=batch.ids)
        return Translation(
            translated, torch.tensor(own, dtype=torch.int64), torch.tensor(its, dtype=torch.int64), pieces
        )

    def target(self, translation: Translation, target: Dense | States) -> Aligned:
        """What the teacher says of its own tokens, with the pieces."""
        device = translation.batch.input_ids.device
        labels = translation.batch.labels[translation.batch.mask]
        own, its, shared = (each.to(device) for each in (translation.own, translation.its, self.shared))
        events = self.own_events.to(device), self.its_events.to(device)
        return Aligned(
            target, labels, own, its, translation.pieces, shared[0], shared[1], *events, self.teacher.size
        )
