"""Rows of several sources in the shares that a study asks for."""

import numpy as np

from eval.core.errors import UserError

BLOCK = 64  # rows within which every source has its turns: any beginning has the shares


def mix_rows(
    order: np.ndarray, sources: np.ndarray, tokens: np.ndarray, weights: list[float], seed: int
) -> np.ndarray:
    """[M <= N] rows in the order in which sources take turns, so that each gives its share of the tokens.

    The source of every row is drawn, stratified over blocks. Within a source the order stays. No row is taken
    twice: the mixture ends where a source that is drawn has no more of them.

    Args:
        order: [N] numbers of rows.
        sources: the source of each row, by its number.
        tokens: what each row predicts.
        weights: of the sources; a share is a weight divided by their sum.

    Raises:
        UserError: a source has no rows.
    """
    queues = [order[sources[order] == i] for i in range(len(weights))]
    for i, queue in enumerate(queues):
        if not len(queue):
            fix = "give it more documents, or leave it out"
            raise UserError(f"source {i}", f"a weight of {weights[i]:g}, but no training rows", fix)
    chances = np.array([w / tokens[queue].mean() for w, queue in zip(weights, queues, strict=True)])
    rng = np.random.default_rng(seed)
    blocks = -(-len(order) // BLOCK)
    points = rng.permuted((np.arange(BLOCK) + rng.random((blocks, BLOCK))) / BLOCK, axis=1).ravel()
    drawn = np.searchsorted(np.cumsum(chances / chances.sum())[:-1], points[: len(order)], side="right")
    turns = [np.flatnonzero(drawn == i) for i in range(len(weights))]
    pairs = list(zip(turns, queues, strict=True))
    ends = [int(turn[len(queue)]) for turn, queue in pairs if len(turn) > len(queue)]
    mixed = np.empty(min([len(order), *ends]), dtype=order.dtype)
    for turn, queue in pairs:
        places = turn[turn < len(mixed)]
        mixed[places] = queue[: len(places)]
    return mixed
