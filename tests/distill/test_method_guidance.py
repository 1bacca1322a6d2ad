"""Guidance against the formulas of its papers, in float64, from the logits of the models themselves."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.methods.guidance import guided
from distill.models.prefix import front_ids
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.engines.torch import load_model
from tests.distill.method_helpers import answer, make
from tests.helpers import text

PROMPT = text("code", 99, 8)


def said_by(method, context, row):
    teacher = load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, context):
        return answer(method, teacher, collate([row], 0))[0].double()


@torch.no_grad()
def logits(folder, tokens, front=()):
    """[T, V] float64 of one row by a plain model, after tokens in front of it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model(torch.tensor([[*front, *tokens]])).logits[0, len(front) :].double()


def test_contrastive_decoding_with_adaptive_plausibility(context, bases, rows):
    """Li et al. 2023: among ids with p >= alpha max p of the expert the score is log p_expert - log p_amateur."""
    terms = [{"weight": 1.0}, {"weight": -1.0, "path": str(bases[1])}]
    row, alpha = rows[0], 0.3
    said = said_by(make("guidance", terms=terms, plausible=alpha), context, row)
    expert, amateur = (logits(bases[seed], row.tokens).softmax(-1) for seed in (0, 1))
    for place in range(len(row.tokens)):
        head = [i for i in range(320) if expert[place, i] >= alpha * expert[place].max()]
        scores = torch.stack([expert[place, i].log() - amateur[place, i].log() for i in head])
        shares = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(
            said[place, head].exp() / said[place, head].exp().sum(), shares, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            said[place, head].exp().sum(), expert[place, head].sum(), atol=1e-5, rtol=0
        )
        rest = [i for i in range(320) if i not in head]
        torch.testing.assert_close(said[place, rest], expert[place, rest].log(), atol=1e-4, rtol=0)
    assert 1 < len(head) < 320


def test_classifier_free_guidance(context, bases, tokenizer, rows):
    """Sanchez et al. 2023, eq. 7: log p(w) + gamma (log p(w | prompt) - log p(w)), normalised."""
    gamma, row = 1.7, rows[0]
    terms = [{"weight": gamma, "prompt": {"text": PROMPT}}, {"weight": 1 - gamma}]
    method = make("guidance", terms=terms)
    plain = logits(bases[0], row.tokens)
    prompted = logits(bases[0], row.tokens, front_ids(tokenizer, PROMPT))
    wanted = (plain + gamma * (prompted - plain)).log_softmax(-1)
    torch.testing.assert_close(said_by(method, context, row), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        said_by(method.control(), context, row), prompted.log_softmax(-1), atol=1e-4, rtol=1e-4
    )
    assert not method.fits
    assert method.tokens_in_front(tokenizer) == len(front_ids(tokenizer, PROMPT))


def test_dexperts_are_logits_moved_from_an_anti_expert_to_an_expert(context, bases, rows):
    """Liu et al. 2021: softmax(z + alpha (z+ - z-)), the two trained on what is wanted and what is not."""
    train = {"rows": 4, "steps": 6, "optimizer": {"lr": 0.01}}
    terms = [
        {"weight": 1.0},
        {"weight": 2.0, "train": train, "domains": ["code"]},
        {"weight": -2.0, "train": train, "domains": ["prose"]},
    ]
    method, row = make("guidance", terms=terms), rows[0]
    method.fit(context)
    plain, expert, anti = (
        logits(folder, row.tokens)
        for folder in (bases[0], context.folder / "term1", context.folder / "term2")
    )
    wanted = (plain + 2 * (expert - anti)).log_softmax(-1)
    torch.testing.assert_close(said_by(method, context, row), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expert, anti, atol=1e-2)


def test_everything_plausible_is_no_restriction_and_the_likeliest_alone_leaves_the_expert():
    log_probs = [torch.randn(2, 3, 9).log_softmax(-1) for _ in range(2)]
    whole = guided(log_probs, [2.0, -1.0], 0.0)
    torch.testing.assert_close(guided(log_probs, [2.0, -1.0], 1e-30), whole)
    torch.testing.assert_close(guided(log_probs, [2.0, -1.0], 1.0), log_probs[0])


def test_a_model_that_changed_is_another_teacher(tmp_path, bases):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bases[1], copy)
    terms = [{"weight": 1.0}, {"weight": -1.0, "path": str(copy)}]
    before = make("guidance", terms=terms).identity
    assert make("guidance", terms=terms).identity == before
    shutil.copy(bases[0] / "model.safetensors", copy / "model.safetensors")
    assert make("guidance", terms=terms).identity != before


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"weight": 1.0}], "at least 2 of them"),
        ([{"weight": 1.0}, {"weight": 1.0, "domains": ["x"]}], "need `train`"),
        ([{"weight": 1.0}, {"weight": 1.0, "path": "x", "architecture": {}}], "at most one of"),
    ],
)
def test_terms_that_say_too_little_or_too_much_are_refused(terms, message):
    with pytest.raises(UserError, match=message):
        make("guidance", terms=terms)


def test_a_domain_without_rows_is_refused(context):
    terms = [{"weight": 1.0}, {"weight": -1.0, "train": {"rows": 4, "steps": 1}, "domains": ["cod"]}]
    with pytest.raises(UserError, match="no training row is of 'cod'"):
        make("guidance", terms=terms).fit(context)
