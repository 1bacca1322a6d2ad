"""The split: by content, stable, with groups and near-duplicates on one side; what is left out is counted."""

import json

import pytest
from pydantic import ValidationError

from distill.data.split import prepare
from distill.train import distil
from eval.core.documents import (
    TEST,
    TRAIN,
    VALIDATION,
    describe_data,
    part_of_test,
    read_documents,
    scored_slices,
    slices_of_test,
)
from eval.core.errors import UserError
from eval.core.study import load_study
from tests.helpers import text, tiny_model, tiny_study, tiny_tokenizer

SPLITS = (VALIDATION, TEST, TRAIN)


def prepared(folder, rows, lines=None, **data):
    """The sides of every text of a study over `rows`, and the facts of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = tiny_study(folder)
    content = lines if lines is not None else [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in content))
    source = {"kind": "dataset", "path": "json", "data_files": str(folder / "rows.jsonl")}
    source |= {key: data.pop(key) for key in list(data) if key.endswith("_column")}
    settings = {"documents": [source], "shifted": {}, "scored_bytes": 10**6, **data}
    study = load_study(path, **{f"data__{key}": value for key, value in settings.items()})
    facts = prepare(study).facts
    sides = {}
    for split in SPLITS:
        for document in read_documents(study.folder / "data", split):
            assert document.text not in sides
            sides[document.text] = split
    return sides, facts


def texts(number, words=40):
    return [{"text": text("prose", i, words)} for i in range(number)]


def test_a_row_on_top_moves_at_most_one_other_and_none_between_validation_and_test(tmp_path):
    rows, moved = texts(60), []
    before, _ = prepared(tmp_path / "before", rows, validation=12, test=8)
    for i in range(8):
        new = {"text": text("code", i)}
        after, _ = prepared(tmp_path / f"after{i}", [new, *rows], validation=12, test=8)
        moves = {(side, after[one]) for one, side in before.items() if after[one] != side}
        assert len([one for one, side in before.items() if after[one] != side]) == (
            after[new["text"]] != TRAIN
        )
        assert not {(VALIDATION, TEST), (TEST, VALIDATION)} & moves
        moved += moves
    assert moved, "no new row fell into validation or test: the test asked nothing"


def test_order_names_and_folders_of_files_change_nothing_but_origins(tmp_path):
    rows = texts(30)
    for place, parts in {"one": (rows, []), "two": (rows[11:], rows[:11])}.items():
        for folder, part in zip(("a", "b"), parts, strict=True):
            (tmp_path / place / folder).mkdir(parents=True)
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (tmp_path / place / folder / "rows.jsonl").write_text(lines)
    found = []
    for place, files in {
        "one": str(tmp_path / "one/a/*.jsonl"),
        "two": [str(tmp_path / "two/a/rows.jsonl"), str(tmp_path / "two/?/*.jsonl")],
    }.items():
        source = {"kind": "dataset", "path": "json", "data_files": files}
        study = load_study(tiny_study(tmp_path / place), data__documents=[source], data__shifted={})
        prepare(study)
        found.append({s: {d.id for d in read_documents(study.folder / "data", s)} for s in SPLITS})
        origins = {d.origin for s in SPLITS for d in read_documents(study.folder / "data", s)}
    assert found[0] == found[1]
    assert all(len(name) == 16 for names in found[0].values() for name in names)
    assert origins == {
        *(f"a/rows.jsonl:{i}" for i in range(1, 20)),
        *(f"b/rows.jsonl:{i}" for i in range(1, 12)),
    }


def test_an_id_column_names_documents_and_must_tell_them_apart(tmp_path):
    rows = [{"key": i, **row} for i, row in enumerate(texts(20))]
    study = tmp_path / "x"
    sides, _ = prepared(study, rows, id_column="key")
    changed = [{**row, "text": row["text"] + "more"} for row in rows]
    later, _ = prepared(tmp_path / "y", changed, id_column="key")
    assert {one + "more": side for one, side in sides.items()} == later, "a new edition stays on its side"
    with pytest.raises(UserError, match=r"two documents have the id '3': rows\.jsonl:4 and rows\.jsonl:21"):
        prepared(tmp_path / "z", [*rows, {"key": 3, "text": "another"}], id_column="key")


def test_a_group_is_on_one_side_and_gives_a_split_no_more_than_a_part(tmp_path):
    rows = [{"who": f"author{i // 5}", **row} for i, row in enumerate(texts(200))]
    who = {row["text"]: row["who"] for row in rows}
    sides, facts = prepared(tmp_path, rows, group_column="who", validation=24, test=16, max_dropped=0)
    names = {split: {who[one] for one, side in sides.items() if side == split} for split in SPLITS}
    assert not names[VALIDATION] & names[TEST]
    assert not names[TRAIN] & (names[VALIDATION] | names[TEST])
    assert facts["validation_documents"] == 24
    assert facts["groups"] == {split: len(names[split]) for split in SPLITS}
    assert facts["groups"][VALIDATION] == facts["groups"][TEST] == 8
    left_out = 8 * (5 - 3) + 8 * (5 - 2)
    assert facts["left_out"] == {"documents": {"more of a group in validation or test": left_out}}
    assert facts["train_documents"] == 200 - 24 - 16 - left_out
    (line,) = [line for line in describe_data(facts) if line.startswith("groups")]
    assert "24 validation documents in 8" in line
    rows = [{**row, "who": f"author{i // 20}"} for i, row in enumerate(rows)]
    with pytest.raises(UserError, match="10 groups of 200 documents, need more than 60 for validation"):
        prepared(tmp_path / "few", rows, group_column="who", validation=60, test=40)


def test_the_group_goes_into_the_artifact(tmp_path):
    rows = [{"who": None if i % 2 else "ada", **row} for i, row in enumerate(texts(30))]
    prepared(tmp_path, rows, group_column="who", validation=6, test=2)
    study = load_study(tmp_path / "study.yaml")
    documents = [d for split in SPLITS for d in read_documents(study.folder / "data", split)]
    assert {d.group for d in documents} == {"ada", *(d.id for d in documents if d.group != "ada")}


def test_shifted_slices_have_test_documents_of_their_own_in_whole_clusters(tmp_path):
    rows = [{"text": text("code", i), "who": f"author{i // 4}"} for i in range(48)]
    (tmp_path / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "dataset", "path": "json", "data_files": str(tmp_path / "near.jsonl")}
    data = {"validation": 6, "test": 4, "shifted": {"near": [{**source, "group_column": "who"}]}}
    prepared(tmp_path / "whole", texts(30), **data)
    prepared(tmp_path / "parted", texts(30), **data, shifted_test=18)
    whole, parted = (
        load_study(tmp_path / name / "study.yaml").folder / "data" for name in ("whole", "parted")
    )
    assert (scored_slices(parted), slices_of_test(parted)) == ([VALIDATION, "near"], [TEST, "test/near"])
    near, aside = (read_documents(parted, name) for name in ("near", part_of_test("near")))
    assert len(aside) == 20, "five authors: as many as hold 18 documents"
    assert not {d.group for d in near} & {d.group for d in aside}
    every = read_documents(whole, "near")
    assert sorted(near + aside, key=lambda d: d.id) == sorted(every, key=lambda d: d.id)
    assert slices_of_test(whole) == [TEST]
    assert [d for d in every if d in near] == near, "in the same order"
    with pytest.raises(UserError, match=r"48 documents in 12 clusters: a test of 44 would leave 1; add docu"):
        prepared(tmp_path / "more", texts(30), **data, shifted_test=44)
    with pytest.raises(UserError, match="`shifted_test` needs `test` documents beside it"):
        prepared(tmp_path / "none", texts(30), **data | {"test": 0}, shifted_test=4)


def test_a_study_without_test_documents_of_slices_has_the_key_it_had(tmp_path):
    study = load_study(tiny_study(tmp_path))
    assert "shifted_test" not in study.data.model_dump(mode="json")
    assert load_study(tmp_path / "study.yaml", data__shifted_test=0).hash() == study.hash()
    assert load_study(tmp_path / "study.yaml", data__shifted_test=2).hash() != study.hash()


def test_near_duplicates_are_on_one_side_and_not_in_a_shifted_slice(tmp_path):
    rows = [{"text": f"{body}\n{ending}"} for body in (text("prose", i, 200) + text("code", i, 200) for i in range(40))
            for ending in ("the end", "the very end")]  # fmt: skip
    near = tmp_path / "near.jsonl"
    near.write_text(
        json.dumps({"text": rows[0]["text"] + "of it"}) + "\n" + json.dumps({"text": "quite another"}) + "\n"
    )
    source = {"kind": "dataset", "path": "json", "data_files": str(near)}
    data = {"validation": 10, "test": 6, "shifted": {"far": [source]}, "max_dropped": 0.5}
    sides, facts = prepared(tmp_path / "on", rows, near_duplicates=0.8, **data)
    side_of = [
        (sides.get(one["text"]), sides.get(other["text"]))
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    assert all(one == other or None in (one, other) for one, other in side_of)
    assert facts["near_duplicates"] == 80
    assert facts["groups"] == {"validation": 10, "test": 6, "train": 24}
    assert facts["left_out"]["far"] == {"nearly a training document": 1}
    sides, facts = prepared(tmp_path / "off", rows, **data)
    assert any(
        sides[one["text"]] != sides[other["text"]] for one, other in zip(rows[::2], rows[1::2], strict=True)
    )


BROKEN = {
    '{"text": "  "}': "no text",
    '{"text": null}': "no text",
    '{"text": 7}': "not a text",
    '{"other": "x"}': "no column 'text'",
    "{": "not a JSON object",
    "[1]": "not a JSON object",
    '{"text": "\\ud800"}': "not decodable",
    '{"text": "a\\u0000b"}': "not decodable",
    '{"text": "tiny"}': "shorter than data.min_bytes",
}  # fmt: skip


def test_what_cannot_be_used_is_left_out_by_reason_up_to_a_share(tmp_path):
    good = [json.dumps(row) for row in texts(60)]
    lines = [*good[:30], *BROKEN, good[0], *good[30:]]
    _, facts = prepared(tmp_path, [], lines, min_bytes=5)
    reasons = [*BROKEN.values(), "a copy of another"]
    assert facts["left_out"] == {"documents": {reason: reasons.count(reason) for reason in reasons}}
    assert facts["rows"] == {"documents": 70}
    (line,) = describe_data(facts)
    assert line.startswith(
        "data: 60 of 70 rows used; left out: 2 no text, 2 not a JSON object, 2 not decodable, 1 a copy"
    )
    with pytest.raises(
        UserError, match=r"data\.documents: 14% of 70 rows cannot be used: 2 no text.* data\.max_dropped"
    ):
        prepared(tmp_path / "strict", [], lines, min_bytes=5, max_dropped=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": "klingon"}, "unknown encoding: klingon; give a name that Python knows"),
        ({"encoding": "base64"}, "is not a text encoding"),
        ({"prompt_column": "a", "messages_column": "b"}, "give one of `prompt_column` and `messages_column`"),
        ({"prompt_template": "no column"}, "expected columns in braces"),
        ({"prompt_template": "{a.b!r}"}, "expected columns in braces"),
        ({"kind": "folder", "group_column": "who"}, "`kind: folder` has no columns"),
        ({"group_by_folder": True}, "a data set has `group_column`"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(change, message):
    from eval.core.sections import Source

    with pytest.raises(ValidationError, match=message):
        Source(**{"kind": "dataset", "path": "json", **change})


def test_a_share_of_each_source_must_be_usable(tmp_path):
    good, bad = texts(60), [{"text": " "}, {"text": "a stone"}]
    sources = []
    for name, rows in (("good", good), ("bad", bad)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"kind": "dataset", "path": "json", "data_files": str(path)})
    study = load_study(tiny_study(tmp_path), data__documents=sources, data__shifted={})
    with pytest.raises(UserError, match=r"data\.documents, dataset json .*bad\.jsonl: 50% of 2 rows cannot"):
        prepare(study)
    facts = prepare(load_study(study.folder.parents[1] / "study.yaml", **{
        "data__documents": sources, "data__shifted": {}, "data__max_dropped": 0.5}
    )).facts  # fmt: skip
    assert facts["left_out"] == {"documents": {"no text": 1}}


def test_empty_files_are_counted_apart_and_refuse_nothing(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i, row in enumerate(texts(20)):
        (folder / f"{i}.py").write_text(row["text"])
        (folder / f"__init{i}__.py").write_text("" if i % 2 else " \n\t")
    source = {"kind": "folder", "path": str(folder)}
    facts = prepare(load_study(tiny_study(tmp_path), data__documents=[source], data__shifted={})).facts
    assert (facts["rows"], facts["left_out"]) == ({"documents": 20}, {})
    assert facts["empty_files"] == {"documents": 20}
    assert describe_data(facts)[0] == "data: 20 of 20 rows used; beside them 20 empty files"


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_chats_that_the_template_refuses_are_counted(tmp_path, capsys):
    words = tiny_tokenizer()
    words.chat_template = STRICT
    base = tmp_path / "model"
    tiny_model(len(words)).save_pretrained(base)
    words.save_pretrained(base)
    chats = [
        [{"role": "user", "content": text("prose", i, 9)}, {"role": "assistant", "content": text("code", i)}]
        for i in range(30)
    ]
    for i in (3, 7):
        chats[i].insert(0, {"role": "system", "content": "Be brief."})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    source = {"kind": "dataset", "path": "json", "data_files": str(path), "messages_column": "chat"}
    settings = {"data__documents": [source], "base": {"path": str(base)}, "method": {"name": "placebo"}}
    file, reason = tiny_study(tmp_path), "the chat template raises: System role not supported"
    distil(load_study(file, **settings), "data")
    assert f"data: 28 of 30 rows used; left out: 2 {reason}" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"7% of 30 rows cannot be used: 2 {reason}; clean them"):
        distil(load_study(file, **settings, data__max_dropped=0.01), "data")
