"""One contract for every method found: fit, attach, output, detach; and what is particular to each."""

import json
from dataclasses import replace

import pytest
import torch

from distill.method import (
    Card,
    Method,
    MethodContext,
    TeacherOutput,
    method_class,
)
from distill.models.generation import make_prompts
from distill.models.lm_head import Head
from distill.teachers.local import check_output
from eval.core.config import plugin_code, plugin_names
from eval.core.documents import collate
from eval.core.errors import UserError
from eval.core.sections import Generation
from eval.engines.torch import load_model
from tests.distill.conftest import method_context, written_anew
from tests.distill.method_helpers import answer, make, mixed
from tests.helpers import text

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONTEXT = {"text": text("code", 99, 8), "domains": {"prose": {"text": text("prose", 99, 6)}}}
MEMORY = {"neighbours": 5, "temperature": 3.0, "cache_share": 0.1, "flatness": 0.05}
SETTINGS = {
    "chain": {"methods": [{"name": "memory", "settings": MEMORY}, {"name": "context", "settings": CONTEXT}]},
    "attention": {"config": {"rms_norm_eps": 1e-5}, "train": {"rows": 4, "steps": 3}},
    "context": CONTEXT,
    "ensemble": {"members": 2},
    "examples": {"count": 2, "tokens": 12},
    "experts": {"rank": 2, "train": {"rows": 4, "steps": 6, "optimizer": {"lr": 0.01}}},
    "guidance": {
        "terms": [
            {"weight": 1.5, "prompt": {"text": text("code", 99, 8)}},
            {"weight": 0.2},
            {
                "weight": -0.7,
                "architecture": {"model_type": "llama", **SMALL},
                "train": {"rows": 4, "steps": 6},
            },
        ],
        "plausible": 0.05,
    },
    "harmful": {},
    "heads": {"train": {"rows": 4, "steps": 3, "future": {"tokens": 1}, "exits": {"layers": [1]}}},
    "elsewhere": {},
    "larger_teacher": {},
    "memory": MEMORY,
    "mixture": {"train": {"rows": 4, "steps": 3}},
    "placebo": {},
    "voting": {"samples": 3, "answer": "distill.methods.voting.last_word"},
    "retrieval": {"count": 2, "tokens": 6, "query": 5, "stride": 8},
}


def test_every_method_is_under_contract():
    assert plugin_names("distill.methods") == sorted(SETTINGS)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tokenizer, rows, bases):
    """Name and side -> a fresh method and the context that it was fitted in, once for all tests."""
    contexts = {}

    def find(name, side):
        method = make(name, **SETTINGS[name])
        method = method if side == "method" else method.control()
        if (name, side) not in contexts:
            contexts[name, side] = method_context(tmp_path_factory.mktemp(name), tokenizer, rows, bases)
            method.fit(contexts[name, side])
            assert method.fits == any(contexts[name, side].folder.iterdir())
        return method, contexts[name, side]

    return find


EVERY = [(name, side) for name in plugin_names("distill.methods") for side in ("method", "control")]


@pytest.mark.parametrize(("name", "side"), EVERY)
def test_contract(name, side, fitted, rows):
    method, context = fitted(name, side)
    assert isinstance(method.card, Card)
    assert all(vars(method.card).values())
    teacher = load_model(context.bases[0])
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    flags, modules = [p.requires_grad for p in teacher.parameters()], [n for n, _ in teacher.named_modules()]
    batch = mixed(rows)
    with torch.no_grad():
        with method.attached(teacher, context):
            first = answer(method, teacher, batch)
            again = answer(method, teacher, batch)
            alone = [answer(method, teacher, collate([r], 0)) for r in rows[:2]]
            pair = answer(method, teacher, collate(rows[:2], 0))
        assert torch.equal(first, again), "one input, one answer"
        for i, single in enumerate(alone):
            torch.testing.assert_close(pair[i, : single.shape[1]], single[0], atol=1e-4, rtol=1e-4)
        after = teacher.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before), "bit-identical on exit"
        assert [p.requires_grad for p in teacher.parameters()] == flags
        assert [n for n, _ in teacher.named_modules()] == modules
        method, _ = fitted(name, side)
        with method.attached(teacher, context):
            assert torch.equal(answer(method, teacher, batch), first), "rebuilt from its folder alone"


