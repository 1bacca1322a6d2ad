"""Writing: chosen by seed and row alone, the same in any batch, with and without a cache of keys and values."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.utils import DistributedType

from distill.losses.teacher_output import Dense
from distill.method import Frozen, Method, Plain, make_method
from distill.models.export import export
from distill.models.generation import (
    choose_tokens,
    generate_texts,
    generated_row,
    make_prompts,
    sample_texts,
    stop_ids,
    uniform_points,
)
from distill.models.prefix import read_prefix
from distill.teachers.texts import count_texts, read_texts, write_texts
from distill.trainer.loop import accelerator, train
from distill.trainer.rollout import OnPolicy
from eval.core.artifacts import Key, build_artifact
from eval.core.documents import Row, collate
from eval.core.documents.encoding import end_ids
from eval.core.errors import UserError
from eval.core.sections import Generation, MethodChoice, Train
from eval.engines.torch import load_checkpoint
from tests.distill.conftest import written_anew
from tests.helpers import tiny_model, tiny_tokenizer

GENERATION = Generation(prompt_tokens=5, new_tokens=7)
LINEAGE = {"teacher": "t"}


def rows(count=6, length=14):
    generator = torch.Generator().manual_seed(3)
    return [
        Row(f"d{i}", "code", i, [0, *torch.randint(1, 300, (length - 1,), generator=generator).tolist()])
        for i in range(count)
    ]


class Counted:
    """Counts the tokens that a model reads."""

    def __init__(self, model):
        self.model, self.tokens = model, 0

    def __enter__(self):
        def count(module, args, kwargs):
            self.tokens += kwargs["input_ids"].numel()

        self.hook = self.model.register_forward_pre_hook(count, with_kwargs=True)
        return self

    def __exit__(self, *error):
        self.hook.remove()


def lively(seed=0):
    """A random model that is sure of something: a text then shows whether the right numbers were used."""
    model = tiny_model(seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(8)
    return model


def test_an_opening_is_the_prompt_or_the_first_tokens():
    plain, prompted, short = (
        rows(1)[0],
        Row("p", "x", 0, [0, 1, 2, 3, 4, 5, 6, 7], 6),
        Row("s", "x", 0, [0, 1]),
    )
    prompts = make_prompts([plain, prompted, short], GENERATION)
    assert [r.tokens for r in prompts] == [plain.tokens[:5], [0, 1, 2, 3, 4, 5, 6], [0, 1]]
    assert [r.predicted for r in prompts] == [0, 0, 0]
    new = generated_row(prompts[0], [9, 8])
    assert (new.id, new.tokens, new.predicted) == (plain.id, [*plain.tokens[:5], 9, 8], 2)
    batch = collate([new], 0)
    assert batch.labels[batch.mask].tolist() == [9, 8], "the loss is of what was written"
    with pytest.raises(UserError, match=r"set data\.packing: false"):
        make_prompts([Row("d", "x", 0, [0, 1, 0, 2], packed=((2, 0), (2, 0)))], GENERATION)


def test_tokens_are_chosen_with_their_probability():
    logs = torch.log_softmax(torch.tensor([2.0, 1.0, 0.0, -1.0]), -1)
    points = torch.arange(1000) / 1000
    for temperature in (0.5, 2.0):
        tokens = choose_tokens(logs.expand(1000, -1), points, Generation(temperature=temperature))
        share = torch.bincount(tokens, minlength=4) / 1000
        torch.testing.assert_close(share, torch.softmax(logs / temperature, -1), atol=2e-3, rtol=0)
    assert choose_tokens(logs.expand(1000, -1), points, Generation(temperature=0)).unique().tolist() == [0]
    # The two likeliest hold 0.88: top_p 0.8 keeps both, 0.6 the first alone.
    both = choose_tokens(logs.expand(1000, -1), points, Generation(top_p=0.8))
    assert float((both == 0).float().mean()) == pytest.approx(1 / (1 + 2.71828**-1), abs=2e-3)
    assert both.unique().tolist() == [0, 1]
    assert choose_tokens(logs.expand(1000, -1), points, Generation(top_p=0.6)).unique().tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_student_writes_what_sampling_without_its_cache_writes(temperature):
    model, prompts = lively(), make_prompts(rows(), GENERATION)
    settings = GENERATION.model_copy(update={"temperature": temperature})
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=3, eos_token_id=[0, 17])
    own, random = model.generation_config, torch.get_rng_state()
    model.train()
    texts = generate_texts(model, prompts, settings, "seed", 0)
    assert model.training
    assert model.generation_config is own, "its own settings are neither used nor lost"
    assert torch.equal(torch.get_rng_state(), random)
    model.eval()

    @torch.no_grad()
    def following(some):
        return torch.log_softmax(model(collate(some, 0).input_ids).logits[:, -1], -1)

    assert texts == sample_texts(following, prompts, settings, "seed", {0, 17})
    if temperature:
        assert len({tuple(tokens) for tokens in texts}) == len(texts)
        assert texts != generate_texts(model, prompts, settings, "other", 0)
    alone = [generate_texts(model, [prompt], settings, "seed", 0)[0] for prompt in prompts]
    assert texts == alone


def test_a_text_ends_with_the_id_that_stops_it():
    """Every other id is as likely as not: texts of unequal length, each through its first stop."""
    stops, prompts = {*range(0, 320, 4)}, make_prompts(rows(20), GENERATION)
    texts = sample_texts(lambda some: torch.zeros(len(some), 320), prompts, GENERATION, 0, stops)
    for tokens in texts:
        assert not stops & set(tokens[:-1])
        assert len(tokens) == 7 or tokens[-1] in stops
    assert {len(tokens) for tokens in texts} > {1, 7}
    model = tiny_model()
    assert stop_ids(model) == {0}
    model.generation_config.eos_token_id = [3, 4]
    assert stop_ids(model) == {3, 4}
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert stop_ids(model) == set()


@pytest.mark.parametrize(
    ("listed", "noted", "expected"),
    [(0, [], 0), ([5, 0], [0], [5, 0]), ([5], [], [5, 0]), (None, [7], [0, 7]), (None, [], 0)],
)
def test_an_export_lists_every_end_so_that_it_stops_anywhere(tmp_path, listed, noted, expected):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.generation_config.eos_token_id, model.config.eos_token_id = listed, None
    tokenizer.listed_ends = noted
    export(model, tokenizer, tmp_path / "model", "card", [])
    config = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == expected
    again, its_tokenizer = load_checkpoint(tmp_path / "model")
    assert stop_ids(again) == end_ids(its_tokenizer) == {0, *noted, *stop_ids(model)}


def test_a_method_writes_by_its_signal():
    """The default of every method, against the plain model's own cache."""
    model, prompts = lively(), make_prompts(rows(), GENERATION)
    texts = Plain(Frozen()).write(model, prompts, GENERATION, 0)
    assert texts == generate_texts(model, prompts, GENERATION, 0, 0)


