"""Damaged documents: exactly as much as is stated, the same each time, and nothing else touched."""

from collections import Counter

import pytest

from distill.data.split import prepare
from eval.core.documents import Document, read_documents, scored_slices
from eval.core.errors import UserError
from eval.core.sections import Corruption
from eval.core.study import load_study
from eval.score.corruptions import corrupted, damaged_slices
from tests.helpers import text, tiny_study

BODY = "def f(x):\n\treturn x + 41  # größer als 40\n" + text("code", 1) + "数据 42;\n"


def damaged(kind, strength, body=BODY, name="d"):
    return corrupted(Document(name, "code", body), Corruption(kind=kind, strength=strength)).text


def letters(body):
    return [letter for letter in body if letter.isalpha()]


def others(body):
    return "".join(letter for letter in body if not letter.isalpha())


@pytest.mark.parametrize("strength", [0.02, 0.1, 0.5, 1.0])
def test_typos_hit_letters_alone_and_so_many(strength):
    result, hit = damaged("typos", strength), round(strength * len(letters(BODY)))
    assert others(result) == others(BODY), "numbers, marks and white space stand as they stood"
    lost = len(letters(BODY)) - len(letters(result))
    assert 0 < lost < hit, "some are dropped, some replaced, some swapped"
    gone = sum((Counter(letters(BODY)) - Counter(letters(result))).values())
    assert gone <= hit, "what is swapped is not lost"
    assert result != BODY


def test_one_hit_is_one_edit():
    """Each of the three kinds by itself: dropped, swapped with the next, or another letter."""
    kinds = Counter()
    for i in range(60):
        result = damaged("typos", 0.1, "abcdefghij", name=f"n{i}")
        if len(result) == 9:
            kinds["dropped"] += 1
            assert any("abcdefghij"[:k] + "abcdefghij"[k + 1 :] == result for k in range(10))
        elif sorted(result) == list("abcdefghij"):
            off = [k for k in range(10) if result[k] != "abcdefghij"[k]]
            kinds["swapped"] += bool(off)
            assert off == [] or (len(off) == 2 and off[1] == off[0] + 1)
        else:
            kinds["replaced"] += 1
            assert sum(a != b for a, b in zip(result, "abcdefghij", strict=True)) == 1
    assert min(kinds[name] for name in ("dropped", "swapped", "replaced")) > 5


@pytest.mark.parametrize("strength", [0.1, 0.25, 0.9])
def test_truncation_keeps_the_end_in_whole_characters(strength):
    result, size = damaged("truncation", strength), len(BODY.encode())
    assert BODY.endswith(result)
    cut = size - len(result.encode())
    assert round(strength * size) <= cut < round(strength * size) + 4


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_whitespace_is_dropped_and_nothing_else(strength):
    result = damaged("whitespace", strength)
    assert result.split() != BODY.split()
    assert "".join(result.split()) == "".join(BODY.split())
    assert len(BODY) - len(result) == round(strength * sum(letter.isspace() for letter in BODY))


def test_damage_is_the_same_everywhere_and_differs_by_document():
    assert damaged("typos", 0.1) == damaged("typos", 0.1)
    assert damaged("typos", 0.1) != damaged("typos", 0.1, name="e")
    assert damaged("typos", 0.3, "the quick brown fox jumps", name="pin") == "the qiuck bonw fxo jups"


def test_of_a_document_with_a_prompt_the_prompt_is_damaged():
    kind = Corruption(kind="whitespace", strength=1.0)
    plain = corrupted(Document("d", "qa", "an answer", "a long question"), kind)
    assert (plain.prompt, plain.text) == ("alongquestion", "an answer")
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "who is it"}]
    chat = corrupted(Document("d", "qa", "an answer", turns), kind)
    assert [turn["content"] for turn in chat.prompt] == ["be kind", "whoisit"]
    assert turns[1]["content"] == "who is it"


def test_what_leaves_nothing_and_what_is_asked_twice_are_refused():
    one = Corruption(kind="truncation", strength=1.0)
    with pytest.raises(UserError, match="slice 'truncation-1': nothing is left of document 'd'; lower"):
        corrupted(Document("d", "code", "abc"), one)
    half = Corruption(kind="typos", strength=0.5)
    with pytest.raises(UserError, match=r"slice 'typos-0\.5' is there already"):
        damaged_slices([Document("d", "code", "abc")], [half, half], [])
    with pytest.raises(UserError, match=r"slice 'typos-0\.5' is there already"):
        damaged_slices([Document("d", "code", "abc")], [half], ["typos-0.5"])


def test_a_study_s_corruptions_are_slices_of_its_validation_documents(tmp_path):
    wanted = [{"kind": "typos", "strength": 0.1}, {"kind": "truncation", "strength": 0.25}]
    path = tiny_study(tmp_path)
    study = load_study(path, ["--data.corruptions", str(wanted)])
    study.folder.mkdir(parents=True)
    prepare(study)
    data = study.folder / "data"
    assert scored_slices(data) == ["validation", "far", "truncation-0.25", "typos-0.1"]
    clean = read_documents(data, "validation")
    for name in ("truncation-0.25", "typos-0.1"):
        result = read_documents(data, name)
        assert [d.id for d in result] == [d.id for d in clean], "documents share their ids across slices"
        assert all(a.text != b.text for a, b in zip(result, clean, strict=True))
