"""Methods in a chain against each other by hand; what the control replaces; what cannot stand in one."""

import pytest
import torch

from distill.models.prefix import front_ids
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.engines.torch import load_model
from tests.distill.method_helpers import answer, make
from tests.helpers import text

CONTEXT = {
    "name": "context",
    "settings": {"text": text("code", 99, 8), "wrong": {"text": text("prose", 99, 8)}},
}
RETRIEVAL = {"name": "retrieval", "settings": {"count": 1, "tokens": 6, "query": 5, "stride": 8}}
ENSEMBLE = {"name": "ensemble", "settings": {"members": 2}}
MEMORY = {"name": "memory", "settings": {"neighbours": 4}}
EXPERTS = {"name": "experts", "settings": {"rank": 2}}


@torch.no_grad()
def said_by(method, context, *rows):
    teacher = load_model(context.bases[0])
    with method.attached(teacher, context):
        return answer(method, teacher, collate(list(rows), 0))


@torch.no_grad()
def whole(folder, front, tokens):
    logits = load_model(folder)(torch.tensor([[*front, *tokens]])).logits[0, len(front) :]
    return logits.double().softmax(-1)


def test_an_ensemble_of_models_that_each_read_the_text(context, bases, rows, tokenizer):
    method, row = make("chain", methods=[CONTEXT, ENSEMBLE]), rows[2]
    front = front_ids(tokenizer, CONTEXT["settings"]["text"])
    wanted = torch.stack([whole(bases[seed], front, row.tokens) for seed in (0, 1)]).mean(0).log()
    torch.testing.assert_close(said_by(method, context, row)[0].double(), wanted, atol=1e-4, rtol=1e-4)
    assert method.bases(0, [0, 1]) == [0, 1]


def test_passages_stand_between_the_text_and_the_row(context, bases, rows, tokenizer):
    method, row = make("chain", methods=[CONTEXT, RETRIEVAL]), rows[2]
    method.fit(context)
    front = front_ids(tokenizer, CONTEXT["settings"]["text"])
    teacher = load_model(bases[0])
    with method.attached(teacher, context):
        passage = method.methods[1]._fronts(teacher, collate([row], 0), 8)[0]
    said = said_by(method, context, rows[0], row)[1].double()
    plain, found = (whole(bases[0], [*front, *passages], row.tokens).log() for passages in ([], passage))
    torch.testing.assert_close(said[:8], plain[:8], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said[8:16], found[8:16], atol=1e-4, rtol=1e-4)
    assert method.tokens_in_front(tokenizer) == len(front) + len(passage)


def test_the_control_replaces_every_method_or_the_one_under_test(context, rows):
    both = make("chain", methods=[CONTEXT, MEMORY])
    one = make("chain", methods=[CONTEXT, MEMORY], tested=1)
    assert both.identity == one.identity, "the teacher is the same"
    assert [m.settings.shuffled for m in (both.control().methods[1], one.control().methods[1])] == [
        True,
        True,
    ]
    assert both.control().methods[0].identity != both.methods[0].identity
    assert one.control().methods[0].identity == one.methods[0].identity
    for method in (both, one.control(), both.control()):
        for folder in context.folder.glob("*"):
            folder.rename(context.folder.parent / f"old{id(folder)}")
        method.fit(context)
        said_by(method, context, *rows[:3])


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([CONTEXT, EXPERTS], "methods.1: experts speaks by a model of its own; put it first"),
        (
            [CONTEXT, {"name": "voting", "settings": {"answer": "distill.methods.voting.last_word"}}],
            "writes texts",
        ),
        ([CONTEXT], "at least 2 of them"),
    ],
)
def test_what_cannot_stand_in_a_chain_is_refused(methods, message):
    with pytest.raises(UserError, match=message):
        make("chain", methods=methods)


def test_a_memory_after_a_mixture_of_distributions_is_refused(context, rows):
    method = make("chain", methods=[ENSEMBLE, MEMORY])
    method.fit(context)
    with pytest.raises(UserError, match="put it before those that mix distributions"):
        said_by(method, context, rows[0])