@pytest.mark.parametrize(("name", "side"), EVERY)
def test_no_token_is_predicted_from_itself_or_a_later_one(name, side, fitted, rows):
    """Another token at one place changes no prediction before it."""
    method, context = fitted(name, side)
    teacher, row = load_model(context.bases[0]), rows[1]
    with torch.no_grad(), method.attached(teacher, context):
        said = answer(method, teacher, collate([row], 0))[0]
        for place in (2, len(row.tokens) // 2, len(row.tokens) - 1):
            other = [(token + 7) % 320 if i >= place else token for i, token in enumerate(row.tokens)]
            changed = answer(method, teacher, collate([replace(row, tokens=other)], 0))[0]
            torch.testing.assert_close(changed[:place], said[:place], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", plugin_names("distill.methods"))
def test_unknown_settings_are_refused(name):
    with pytest.raises(UserError, match=r"method\.settings: unknown key membersz"):
        make(name, **SETTINGS[name], membersz=3)


def test_ensemble_averages_probabilities(context, rows):
    batch = mixed(rows)
    method, teacher = (
        make("ensemble", members=2),
        load_model(context.bases[0]),
    )
    with torch.no_grad(), method.attached(teacher, context):
        output = answer(method, teacher, batch)
        members = [
            load_model(context.bases[s])(batch.input_ids, attention_mask=batch.attention_mask) for s in (0, 1)
        ]
    wanted = torch.stack([m.logits.double().softmax(-1) for m in members]).mean(0).log()
    valid = batch.attention_mask.bool()
    torch.testing.assert_close(output[valid].double(), wanted[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}])
@pytest.mark.parametrize("name", ["ensemble", "experts"])
def test_several_models_and_adapters_write_with_caches_what_they_write_without(name, changes, fitted, rows):
    method, context = fitted(name, "method")
    long = [row for row in rows if len(row.tokens) > 5]
    prompts = make_prompts([long[0], long[-1], *long[1:4]], Generation(prompt_tokens=5))
    assert {row.domain for row in prompts} == {"code", "prose"}
    teacher, generation = load_model(context.bases[0]), Generation(new_tokens=8, **changes)
    with method.attached(teacher, context):
        plain = written_anew(method, teacher, prompts, generation, 3)
        teacher.generation_config.eos_token_id = plain[0][2]  # ends some of them early
        with torch.no_grad():
            written = method.write(teacher, prompts, generation, 3)
            assert written == written_anew(method, teacher, prompts, generation, 3)
    assert len(written[0]) <= 3
    assert max(map(len, written)) == 8


def test_the_controls_of_an_ensemble_have_its_budget_or_its_mean_weights(context, rows):
    train = {"rows": 4, "steps": 3, "optimizer": {"lr": 0.01}}
    longer = make("ensemble", members=3, control="longer", train=train).control()
    assert (longer.settings.train.steps, longer.bases(0, [0, 1])) == (6, [0])
    longer.fit(context)
    by_hand = context.load_base(0)
    context.train(by_hand, rows, longer.settings.train, "by hand")
    kept = load_model(context.folder / "model").state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in by_hand.state_dict().items())
    soup, teacher, batch = (
        make("ensemble", members=2, control="average").control(),
        context.load_base(0),
        mixed(rows),
    )
    with torch.no_grad(), soup.attached(teacher, context):
        said = answer(soup, teacher, batch)
        one, other = (context.load_base(seed).state_dict() for seed in (0, 1))
        teacher.load_state_dict({name: (one[name] + other[name]) / 2 for name in one})
        wanted = teacher(**batch.inputs).logits.log_softmax(-1)
    torch.testing.assert_close(said, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="`train` is given for `control: longer`"):
        make("ensemble", control="longer")


def test_seeds_share_an_ensemble_of_all_of_them():
    method = make("ensemble", members=3)
    assert [method.bases(s, [0, 1, 2]) for s in (0, 1, 2)] == [[0, 1, 2]] * 3
    assert [method.bases(s, [5, 7]) for s in (5, 7)] == [[0, 5, 7]] * 2
    assert [method.bases(s, [0, 1, 2, 3]) for s in (0, 3)] == [[0, 1, 2], [0, 1, 3]]


def test_an_ensemble_of_one_model_is_refused(context, tokenizer, tmp_path):
    method, same = make("ensemble", members=2), context.bases[0]
    twice = MethodContext(
        context.folder, 0, [0, 1], {0: same, 1: same}, tokenizer, context.rows, context.train
    )
    with (
        pytest.raises(UserError, match="needs different members, found two with the same weights"),
        method.attached(load_model(same), twice),
    ):
        pass


def test_examples_stand_in_front_of_all_documents_but_those_quoted(context, rows):
    """Against the whole text, row by row; another seed quotes other documents."""
    method = make("examples", **SETTINGS["examples"])
    method.fit(replace(context, seed=1))
    other = (context.folder / "passages.json").read_text()
    method.fit(context)
    assert (context.folder / "passages.json").read_text() != other
    passages = json.loads((context.folder / "passages.json").read_text())
    quoted = [passage["document"] for passage in passages]
    assert len(set(quoted)) == 2
    assert all(len(passage["tokens"]) == 12 for passage in passages)
    front = [token for passage in passages for token in (0, *passage["tokens"])]
    teacher = load_model(context.bases[0])
    chosen = [
        next(r for r in rows if r.document == quoted[0]),
        next(r for r in rows if r.document not in quoted),
    ]
    with torch.no_grad(), method.attached(teacher, context):
        said = answer(method, teacher, collate(chosen, 0))
        for i, (row, before) in enumerate(zip(chosen, ([], front), strict=True)):
            logits = teacher(torch.tensor([[*before, *row.tokens]])).logits[0, len(before) :]
            torch.testing.assert_close(
                said[i, : len(row.tokens)], torch.log_softmax(logits, -1), atol=1e-4, rtol=1e-4
            )


