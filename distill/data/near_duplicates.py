"""Documents that are nearly the same: MinHash of their words by datasketch, its bands sorted on disk.

Two texts are near-duplicates where the estimated Jaccard similarity of their runs of five words reaches a
threshold (Broder 1997; Lee et al. 2022, arXiv:2107.06499), and one band of their signatures is the same.
datasketch's own index finds the same pairs; it takes kilobytes of memory for each document.
"""

import os
import re
import shutil
from array import array
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.spool import Spool
from eval.core.documents import Document, parse_document
from eval.core.errors import require_installed
from eval.core.jobs import Job, Progress, run_jobs

PERMUTATIONS, WORDS = 128, 5
BATCH = 2**14  # shingles hashed, signatures read or compared, at a time
SHARE = 2**24  # bytes of documents for one process


@cache
def require_minhash() -> Any:
    """The one of this process, to be cleared before use.

    Raises:
        UserError: datasketch is not installed.
    """
    require_installed("datasketch", "data.near_duplicates", "run `pip install '.[data]'`")
    from datasketch import MinHash

    return MinHash(num_perm=PERMUTATIONS)


def signature(document: Document) -> np.ndarray:
    """[PERMUTATIONS] uint32, of the prompt and the text."""
    prompt = document.prompt
    before = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    minhash = require_minhash()
    minhash.clear()
    for some in shingles(f"{before}\n{document.text}"):
        minhash.update_batch(some)
    return minhash.hashvalues.astype(np.uint32)


def shingles(text: str) -> Iterator[set[bytes]]:
    """Runs of five words in lower case, some at a time; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - WORDS + 1))
    for first in range(0, len(starts), BATCH):
        yield {" ".join(words[i : i + WORDS]).encode() for i in starts[first : first + BATCH]}


def write_signatures(spool: Spool, path: Path) -> None:
    """Signatures of all documents of a spool one after another, by as many processes as there are cores."""
    spool.flush()
    ends = spool.ends
    cuts = np.unique(np.searchsorted(ends, np.arange(0, ends[-1], SHARE)))
    bounds = pairwise(ends[np.append(cuts, len(spool))].tolist())
    parts = [(path.with_name(f"{path.name}.{i}"), start, stop) for i, (start, stop) in enumerate(bounds)]
    if len(parts) == 1:
        _write_part(spool.path, parts[0], lambda share, tokens=0: None)
    else:
        jobs = [Job(f"share {i}", _write_part, (spool.path, part)) for i, part in enumerate(parts)]
        run_jobs("near-duplicates", jobs, len(os.sched_getaffinity(0)))
    with path.open("wb") as out:
        for part, _, _ in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out)
            part.unlink()


def _write_part(documents: Path, part: tuple[Path, int, int], report: Progress) -> None:
    target, start, stop = part
    with documents.open("rb") as lines, target.open("wb") as out:
        lines.seek(start)
        while (place := lines.tell()) < stop:
            out.write(signature(parse_document(lines.readline())).tobytes())
            report((place - start) / (stop - start))


class NearDuplicates:
    """An index of signatures: of each band the sorted hashes, and whose they are.

    Args:
        signatures: file of [N, PERMUTATIONS] uint32; the index lies beside it.
    """

    def __init__(self, signatures: Path, threshold: float) -> None:
        from datasketch import MinHashLSH

        lsh = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self.bands = [slice(i * lsh.r, (i + 1) * lsh.r) for i in range(lsh.b)]
        self.threshold = threshold
        self._signatures = np.memmap(signatures, dtype=np.uint32, mode="r").reshape(-1, PERMUTATIONS)
        self._hashes, self._order = list[np.ndarray](), list[np.ndarray]()
        for i, band in enumerate(self.bands):
            hashes = np.concatenate([_hash_band(some[:, band]) for some in _read_blocks(signatures)])
            order = np.argsort(hashes, kind="stable")
            for column, values in ((self._hashes, hashes[order]), (self._order, order.astype(np.uint32))):
                file = signatures.with_name(f"{signatures.name}.{values.dtype}.{i}")
                values.tofile(file)
                column.append(np.memmap(file, dtype=values.dtype, mode="r"))

    def find(self, document: Document) -> bool:
        """Whether a document is nearly one of the index."""
        own = signature(document)
        for band, hashes, order in zip(self.bands, self._hashes, self._order, strict=True):
            wanted = _hash_band(own[None, band])[0]
            first, last = hashes.searchsorted(wanted), hashes.searchsorted(wanted, side="right")
            if self._alike(own, order[first:last]).any():
                return True
        return False

    def pairs(self) -> np.ndarray:
        """[P, 2] near-duplicates of the index, so many that they connect all that are."""
        pairs = array("q")
        for band in range(len(self.bands)):
            for run in self._runs(band):
                for pair in self._connect(run):
                    pairs.extend(pair)
        return np.array(pairs).reshape(-1, 2)

    def _runs(self, band: int) -> Iterator[np.ndarray]:
        """Numbers of the documents that share a hash in a band."""
        starts = np.flatnonzero(np.diff(self._hashes[band], prepend=~self._hashes[band][:1]) != 0)
        ends = np.append(starts[1:], len(self._hashes[band]))
        for place in np.flatnonzero(ends - starts > 1):
            yield np.array(self._order[band][starts[place] : ends[place]])

    def _connect(self, rest: np.ndarray) -> Iterator[tuple[int, int]]:
        """Pairs among some documents: each that is found looks for its like among those not found yet."""
        while len(rest) > 1:
            waiting, rest = [int(rest[0])], rest[1:]
            while waiting and len(rest):
                one = waiting.pop()
                alike = self._alike(self._signatures[one], rest)
                yield from ((one, int(other)) for other in rest[alike])
                waiting += rest[alike].tolist()
                rest = rest[~alike]

    def _alike(self, one: np.ndarray, others: np.ndarray) -> np.ndarray:
        """[M] bool, whether the estimate reaches the threshold."""
        blocks = (self._signatures[others[i : i + BATCH]] for i in range(0, len(others), BATCH))
        counts = [np.count_nonzero(block == one, axis=1) for block in blocks]
        return np.concatenate([np.zeros(0, dtype=np.int64), *counts]) / PERMUTATIONS >= self.threshold


def _read_blocks(path: Path) -> Iterator[np.ndarray]:
    """Signatures, some at a time: a map of them would stay in memory."""
    with path.open("rb") as stream:
        while len(some := np.fromfile(stream, dtype=np.uint32, count=BATCH * PERMUTATIONS)):
            yield some.reshape(-1, PERMUTATIONS)


def _hash_band(values: np.ndarray) -> np.ndarray:
    """[N, R] uint32 -> [N] uint64, equal where the rows are; others are equal by a chance of 2^-64."""
    hashes = np.zeros(len(values), dtype=np.uint64)
    for column in values.T.astype(np.uint64):
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    return hashes
