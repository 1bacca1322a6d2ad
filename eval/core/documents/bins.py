"""Which items go together into bins of one capacity: how rows are packed."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def best_fit_bins(lengths: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    """[N] for each item the first one of its bin, of a capacity: best-fit-decreasing (Ding et al. 2024).

    The longest item first, each into the fullest bin that has room for it; `lengths` alone decides. See
    arXiv:2404.10830.

    Args:
        lengths: of the items, each at most `capacity`.
    """
    import numpy as np  # takes a while: not for the help of commands

    sizes = np.asarray(lengths, dtype=np.int64)
    bins, count = np.empty(len(sizes), dtype=np.int64), 0
    with_room = [array("q") for _ in range(capacity + 1)]  # bins by the room that is left
    rooms = 0  # bit r is set where there is a bin with room r
    for item in np.argsort(-sizes, kind="stable"):
        length = int(sizes[item])
        large = rooms >> length
        room = length + (large & -large).bit_length() - 1 if large else capacity
        if large:
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            chosen, count = count, count + 1
        bins[item] = chosen
        with_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    _, first, number = np.unique(bins, return_index=True, return_inverse=True)
    return first[number]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The same as lists: items of a bin, and bins by their first item, are in the order of `lengths`."""
    bins: dict[int, list[int]] = {}
    for item, first in enumerate(best_fit_bins(lengths, capacity).tolist()):
        bins.setdefault(first, []).append(item)
    return list(bins.values())
