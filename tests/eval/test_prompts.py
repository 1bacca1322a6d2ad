"""Prompts, chats and packed rows: what is predicted, what is only read, and who sees whom."""

import json
import pickle
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from distill.data.tokens import fingerprint
from distill.method import make_method
from distill.teachers.alignment import Vocabulary
from eval.core.artifacts import write_text
from eval.core.documents import Document, Row, boundary_id, collate, join_rows, pack, windows
from eval.core.documents.chats import ChatRefused, lay_out
from eval.core.documents.encoding import Learned, end_ids, special_ends, text_ids
from eval.core.errors import UserError
from eval.core.sections import Cost, MethodChoice
from eval.cost.plan import cut_prompts
from eval.engines import load_tokenizer
from eval.metrics.likelihood import document_bits
from eval.release.reference import reference
from eval.score.samples import Sample
from eval.score.tasks import choice_rows
from tests.helpers import text, tiny_model, tiny_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "user", "content": "the river"}]


def plugin_of(file):
    spec = spec_from_file_location(file.stem, file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def words():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(320)


def logits(model, rows):
    with torch.no_grad():
        return model(**collate(rows, 0).inputs, use_cache=False).logits


@pytest.mark.parametrize("context", [8, 16, 33, 4096])
@pytest.mark.parametrize("prompt", ["a quiet morning\n", "a quiet morning ", text("prose", 3)])
def test_each_token_of_the_text_is_predicted_once_and_none_of_the_prompt(words, prompt, context):
    """But a token that begins in the prompt and ends in the text: it cannot be given."""
    rows = windows(words, Document("d", "prose", text("code", 1), prompt), context)
    batch = collate(rows, 0)
    predicted = words.decode(batch.labels[batch.mask])
    assert predicted == prompt[len(prompt.rstrip(" ")) :] + text("code", 1)
    assert int(batch.mask.sum()) == sum(row.predicted for row in rows)
    assert batch.input_ids.shape[1] <= context
    assert all(row.tokens[0] == boundary_id(words) for row in rows)
    whole = words(prompt + text("code", 1))["input_ids"]
    assert batch.labels[batch.mask].tolist() == whole[-int(batch.mask.sum()) :]
    given = whole[: -int(batch.mask.sum())]
    assert rows[0].tokens[1 : 1 + rows[0].given] == given[-rows[0].given :]
    if len(whole) < context:
        assert [row.tokens for row in rows] == [[boundary_id(words), *whole]]


def test_the_score_of_an_answer_is_that_of_its_tokens_after_the_prompt(words, model):
    document = Document("d", "prose", " they walked", "the old trees")
    predict = lambda batch: model(**batch.inputs, use_cache=False).logits  # noqa: E731
    bits, tokens = document_bits(predict, [document], words, 64)
    given = [boundary_id(words), *words(document.prompt)["input_ids"]]
    answer = words(document.text)["input_ids"]
    log_probs = logits(model, [Row("d", "x", 0, given + answer)])[0].double().log_softmax(-1)
    expected = -sum(float(log_probs[len(given) - 1 + i, token]) for i, token in enumerate(answer))
    assert tokens == [len(answer)]
    assert bits[0] * torch.log(torch.tensor(2.0)).item() == pytest.approx(expected, rel=1e-6)


def test_a_chat_is_read_through_the_template_and_its_last_answer_is_predicted(words):
    words = tiny_tokenizer()
    words.chat_template = CHAT
    (row,) = windows(words, Document("d", "x", "stone", ASKED), 64)
    batch = collate([row], 0)
    assert words.decode(row.tokens) == "<user>the river\n<assistant>stone\n", "and nothing in front"
    assert words.decode(batch.labels[batch.mask]) == "stone\n"


TALK = [
    {"role": "user", "content": "the river"},
    {"role": "assistant", "content": "old trees"},
    {"role": "user", "content": "while rain fell"},
]


@pytest.mark.parametrize("context", [8, 11, 64])
def test_every_answer_of_a_chat_is_learned_or_the_last_one(context):
    words = tiny_tokenizer()
    words.chat_template = CHAT
    chat = Document("d", "x", "quiet morning", TALK)

    def learned(turns):
        rows = windows(words, chat, context, Learned(turns))
        batch = collate(rows, 0)
        assert all(len(row.tokens) <= context for row in rows)
        assert int(batch.mask.sum()) == sum(row.predicted for row in rows)
        return words.decode(batch.labels[batch.mask])

    assert learned("last") == "quiet morning\n"
    assert learned("all") == "old trees\nquiet morning\n"
    (whole,) = windows(words, chat, 4096, Learned("all"))
    assert words.decode(whole.tokens) == (
        "<user>the river\n<assistant>old trees\n<user>while rain fell\n<assistant>quiet morning\n"
    )
    joined = join_rows([whole, whole])
    assert joined.predicted == 2 * whole.predicted
    batch = collate([joined], 0)
    assert words.decode(batch.labels[batch.mask]) == "old trees\nquiet morning\n" * 2


ENDED = CHAT.replace("}}\n{% endfor %}", "}}<|endoftext|>\n{% endfor %}")
CALLED = [
    *TALK[:1],
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
    *TALK[1:],
]


@pytest.mark.parametrize("talk", [TALK, CALLED])
@pytest.mark.parametrize("template", [CHAT, ENDED, "{% for m in messages %}{{ m.content }};{% endfor %}"])
def test_what_a_template_adds_turn_by_turn_is_an_answer(template, talk):
    """The rule for templates that write a turn once and for all, whatever marks them: nothing else is tried."""
    words = tiny_tokenizer()
    words.chat_template = template
    document = Document("d", "x", "stone", talk)
    chat = [*talk, {"role": "assistant", "content": "stone"}]

    def written(turns, **settings):
        return len(words.apply_chat_template(turns, tokenize=False, **settings))

    through = {
        i: (written(chat[:i], add_generation_prompt=True), written(chat[: i + 1]))
        for i, turn in enumerate(chat)
        if turn["role"] == "assistant"
    }
    *_, (start, _) = through.values()
    whole = words.apply_chat_template(chat, tokenize=False)
    assert lay_out(words, document) == (whole, [(start, None)])
    assert lay_out(words, document, "all") == (whole, [*list(through.values())[:-1], (start, None)])


QWEN3 = """{% set ns = namespace(asked=-1) %}
{% for m in messages if m.role == 'user' %}{% set ns.asked = ns.asked + 1 %}{% endfor %}
{% set ns.users = -1 %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}
{%- if m.role != 'assistant' %}{{ m.content }}
{%- else %}{% set parts = m.content.split('</think>') %}
{%- if ns.users == ns.asked and (loop.last or parts | length > 1) %}
{{- '<think>\\n' + parts[0].removeprefix('<think>').strip() * (parts | length - 1) + '\\n</think>\\n\\n' }}{% endif %}
{{- parts[-1].strip() }}{% for c in m.tool_calls or [] %}{{ '\\n' if m.content }}<call>{{ c.function.name }}{% endfor %}
{%- endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
THOUGHT = "<think>the rain</think>old trees"
THINKING = [TALK[0], {"role": "assistant", "content": THOUGHT}, TALK[2]]


def learned_text(words, talk, turns, text="quiet morning"):
    (row,) = windows(words, Document("d", "x", text, talk), 4096, Learned(turns, end_of_answer=True))
    batch = collate([row], 0)
    return words.decode(row.tokens), words.decode(batch.labels[batch.mask])


@pytest.mark.parametrize("talk", [TALK, THINKING])
def test_answers_that_a_template_writes_otherwise_once_others_follow_are_learned_as_they_stand(talk):
    """As Qwen3 does: a block of thoughts in the last turn alone, those of earlier turns are dropped."""
    words = tiny_tokenizer()
    words.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    words.chat_template = QWEN3
    whole, last = learned_text(words, talk, "last")
    assert whole == (
        "<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\nold trees<|im_end|>\n"
        "<|im_start|>user\nwhile rain fell<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nquiet morning<|im_end|>\n"
    )
    assert last == "<think>\n\n</think>\n\nquiet morning<|im_end|>\n"
    assert learned_text(words, talk, "all") == (whole, f"old trees<|im_end|>\n{last}")
    thought = learned_text(words, talk, "all", THOUGHT)[1]
    assert thought == "old trees<|im_end|>\n<think>\nthe rain\n</think>\n\nold trees<|im_end|>\n"


def test_a_call_of_a_tool_is_learned_before_what_the_tool_says():
    words = tiny_tokenizer()
    words.chat_template = QWEN3
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "rain"}}]}
    talk = [TALK[0], call, {"role": "tool", "content": "yes"}]
    last = "<think>\n\n</think>\n\nquiet morning<|im_end|>\n"
    learned = learned_text(words, talk, "all")[1].removesuffix(words.eos_token)
    assert learned == f"<call>rain<|im_end|>\n{last}"


def test_what_a_template_marks_as_generated_is_learned_where_it_rewrites_turns():
    words = tiny_tokenizer()
    said = "{{- parts[-1].strip() }}"
    words.chat_template = QWEN3.replace(said, "{% generation %}" + said + "{% endgeneration %}")
    end = words.eos_token
    assert learned_text(words, TALK, "all")[1] == f"old treesquiet morning{end}", "as transformers' own mask"
    assert learned_text(words, TALK, "last")[1] == f"<think>\n\n</think>\n\nquiet morning<|im_end|>\n{end}"
    words.chat_template = QWEN3.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<thought>'")
    assert learned_text(words, TALK, "last")[1] == f"quiet morning<|im_end|>\n{end}", (
        "as R1 asks for thoughts"
    )


def test_the_end_is_learned_after_an_answer_and_where_asked_after_a_document():
    words = tiny_tokenizer()
    end = words.eos_token_id
    ends = Learned(end_of_answer=True)
    answer, text_alone = Document("d", "x", "stone", "the river"), Document("d", "x", "stone")

    def last(document, learned):
        (row,) = windows(words, document, 64, learned)
        assert row.predicted == len(row.tokens) - 1 - row.given
        return row.tokens[-1]

    assert last(answer, ends) == end
    assert last(answer, Learned()) != end, "scored is the text alone"
    assert last(text_alone, ends) != end
    assert last(text_alone, Learned(end_of_text=True)) == end
    chat = Document("d", "x", "stone", ASKED)
    words.chat_template = CHAT
    assert last(chat, ends) == end
    words.chat_template = CHAT.replace("}}\n{% endfor %}", "}}<|endoftext|>{% endfor %}")
    (row,) = windows(words, chat, 64, ends)
    assert row.tokens[-2:].count(end) == 1, "the template has written one"


def test_an_end_that_a_generation_config_lists_is_an_end_and_no_second_one_is_learned(tmp_path):
    """As Phi-3's: its template ends a turn with a token that is not the EOS of its tokenizer."""
    words, chat = tiny_tokenizer(), Document("d", "x", "stone", ASKED)
    words.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    words.chat_template = CHAT.replace("}}\n{% endfor %}", "}}<|end|>\n{% endfor %}")
    words.save_pretrained(tmp_path)
    end, river = words.convert_tokens_to_ids("<|end|>"), words("river")["input_ids"][0]

    def learned(tokenizer):
        (row,) = windows(tokenizer, chat, 64, Learned(end_of_answer=True))
        return words.decode(row.tokens[1 + row.given :])

    assert learned(load_tokenizer(tmp_path)) == "stone<|end|>\n<|endoftext|>"
    keys = {fingerprint(words), fingerprint(load_tokenizer(tmp_path))}
    for name, config in (
        ("config.json", {"text_config": {"eos_token_id": end}}),
        ("generation_config.json", {"eos_token_id": [end, words.eos_token_id, river]}),
    ):
        (tmp_path / name).write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        assert learned(tokenizer) == "stone<|end|>\n", name
        keys.add(fingerprint(pickle.loads(pickle.dumps(tokenizer))))
    assert len(keys) == 2, "tokens are made again for other ends"
    assert end_ids(tokenizer) == {0, end, river}
    assert special_ends(tokenizer) == {0, end}, "a text may hold the third"


def test_a_special_token_that_a_text_spells_out_is_text():
    words = tiny_tokenizer()
    spelled, end = "stone <|endoftext|> river", words.eos_token_id
    words.chat_template = CHAT.replace("}}\n{% endfor %}", "}}<|endoftext|>\n{% endfor %}")
    for document in (
        Document("d", "x", spelled),
        Document("d", "x", spelled, "the <|endoftext|>"),
        Document("d", "x", spelled, [{"role": "user", "content": "the <|endoftext|>"}]),
    ):
        (row,) = windows(words, document, 200)
        batch = collate([row], 0)
        ids = batch.labels[batch.mask].tolist()
        tail = [end, *words("\n")["input_ids"]] if isinstance(document.prompt, list) else []
        assert words.decode(ids[: len(ids) - len(tail)]) == spelled
        assert ids[len(ids) - len(tail) :] == tail
        assert ids.count(end) == len(tail[:1])
        assert row.tokens[1:].count(end) == 2 * len(tail[:1])


def test_whatever_reads_a_text_reads_spelled_out_special_tokens_as_text(tmp_path):
    words = tiny_tokenizer()
    words.save_pretrained(tmp_path)
    spelled, end = "stone <|endoftext|> river", words.eos_token_id
    loader = plugin_of(Path("eval/release/load_release.py"))
    served = type("Served", (loader.TorchModel,), {"__init__": loader.Model.__init__})(None, tmp_path, end)
    method = make_method(MethodChoice(name="context", settings={"text": spelled, "control": "none"}))
    (choice,) = choice_rows(words, Sample("0", spelled, [], [" sea"]), "0", 200)
    write_text(tmp_path / "train.jsonl", json.dumps({"id": "d", "domain": "x", "text": spelled}) + "\n")
    read = {
        "text_ids": text_ids(words, spelled),
        "release reference": list(reference(tmp_path, [], words).counts),
        "prompts of a cost": cut_prompts(Cost(prompt_tokens=60), tmp_path, [spelled], "text")[0][1:],
        "loader of a release": served.encode(spelled)[1:],
        "context method": method.in_front(words)[""][1:],
        "choices of a task": choice.tokens[1:],
        "comparison over bytes": Vocabulary(words, "teacher.path").encode(spelled),
    }
    assert words.decode(read["text_ids"]) == spelled
    for name, ids in read.items():
        assert end not in ids, f"{name} reads a token that ends a text"
        assert set(ids) >= set(read["text_ids"]), name


def test_a_chat_without_a_template_or_with_one_that_hides_its_answers_is_refused():
    words = tiny_tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        windows(words, Document("d", "x", "stone", ASKED), 64)
    for written in ("{{ m.content }}{{ m.content }}", "{{ m.content | length }}", "{{ m.role }}"):
        words.chat_template = "{{ messages | length }}{% for m in messages %}" + written + "{% endfor %}"
        with pytest.raises(
            ChatRefused, match="where the chat template writes an answer cannot be told; give"
        ):
            windows(words, Document("d", "x", "stone", ASKED), 64)


def some_rows(sizes, domains="x"):
    generator = torch.Generator().manual_seed(0)
    return [
        Row(
            f"d{i}",
            domains[i % len(domains)],
            0,
            [0, *torch.randint(1, 300, (n,), generator=generator).tolist()],
            n // 3,
        )
        for i, n in enumerate(sizes)
    ]


def test_packing_keeps_every_row_whole_and_in_its_domain():
    rows = some_rows([12, 7, 20, 3, 30, 1, 15, 9], domains="xy")
    packed = list(pack(rows, 40))
    assert all(len(row.tokens) <= 40 for row in packed)
    assert len({row.id for row in packed}) == len(packed) < len(rows)
    assert sum(row.predicted for row in packed) == sum(row.predicted for row in rows)
    parts = []
    for row in packed:
        start = 0
        for size, given in row.parts:
            parts.append((row.domain, row.tokens[start : start + size], given))
            start += size
        assert start == len(row.tokens)
    assert sorted(parts) == sorted((row.domain, row.tokens, row.given) for row in rows)


def test_the_parts_of_a_packed_row_do_not_see_each_other(model):
    rows = some_rows([12, 7, 20])
    (packed,) = pack(rows, 64)
    batch = collate([packed, rows[0]], 0)  # the second is padded
    both = logits(model, [packed, rows[0]])
    alone = torch.cat([logits(model, [row])[0] for row in rows])
    torch.testing.assert_close(both[0], alone)
    torch.testing.assert_close(both[1, : len(rows[0].tokens)], alone[: len(rows[0].tokens)])
    assert batch.mask.sum(1).tolist() == [packed.predicted, rows[0].predicted]
    predicted = [token for row in rows for token in row.tokens[1 + row.given :]]
    assert batch.labels[0][batch.mask[0]].tolist() == predicted
    assert batch.to("cpu").inputs.keys() == {"input_ids", "position_ids"}
