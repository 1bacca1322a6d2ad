"""A text in front of every row: run once, with the answers of the whole text; its method and its control."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.checks import check_text_in_front
from distill.method import MethodContext, Plain, make_method, prefixed_output
from distill.models.export import export
from distill.models.prefix import _tell, hidden_after, read_prefix
from distill.teachers.local import LocalTeacher
from distill.teachers.run import teacher_groups
from eval.core.config import Frozen
from eval.core.documents import Row, collate, join_rows
from eval.core.errors import UserError
from eval.core.sections import MethodChoice
from eval.core.study import load_study
from tests.distill.test_families import COMMON, FAMILIES, GROUPED
from tests.helpers import text, tiny_model, tiny_study, tiny_tokenizer

OTHERS = {
    "bloom": {"n_layer": 2, "n_head": 2, **COMMON},  # positions as a bias of attention
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},  # positions counted from the mask
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 320},
    "lfm2": {**GROUPED, "full_attn_idxs": [1], "block_multiple_of": 16},  # a convolution and attention
}
WHOLE = {"mamba", "lfm2"}  # states that are no keys and values
PREFIX = [0, *torch.randint(1, 300, (19,), generator=torch.Generator().manual_seed(9)).tolist()]


def some_rows(lengths=(13, 9, 1)):
    tokens = torch.randint(1, 300, (3, 13), generator=torch.Generator().manual_seed(1)).tolist()
    return [Row("d", "x", i, [0, *tokens[i][: size - 1]]) for i, size in enumerate(lengths)]


def family(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**FAMILIES, **OTHERS}[name])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def whole_logits(model, tokens, prefix=PREFIX):
    """[T, V] of one row by the model itself, over the whole text."""
    return model(torch.tensor([[*prefix, *tokens]])).logits[0, len(prefix) :]


def logits_after(output):
    return output.heads[0](output.hidden[0].flatten(0, 1)).unflatten(0, output.hidden[0].shape[:2])


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_a_row_after_a_prefix_is_the_row_in_the_whole_text(name):
    """Windows of attention shorter than the prefix, every kind of position, padding, rows of one token."""
    model, rows = family(name), some_rows()
    prefix = read_prefix(model, PREFIX)
    assert (prefix.cache is None) == (name in WHOLE)
    with torch.no_grad():
        for _ in range(2):  # the first pass leaves the keys and values as they were
            logits = logits_after(prefixed_output(model, collate(rows, 0), prefix))
    for row, read in zip(rows, logits, strict=True):
        wanted = whole_logits(model, row.tokens)
        scale = float(wanted.abs().max())
        torch.testing.assert_close(read[: len(row.tokens)], wanted, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_each_document_of_a_packed_row_and_each_domain_has_its_own_prefix(name):
    model, rows = family(name), some_rows()
    packed = Row("p", "x", 9, [t for row in rows for t in row.tokens], packed=((13, 0), (9, 0), (1, 0)))
    batch = collate([packed, rows[1]], 0)
    one, other = read_prefix(model, PREFIX), read_prefix(model, PREFIX[:7])
    with torch.no_grad():
        hidden = hidden_after(model, batch, [one, other])
        plain = hidden_after(model, collate(rows, 0), [None, one, None])
        alone = hidden_after(model, collate(rows[:1], 0), [None])
    head = prefixed_output(model, collate(rows, 0), one).heads[0]
    wanted = torch.cat([whole_logits(model, row.tokens) for row in rows])
    torch.testing.assert_close(head(hidden[0]), wanted, atol=1e-5, rtol=1e-5)
    short = whole_logits(model, rows[1].tokens, PREFIX[:7])
    torch.testing.assert_close(head(hidden[1, :9]), short, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(plain[0], alone[0], atol=1e-6, rtol=1e-6)


def test_hidden_states_of_other_tokens_than_the_rows_are_refused():
    """Documents of a packed row are run apart: their states would stand at places of other tokens."""
    model, row = family("llama"), some_rows()[0]

    class InFront(Plain):
        def output(self, teacher, batch):
            return prefixed_output(teacher, batch, read)

    read = read_prefix(model, PREFIX)
    teacher = LocalTeacher(InFront(Frozen()), "in front", model, 320, layers=(1,))
    assert teacher(collate([row], 0)).layers[0].shape == (12, model.config.hidden_size)
    packed = join_rows([row, Row("e", "x", 0, row.tokens)])
    with pytest.raises(UserError, match=r"rows of \(1, 26\) tokens, but method 'in front' .* over \(2, 13\)"):
        teacher(collate([packed], 0))


def test_a_family_that_forgets_what_came_before_runs_the_whole_text_and_says_so(monkeypatch, capsys):
    """Reuse is tried: here the values of a prefix are damaged on their way."""
    _tell.cache_clear()
    model = family("llama")
    own = type(model.model.layers[0].self_attn).forward

    def forward(self, hidden_states, *inputs, past_key_values=None, **named):
        if past_key_values is not None and past_key_values.layers[self.layer_idx].is_initialized:
            layer = past_key_values.layers[self.layer_idx]
            layer.values = layer.values * 0.999
        return own(self, hidden_states, *inputs, past_key_values=past_key_values, **named)

    assert read_prefix(model, PREFIX).cache is not None
    assert read_prefix(model.to(torch.bfloat16), PREFIX).cache is not None
    assert capsys.readouterr().err == ""
    model.to(torch.float32)
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward)
    for _ in range(2):
        assert read_prefix(model, PREFIX).cache is None
    said = capsys.readouterr().err
    assert said.startswith(
        "the text in front runs with every row, which takes longer: a llama answers otherwise"
    )
    assert said.count("\n") == 1, "once"
    assert read_prefix(family("mamba"), PREFIX).cache is None
    assert "a mamba keeps other states than keys and values" in capsys.readouterr().err


def method_of(**settings):
    return make_method(MethodChoice(name="context", settings=settings))


def test_the_control_reads_as_many_tokens_of_a_wrong_text(tmp_path):
    tokenizer = tiny_tokenizer()
    (tmp_path / "code.txt").write_text(text("code", 99, 30))
    domains = {"code": {"file": str(tmp_path / "code.txt")}, "prose": {"text": text("prose", 99, 10)}}
    method = method_of(domains=domains)
    right, wrong = method.in_front(tokenizer), method.control().in_front(tokenizer)
    assert {name: len(ids) for name, ids in right.items()} == {name: len(ids) for name, ids in wrong.items()}
    assert right["code"][0] == wrong["code"][0] == tokenizer.bos_token_id
    prose = right["prose"][1:]
    assert wrong["code"][1:] == (prose * 9)[: len(right["code"]) - 1], "repeated up to the length"
    assert wrong["prose"] == right["code"][: len(prose) + 1], "cut to the length"
    given = method_of(text=text("code", 99, 30), wrong={"text": text("prose", 98, 30)}, max_tokens=12)
    assert given.tokens_in_front(tokenizer) == given.control().tokens_in_front(tokenizer) == 13
    identities = [one.identity for one in (method, method.control(), given)]
    assert not any(one == other for one, other in itertools.combinations(identities, 2))
    (tmp_path / "code.txt").rename(tmp_path / "moved.txt")
    moved = method_of(domains={**domains, "code": {"file": str(tmp_path / "moved.txt")}})
    assert moved.identity == method.identity
    assert method_of(text="a", control="none").control().card.title == "Plain teacher"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "no text to stand in front"),
        ({"text": "a"}, "needs a wrong text, found the right one; .*set `control: none`"),
        ({"domains": {"x": {"text": "a"}, "y": {"text": "a"}}}, "of domain 'x': .*found the right one"),
        ({"text": "a", "file": "b"}, "at most one of `text` and `file`"),
        ({"file": "nowhere.txt", "control": "none"}, r"nowhere\.txt cannot be read"),
        ({"domains": {"x": {}}}, "exactly one of `text` and `file`"),
    ],
)
def test_settings_without_a_text_or_a_wrong_one_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        method_of(**settings)


def test_a_domain_without_a_text_gets_the_plain_base(tmp_path):
    tokenizer, teacher = tiny_tokenizer(), tiny_model()
    export(teacher, tokenizer, tmp_path / "s0", "a card", [])
    context = MethodContext(tmp_path, 0, [0], {0: tmp_path / "s0"}, tokenizer, list, None)
    method = method_of(domains={"code": {"text": text("code", 99, 5)}}, control="none")
    batch = collate(some_rows(), 0)
    batch.domains[:] = ["code", "prose", "code"]
    with torch.no_grad(), method.attached(teacher, context):
        logits = logits_after(method.output(teacher, batch))
        plain = teacher(**batch.inputs).logits
    torch.testing.assert_close(logits[1, :9], plain[1, :9], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], plain[0], atol=1e-3)


def test_a_text_that_does_not_fit_is_refused_before_the_first_job(tmp_path, monkeypatch):
    """256 positions: the study has rows of 32 tokens."""
    choice = {"name": "context", "settings": {"text": "for in if else " * 99, "control": "none"}}
    study = load_study(tiny_study(tmp_path, method=choice), [])
    monkeypatch.setattr("distill.checks.load_tokenizer", lambda folder: tiny_tokenizer())
    with pytest.raises(UserError, match=r"front of rows of data\.context = 32, .* to at most 224 tokens"):
        check_text_in_front(study)
    settings = {**choice["settings"], "max_tokens": 223}
    check_text_in_front(study.model_copy(update={"method": MethodChoice(name="context", settings=settings)}))


@pytest.mark.parametrize("name", ["context", "placebo", "experts"])
def test_seeds_of_a_base_as_it_is_share_a_teacher(name, tmp_path):
    """It is the same for every seed; a method that fits something depends on the seed all the same."""
    settings = {"text": "for in", "wrong": {"text": "the river"}} if name == "context" else {}
    export(tiny_model(), tiny_tokenizer(), tmp_path / "base", "a card", [])
    changes = {"method": {"name": name, "settings": settings}, "base": {"path": str(tmp_path / "base")}}
    study = load_study(tiny_study(tmp_path, **changes), [])
    shared, own = {(0,): [0, 1]}, {(0,): [0], (1,): [1]}
    assert teacher_groups(study)["T1"] == (own if name == "experts" else shared)
    trained = study.base.model_copy(update={"train": study.train})
    assert teacher_groups(study.model_copy(update={"base": trained}))["T1"] == own
