"""Teachers' targets: computed once, kept in fp16, found again by row and by the hash of its tokens."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.loop import Teacher
from eval.artifacts import digest, verified
from eval.documents import Batch, Row, batches, tokens_per_batch
from eval.errors import UserError

VALUES, INDEX = "log_probs.npy", "rows.json"


def write_targets(
    folder: Path,
    rows: list[Row],
    teacher: Teacher,
    vocabulary: int,
    pad: int,
    report: Callable[[float], None],
) -> None:
    """Writes log-probabilities [tokens, V] in fp16, one entry per predicted token of every row.

    fp16 carries 11 bits: a probability is off by at most 2^-9 of itself where it is above e^-8, and the
    reader normalises again in float32.
    """
    lengths = [len(row.tokens) - 1 for row in rows]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = (int(starts[-1]), vocabulary)
    needed, free = shape[0] * shape[1] * 2, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        size = f"{shape[0]} tokens x {shape[1]} entries take {needed / 2**30:.1f} GiB"
        mend = f"{free / 2**30:.1f} GiB are free: set targets.source: online, or targets.form: sampled"
        raise UserError(f"targets {folder.parent}", size, mend)
    values = np.lib.format.open_memmap(folder / VALUES, mode="w+", dtype=np.float16, shape=shape)
    place = {row.id: int(start) for row, start in zip(rows, starts[:-1], strict=True)}
    assert len(place) == len(rows), "row ids are unique"
    done = 0
    for batch in batches(rows, pad, tokens_per_batch(vocabulary)):
        found = teacher(batch)
        for i, (name, length) in enumerate(zip(batch.ids, batch.mask.sum(1).tolist(), strict=True)):
            values[place[name] : place[name] + length] = found[i, :length].half().cpu().numpy()
        done += len(batch.ids)
        report(done / len(rows))
    values.flush()
    index = {row.id: [place[row.id], len(row.tokens) - 1, digest(row.tokens)] for row in rows}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


class CachedTeacher:
    """A teacher that reads its log-probabilities from disk: batch -> [B, T, V] float32.

    Raises:
        UserError: the cache is damaged, or has no such row, or the row's tokens are not those it was made of.
    """

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        verified(folder)
        self.folder = folder
        self.values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        self.index: dict[str, tuple[int, int, str]] = json.loads((folder / INDEX).read_text())
        for row in rows:
            if row.id not in self.index or self.index[row.id][2] != digest(row.tokens):
                raise UserError(
                    f"targets {folder}",
                    f"row {row.id} is not of these tokens",
                    "delete the folder and run again",
                )

    def __call__(self, batch: Batch) -> Tensor:
        found = torch.zeros(*batch.input_ids.shape, self.values.shape[1])
        for i, name in enumerate(batch.ids):
            start, length, _ = self.index[name]
            found[i, :length] = torch.from_numpy(self.values[start : start + length].astype(np.float32))
        return found.to(batch.input_ids.device)