def test_too_few_documents_for_examples_are_refused(context):
    method = make("examples", count=99, tokens=12)
    with pytest.raises(UserError, match=r"12 training documents have a row of 12 tokens, 99 are needed"):
        method.fit(context)


def test_experts_are_routed_by_domain(context, rows):
    method = make("experts", **SETTINGS["experts"])
    method.fit(context)
    teacher = load_model(context.bases[0])
    row = next(r for r in rows if r.domain == "code")
    batch = collate([row, row, row], 0)
    batch.domains[:] = ["code", "prose", "never seen"]
    with torch.no_grad():
        with method.attached(teacher, context):
            code, prose, unseen = answer(method, teacher, batch)
        plain = teacher(batch.input_ids[:1]).logits.log_softmax(-1)[0]
    assert not torch.equal(code, prose)
    assert not torch.allclose(code, plain, atol=1e-4)
    torch.testing.assert_close(unseen, plain, atol=1e-5, rtol=1e-5)


def test_a_domain_may_have_any_name(context, rows):
    """Hub data sets name domains with a slash, and peft has a meaning of its own for `default`."""
    named = {"code": "en/wiki", "prose": "default"}
    given = replace(context, rows=lambda: [replace(row, domain=named[row.domain]) for row in rows])
    method = make("experts", **SETTINGS["experts"])
    method.fit(given)
    row = next(r for r in rows if r.domain == "code")
    batch = collate([row, row, row], 0)
    batch.domains[:] = ["en/wiki", "default", "never seen"]
    teacher = load_model(context.bases[0])
    with torch.no_grad(), method.attached(teacher, given):
        one, other, unseen = answer(method, teacher, batch)
    assert not torch.equal(one, other)
    assert not torch.equal(one, unseen)
    assert not torch.equal(other, unseen)


def test_the_identity_is_that_of_all_its_code(tmp_path, monkeypatch):
    """Its own file, the other files of its package, and the classes that it inherits from."""
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("SHARE = 0.5\n")
    code = "from distill.methods.ensemble import Ensemble\n\n\nclass Mine(Ensemble):\n    pass\n"
    (package / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from theirs.mine import Mine

    before = plugin_code(Mine, Method)
    assert set(before) == {"Mine", "Ensemble"}
    (package / "helper.py").write_text("SHARE = 0.5  # a comment\n")
    assert plugin_code(Mine, Method) == before
    (package / "helper.py").write_text("SHARE = 0.9\n")
    assert {name for name, code in plugin_code(Mine, Method).items() if code != before[name]} == {"Mine"}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "output returned NoneType"),
        (TeacherOutput(torch.zeros(1, 2)), r"log_probs of shape \(1, 2\)"),
        (TeacherOutput(torch.zeros(1, 4, 320)), "log_probs sum to 320"),
        (TeacherOutput(torch.full((1, 4, 320), float("nan"))), "NaN"),
        (TeacherOutput(torch.zeros(1, 4, 320, dtype=torch.int64)), "type torch.int64"),
    ],
)
def test_a_method_that_returns_something_else_is_refused(returned, message, rows):
    batch = collate([rows[0]], 0)
    batch = type(batch)(
        batch.ids, batch.documents, batch.domains, batch.input_ids[:, :4], batch.attention_mask[:, :4]
    )
    with pytest.raises(UserError, match=f"method 'mine': .*{message}"):
        check_output(returned, batch, 320, "mine")


@pytest.mark.parametrize(
    ("hidden", "heads", "message"),
    [
        (torch.zeros(1, 4, 8), [], "neither log_probs nor hidden states with one head each"),
        (
            torch.zeros(1, 4, 8),
            [Head(torch.zeros(300, 8))],
            r"a head of 300 tokens; must be \(1, 4, 8\) .* and 320 tokens",
        ),
        (torch.zeros(1, 3, 8), [Head(torch.zeros(320, 8))], r"hidden states of shape \(1, 3, 8\)"),
        (torch.full((1, 4, 8), float("nan")), [Head(torch.zeros(320, 8))], "hidden states with NaN"),
    ],
)
def test_hidden_states_are_checked_as_well(hidden, heads, message, rows):
    row = rows[0]
    batch = collate([type(row)(row.document, row.domain, 0, row.tokens[:4])], 0)
    with pytest.raises(UserError, match=f"method 'mine': .*{message}"):
        check_output(TeacherOutput(hidden=[hidden], heads=heads), batch, 320, "mine")


def test_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'ensemble'"):
        method_class("ensembel")
    with pytest.raises(UserError, match="is it on PYTHONPATH"):
        method_class("nowhere.to_be_found")
