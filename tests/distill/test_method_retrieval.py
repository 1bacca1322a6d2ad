"""What finds passages against its formula, and every stretch of a row against the whole text that is read."""

import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from distill.methods.retrieval import bm25_weights
from distill.models.encoder import load_encoder
from eval.core.documents import collate, join_rows
from eval.core.errors import UserError
from eval.core.sections import NamedModel
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
            front = method._fronts(teacher, collate([row], 0), start)[0] if start else []
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
            fronts += method._fronts(teacher, collate([row], 0), 8)
    assert fronts[0] == fronts[1]
    assert fronts[0] not in fronts[2:]


def test_packed_rows_and_too_few_passages_are_refused(context, rows):
    packed = replace(context, rows=lambda: [join_rows(rows[:2])])
    with pytest.raises(UserError, match=r"data\.packing: true, but passages"):
        make("retrieval").fit(packed)
    with pytest.raises(UserError, match=r"0 passages of 64 tokens .* 1 are needed"):
        make("retrieval").fit(context)


@pytest.fixture
def encoder(tmp_path, tokenizer):
    """A folder of a small encoder, as sentence-transformers lays it out."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=24,
    )
    folder = tmp_path / "encoder"
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pool(folder, **modes):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))


@pytest.mark.parametrize("kind", ["mean", "first"])
def test_a_text_is_the_direction_of_its_states(encoder, kind):
    if kind == "first":
        pool(encoder, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    loaded = load_encoder(NamedModel(path=str(encoder)), None, "encoder")
    texts = ["alpha beta", "gamma", "delta " * 100]
    vectors = loaded.embed(texts)
    assert vectors.shape == (3, 32)
    for text, vector in zip(texts, vectors, strict=True):
        ids = loaded.tokenizer(text)["input_ids"][:24]
        with torch.no_grad():
            states = loaded.model(torch.tensor([ids])).last_hidden_state[0]
        wanted = states.mean(0) if kind == "mean" else states[0]
        torch.testing.assert_close(vector, wanted / wanted.norm(), atol=1e-5, rtol=1e-4)


def test_an_encoder_that_pools_otherwise_or_is_none_is_refused(encoder, tmp_path):
    pool(encoder, pooling_mode_max_tokens=True)
    with pytest.raises(UserError, match="has pooling_mode_max_tokens; give an encoder that takes the mean"):
        load_encoder(NamedModel(path=str(encoder)), None, "encoder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_encoder(NamedModel(path=str(tmp_path / "empty")), None, "encoder")


def test_passages_are_found_by_the_vectors_of_an_encoder(context, rows, encoder, tokenizer):
    method = make("retrieval", **SETTINGS, encoder={"path": str(encoder)})
    method.fit(context)
    teacher, some = load_model(context.bases[0]), collate([rows[2], rows[5]], 0)
    alone = load_encoder(NamedModel(path=str(encoder)), None, "encoder")
    with torch.no_grad(), method.attached(teacher, context):
        library = method.parts
        fronts = method._fronts(teacher, some, 8)
        for place, row in enumerate((rows[2], rows[5])):
            query = alone.embed([tokenizer.decode(row.tokens[4:9])])[0]
            texts = [tokenizer.decode(passage) for passage in library.passages]
            cosines = torch.stack([alone.embed([text])[0] @ query for text in texts])
            cosines[torch.from_numpy(library.documents == row.document)] = -1
            found = [library.passages.tolist().index(fronts[place][at : at + 6]) for at in (8, 1)]
            torch.testing.assert_close(cosines[found], cosines.topk(2).values, atol=1e-5, rtol=0)


def test_a_pool_is_ordered_by_how_likely_it_makes_the_query(context, rows):
    method = make("retrieval", **SETTINGS, pool=6)
    method.fit(context)
    teacher, row = load_model(context.bases[0]), rows[2]
    query, whole = row.tokens[4:9], []
    with torch.no_grad(), method.attached(teacher, context):
        front = method._fronts(teacher, collate([row], 0), 8)[0]
        library = method.parts
        (numbers,) = library.best([query], [row.document], 6)
        for number in numbers:
            text = [library.first, *library.passages[number].tolist(), *query]
            log_probs = teacher(torch.tensor([text])).logits[0].log_softmax(-1)
            whole.append(sum(log_probs[place - 1, text[place]].item() for place in range(7, 12)))
    best = [number for _, number in sorted(zip(whole, numbers, strict=True), reverse=True)][:2]
    assert front == library.front(best)
    assert best != numbers[:2]  # it is not the order in which they were found


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="pool 1 is below count 2"):
        make("retrieval", count=2, pool=1)
    with pytest.raises(UserError, match="encoder needs a path"):
        make("retrieval", encoder={})
