"""BM25 against its formula, and every stretch of a row against the whole text that the teacher reads."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.methods.retrieval import bm25_weights
from eval.core.documents import collate, join_rows
from eval.core.errors import UserError
from eval.engines.torch import load_model
from tests.distill.method_helpers import answer, make

SETTINGS = {"count": 2, "tokens": 6, "query": 5, "stride": 8}


def bm25(passage, query, passages, k1=1.2):
    """Robertson and Zaragoza 2009, eq. 3.15, at b = 0: all passages are of one length."""
    score, times = 0.0, Counter(passage)
    for token in query:
        holding = sum(token in other for other in passages)
        rarity = math.log(1 + (len(passages) - holding + 0.5) / (holding + 0.5))
        score += rarity * times[token] * (k1 + 1) / (times[token] + k1)
    return score


def test_scores_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    passages, query = rng.integers(0, 12, (30, 6)), [3, 3, 7, 1]
    weights = bm25_weights(passages)
    scores = weights @ np.bincount(query, minlength=weights.shape[1])
    wanted = [bm25(passage, query, passages.tolist()) for passage in passages.tolist()]
    np.testing.assert_allclose(scores, wanted, rtol=1e-12)


@pytest.mark.parametrize("side", ["method", "control"])
def test_each_stretch_is_read_after_the_best_passages_of_other_documents(side, context, rows):
    method = make("retrieval", **SETTINGS)
    method = method if side == "method" else method.control()
    method.fit(context)
    teacher, row = load_model(context.bases[0]), rows[2]
    passages = [
        (other.document, other.tokens[start : start + 6])
        for other in rows
        for start in range(1, len(other.tokens) - 5, 6)
    ]
    with torch.no_grad(), method.attached(teacher, context):
        said = answer(method, teacher, collate([rows[0], row], 0))[1]
        for start in range(0, len(row.tokens), 8):
            front = method._front(collate([row], 0), 0, start) if start else []
            whole = teacher(torch.tensor([[*front, *row.tokens]])).logits[0].log_softmax(-1)
            end = min(start + 8, len(row.tokens))
            torch.testing.assert_close(
                said[start:end], whole[len(front) + start : len(front) + end], atol=1e-4, rtol=1e-4
            )
            if not start:
                continue
            used = [front[1:7], front[8:14]]
            assert (front[0], front[7], len(front)) == (0, 0, 14)
            assert all(any(tokens == p and d != row.document for d, p in passages) for tokens in used)
            if side == "method":
                query = row.tokens[max(1, start - 4) : start + 1]
                texts = [p for _, p in passages]
                scores = [bm25(p, query, texts) for d, p in passages if d != row.document]
                best = sorted(scores, reverse=True)[:2]
                found = [bm25(tokens, query, texts) for tokens in reversed(used)]
                assert found == pytest.approx(best)


def test_drawn_passages_are_those_of_the_row_and_the_seed(context, rows):
    method = make("retrieval", **SETTINGS).control()
    method.fit(context)
    teacher, fronts = load_model(context.bases[0]), []
    for seed, row in ((0, rows[2]), (0, rows[2]), (1, rows[2]), (0, rows[4])):
        with method.attached(teacher, replace(context, seed=seed)):
            fronts.append(method._front(collate([row], 0), 0, 8))
    assert fronts[0] == fronts[1]
    assert fronts[0] not in fronts[2:]


def test_packed_rows_and_too_few_passages_are_refused(context, rows):
    packed = replace(context, rows=lambda: [join_rows(rows[:2])])
    with pytest.raises(UserError, match=r"data\.packing: true, but passages"):
        make("retrieval").fit(packed)
    with pytest.raises(UserError, match=r"0 passages of 64 tokens .* 1 are needed"):
        make("retrieval").fit(context)