def texts(folder, some, write, **how):
    """The artifact, made as a study makes it."""
    where = {"context": 14, "max_tokens": 24, "report": lambda share: None}
    write_texts(folder / "parts", some, write, GENERATION, **where, **how)
    with build_artifact(
        folder / "t", kind="targets", name="t", key=Key("k"), parents={}, facts=LINEAGE
    ) as aside:
        for path in (folder / "parts").iterdir():
            path.rename(aside / path.name)
    return folder / "t"


def test_texts_of_a_teacher_depend_neither_on_processes_nor_on_a_stop(tmp_path):
    model, some = lively(), [*rows(), Row("s", "x", 0, [0, 7, 8])]

    def write(group, settings):
        return generate_texts(model, group, settings, 0, 0)

    one = texts(tmp_path / "one", some, write)
    learned = read_texts(one, some, LINEAGE, GENERATION)
    assert [row.id for row in learned] == [row.id for row in some]
    assert all(row.tokens[:5] == old.tokens[:5] for row, old in zip(learned[:-1], some, strict=False))
    assert count_texts(one) == sum(row.predicted for row in learned)
    assert all(len(row.tokens) <= 14 for row in learned)
    groups = []

    def failing(group, settings):
        if len(groups) == 2:
            raise KeyboardInterrupt
        groups.append(group)
        return write(group, settings)

    with pytest.raises(KeyboardInterrupt):
        texts(tmp_path / "two", some, failing)
    where = {"context": 14, "max_tokens": 24, "report": lambda share: None, "processes": 2}
    for process in (1, 0):
        write_texts(tmp_path / "two" / "parts", some, write, GENERATION, process=process, **where)
    for path in one.glob("shard-*"):
        assert (tmp_path / "two" / "parts" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="made with teacher t, this study has u"):
        read_texts(one, some, {"teacher": "u"}, GENERATION)
    with pytest.raises(UserError, match="row d0#0 with these tokens"):
        read_texts(one, [Row("d0", "code", 0, [0, 1, 2, 3, 4, 5])], LINEAGE, GENERATION)
    with pytest.raises(UserError, match="row new#0 with these tokens"):
        read_texts(one, [Row("new", "code", 0, [0, 1, 2])], LINEAGE, GENERATION)


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"targets\.generation: a prompt of 5 tokens leaves no room in data\.context = 5"
    ):
        write_texts(tmp_path, rows(), None, GENERATION, context=5, max_tokens=99, report=lambda share: None)


def test_the_share_of_on_policy_steps_is_decided_by_seed_and_step():
    def generates(share, seed=0):
        return [OnPolicy(share, GENERATION, 14, seed, 0).generates(step) for step in range(1000)]

    assert sum(generates(0.25)) == pytest.approx(250, abs=45)
    assert generates(0.25) == generates(0.25) != generates(0.25, seed=1)
    assert not any(generates(0.0))
    assert all(generates(1.0))


