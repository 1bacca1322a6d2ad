"""Damaged documents: exactly as much as is stated, the same each time, and nothing else touched."""

import json
from collections import Counter

import pytest

from distill.data.split import prepare
from eval.core.artifacts import read_manifest
from eval.core.documents import Document, cluster_names, read_documents, scored_slices
from eval.core.errors import UserError
from eval.core.records import each_score
from eval.core.sections import Corruption
from eval.core.study import load_study
from eval.score.corruptions import corrupted, slice_documents, slice_names
from tests.helpers import run, text, tiny_study

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


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_words_with_capitals_are_written_without_and_nothing_else(strength):
    body = "The House met. Mr. Øre of NASA read HTML5 to 40 of them; ich weiß, Straße\n" * 4
    result = damaged("lowercase", strength, body)
    assert result.lower() == body.lower()
    words = [(a, b) for a, b in zip(body.split(), result.split(), strict=True) if a != b]
    capitals = [word for word in body.split() if word != word.lower()]
    assert len(words) == round(strength * len(capitals))
    assert all(after == before.lower() for before, after in words)


def test_of_a_text_with_a_label_the_text_is_damaged_and_counts_as_one_example():
    mail = Document("d", "spam", BODY, group="g", label=1)
    result = corrupted(mail, Corruption(kind="typos", strength=0.1))
    assert (result.label, result.size, result.id, result.group, result.domain) == (1, 1, "d", "g", "spam")
    assert result.text != BODY


def test_bits_are_divided_by_the_bytes_of_the_damaged_text():
    result = corrupted(Document("d", "code", BODY), Corruption(kind="typos", strength=0.3))
    assert result.size == len(result.text.encode()) < len(BODY.encode())


def test_what_leaves_nothing_and_what_is_asked_twice_are_refused(tmp_path):
    one = Corruption(kind="truncation", strength=1.0)
    with pytest.raises(UserError, match="slice 'truncation-1': nothing is left of document 'd'; lower"):
        corrupted(Document("d", "code", "abc"), one)
    half = {"kind": "typos", "strength": 0.5}
    shifted = {"typos-0.5": [{"kind": "pydoc"}]}
    path = tiny_study(tmp_path)
    for changes in (
        {"data__corruptions": [half, half]},
        {"data__corruptions": [half], "data__shifted": shifted},
    ):
        with pytest.raises(UserError, match=r"slice 'typos-0\.5' is there twice"):
            load_study(path, **changes)


WANTED = [{"kind": "typos", "strength": 0.1}, {"kind": "truncation", "strength": 0.25}]


def test_a_study_s_corruptions_are_slices_of_its_validation_documents_and_no_data(tmp_path):
    path = tiny_study(tmp_path)
    study = load_study(path, data__corruptions=WANTED)
    study.folder.mkdir(parents=True)
    first = prepare(load_study(path))
    assert prepare(study) == first, "the data artifact is the same, by its key"
    data, damage = study.folder / "data", study.data.corruptions
    assert scored_slices(data) == ["validation", "far"]
    assert slice_names(data, damage) == ["validation", "far", "truncation-0.25", "typos-0.1"]
    assert slice_documents(data, "far", damage) == read_documents(data, "far")
    clean = read_documents(data, "validation")
    for name in ("truncation-0.25", "typos-0.1"):
        result = slice_documents(data, name, damage)
        assert [d.id for d in result] == [d.id for d in clean], "validation documents, and no test document"
        assert all(a.text != b.text for a, b in zip(result, clean, strict=True))
        kinds = study.data.cluster_of("validation"), study.data.cluster_of(name)
        assert cluster_names(result, kinds[1]) == cluster_names(clean, kinds[0])


@pytest.mark.slow
def test_corruptions_decide_no_model_and_are_scored_with_every_one(tmp_path):
    path = tiny_study(tmp_path)
    assert (done := run("distill/train.py", "--config", path)).returncode == 0, done.stderr
    folder = load_study(path).folder
    made = {place: place.stat().st_mtime_ns for place in folder.rglob("manifest.json")}
    asked = ["--data.corruptions", json.dumps(WANTED)]
    assert (done := run("distill/train.py", "--config", path, *asked)).returncode == 0, done.stderr
    assert {place: place.stat().st_mtime_ns for place in folder.rglob("manifest.json")} == made
    assert (done := run("-m", "eval.score", "--study", folder)).returncode == 0, done.stderr
    clean = read_documents(folder / "data", "validation")
    arms = set()
    for record in each_score(folder):
        arms.add(record.arm)
        assert record.data == read_manifest(folder / "data").hash
        by_slice = Counter(record.documents.slice)
        assert by_slice["typos-0.1"] == by_slice["truncation-0.25"] == by_slice["validation"] == len(clean)
    assert arms == {"B", "T0", "T1", "S1", "S0", "CE"}
    export = tmp_path / "export.jsonl"
    assert (done := run("-m", "eval.score.import", "--study", folder, "--export", export)).returncode == 0, (
        done.stderr
    )
    slices = Counter(json.loads(line)["slice"] for line in export.read_text().splitlines())
    assert slices["typos-0.1"] == len(clean)