def test_an_on_policy_run_continues_to_the_same_weights(tmp_path):
    """Half of the steps learn from what the student wrote; a stop changes neither which nor what."""
    table = torch.log_softmax(3 * torch.randn(320, 320, generator=torch.Generator().manual_seed(5)), -1)
    seen = []

    def teacher(batch):
        seen.append(batch)
        return Dense(table[batch.input_ids[:, :-1][batch.mask]])

    config = Train(rows=2, steps=6, checkpoint_every=2)
    writer = OnPolicy(0.5, GENERATION, 14, 1, 0)
    how = {"pad": 0, "seed": 1, "teacher": teacher, "rewrite": writer}

    def stop(step):
        if step.number == 5:
            raise KeyboardInterrupt

    whole, again = tiny_model(), tiny_model(seed=9)
    train(whole, rows(), config, scratch=tmp_path / "whole", **how)
    generates = [writer.generates(step) for step in range(6)]
    assert 0 < sum(generates) < 6
    given = {row.id: row for row in rows()}
    for turn, batch in zip(generates, seen[:6], strict=True):
        for name, ids, mask in zip(batch.ids, batch.input_ids, batch.mask, strict=True):
            own = ids.tolist() == given[name].tokens
            assert own is not turn
            assert ids[:5].tolist() == given[name].tokens[:5]
            assert not mask[:4].any() if turn else mask.all()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(), rows(), config, scratch=tmp_path / "parts", report=stop, **how)
    train(again, rows(), config, scratch=tmp_path / "parts", **how)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_sharded_student_cannot_write():
    acc, writer = accelerator(), OnPolicy(1.0, GENERATION, 14, 0, 0)
    sharded = type(
        "Sharded", (), {"distributed_type": DistributedType.FSDP, "process_index": acc.process_index}
    )
    with pytest.raises(UserError, match="needs a whole student"):
        writer(sharded, tiny_model(), 0, rows())


def test_points_belong_to_row_and_seed():
    one, two = uniform_points(rows(2), GENERATION, "a")
    assert not torch.equal(one, two)
    assert torch.equal(uniform_points(rows(3)[1:2], GENERATION, "a")[0], two)
    assert json.dumps(two.tolist()) != json.dumps(uniform_points(rows(2), GENERATION, "b")[1].tolist())


@pytest.mark.parametrize("name", ["placebo", "larger_teacher"])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}, {"top_p": 0.8}])
def test_a_teacher_of_one_forward_pass_writes_with_a_cache_what_it_writes_without(name, changes):
    method, model = make_method(MethodChoice(name=name)), tiny_model()
    generation, prompts = GENERATION.model_copy(update=changes), make_prompts(rows(), GENERATION)
    for one in (method, method.control()):
        assert one.write(model, prompts, generation, 3) == written_anew(one, model, prompts, generation, 3)
        assert type(one).write is not Method.write


def with_parts(name, model):
    """A method of texts in front, ready to read: rows of two kinds, one of them after nothing."""
    front = read_prefix(model, list(range(3, 43)))
    if name == "examples":
        method = make_method(MethodChoice(name=name))
        method.parts = {"d1", "d3"}, front
    else:
        texts = {"text": "a text", "domains": {"code": {"text": "another"}}}
        method = make_method(MethodChoice(name=name, settings=texts))
        method.parts = {"prose": front, "code": read_prefix(model, list(range(9, 20)))}
    return method


@pytest.mark.parametrize("name", ["context", "examples"])
@pytest.mark.parametrize("changes", [{}, {"temperature": 0.0}])
def test_texts_in_front_are_read_once_and_say_the_same(name, changes):
    """Token by token against the whole text read anew; some rows end early, some stand after nothing."""
    model, generation = lively(), GENERATION.model_copy(update=changes)
    kinds = ["code", "prose", "prose", "none", "code", "prose"]
    given = [replace(row, domain=kind) for row, kind in zip(rows(), kinds, strict=True)]
    prompts, method = make_prompts(given, generation), with_parts(name, model)
    once, anew = method.reader(model, prompts), Method.reader(method, model, prompts)
    with Counted(model) as read:
        for size in range(5, 9):
            grown = [replace(row, tokens=row.tokens[:size]) for row in given if size < 7 or row.index != 2]
            read.tokens = 0
            said = once(grown)
            assert size == 5 or read.tokens == len(given), "one token of each row, also of one that ended"
            torch.testing.assert_close(said, anew(grown), atol=1e-5, rtol=1e-5)
    texts = written_anew(method, model, prompts, generation, 3)
    assert method.write(model, prompts, generation, 3) == texts
    model.generation_config.eos_token_id = texts[0][2]
    ended = method.write(model, prompts, generation, 3)
    assert ended == written_anew(method, model, prompts, generation, 3)
    assert len(ended[0]) <= 3 < max(map(len, ended))


def test_what_is_made_for_another_output_is_not_inherited():
    class Own(Plain):
        def output(self, teacher, batch):
            return super().output(teacher, batch)

    assert (Own.reader, Own.write) == (Method.reader, Method.write)
