"""Documents from every kind of source, split by hash, without leaks."""

import hashlib
import json

import pytest
import torch
import yaml
from transformers import OPTConfig, OPTForCausalLM

from distill.data.rows import training_rows
from distill.data.sources import fingerprint, is_streamed, read_source
from distill.data.split import prepare
from distill.models.packing import check_packing
from eval.core.artifacts import read_manifest
from eval.core.documents import TEST, TRAIN, VALIDATION, Document, read_documents, scored_slices
from eval.core.documents.chats import lay_out
from eval.core.errors import UserError
from eval.core.sections import Source
from eval.core.study import load_study
from tests.helpers import text, tiny_model, tiny_study, tiny_tokenizer


def changed(path, section, **changes):
    raw = yaml.safe_load(path.read_text())
    raw[section].update(changes)
    path.write_text(yaml.safe_dump(raw))
    return load_study(path)


@pytest.fixture
def study(tmp_path):
    return load_study(tiny_study(tmp_path))


def test_splits_are_disjoint_complete_and_decided_by_hash(study):
    prepare(study)
    data = study.folder / "data"
    splits = {name: read_documents(data, name) for name in (TRAIN, VALIDATION, TEST)}
    assert {name: len(documents) for name, documents in splits.items()} == {TRAIN: 32, VALIDATION: 6, TEST: 2}
    ids = [d.id for documents in splits.values() for d in documents]
    assert len(set(ids)) == 40
    by_hash = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    assert [d.id for d in splits[VALIDATION]] == by_hash[:6]
    assert {d.id for d in splits[TEST]} == set(by_hash[-2:])
    assert all(d.bytes <= study.data.scored_bytes for d in splits[VALIDATION])
    row = json.loads((data / "validation.jsonl").read_text().splitlines()[0])
    assert row["sha256"] == hashlib.sha256(row["text"].encode()).hexdigest()
    assert row["bytes"] == len(row["text"].encode())
    assert scored_slices(data) == [VALIDATION, "far"]


def test_preparing_again_changes_nothing_and_a_changed_source_is_seen(study, tmp_path):
    first = prepare(study)
    inode = (study.folder / "data").stat().st_ino
    assert prepare(study) == first
    assert (study.folder / "data").stat().st_ino == inode
    with (tmp_path / "corpus.jsonl").open("a") as out:
        out.write(json.dumps({"id": "new", "domain": "code", "text": "something new"}) + "\n")
    assert prepare(study).hash != first.hash


def test_a_text_seen_twice_is_kept_once(tmp_path):
    path = tiny_study(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    lines = corpus.read_text().splitlines()
    copy = json.loads(lines[0]) | {"id": "a copy"}
    corpus.write_text("\n".join([*lines, json.dumps(copy)]) + "\n")
    facts = prepare(load_study(path)).facts
    assert facts["train_documents"] + facts["validation_documents"] + facts["test_documents"] == 40
    assert facts["left_out"] == {"documents": {"a copy of another": 1}}


def test_folders_are_read_by_pattern_in_hash_order(tmp_path):
    (tmp_path / "a" / "test").mkdir(parents=True)
    (tmp_path / "a" / "one.py").write_text("x = 1\n")
    (tmp_path / "a" / "test" / "two.py").write_text("x = 2\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    source = Source(kind="folder", path=str(tmp_path), include=["**/*.py"], exclude=["*/test/*"])
    documents = list(read_source(source))
    assert [(d.origin, d.domain) for d in documents] == [(f"{tmp_path.name}/a/one.py", "a")]


@pytest.mark.parametrize("pattern", ["a/b*", "/a/b*", "*/b*"])
def test_files_are_left_out_by_their_path_with_or_without_a_slash_in_front(tmp_path, pattern):
    (tmp_path / "a").mkdir()
    for name in ("a/one.py", "a/b.py"):
        (tmp_path / name).write_text(f"{name}\n")
    source = Source(kind="folder", path=str(tmp_path), include=["**/*.py"], exclude=[pattern])
    assert [d.origin for d in read_source(source)] == [f"{tmp_path.name}/a/one.py"]


def test_standard_library_packages_and_topics_are_sources():
    stdlib = Source(kind="folder", path="stdlib", include=["*.py"], documents=3)
    assert len(list(read_source(stdlib))) == 3
    package = Source(kind="folder", path="package:transformers", include=["*.py"], documents=2)
    assert [d.origin.split("/")[0] for d in read_source(package)] == ["package:transformers"] * 2
    topics = list(read_source(Source(kind="pydoc", documents=4)))
    assert len({d.id for d in topics}) == 4


def test_the_split_does_not_depend_on_where_the_files_lie(tmp_path):
    hashes = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        study = load_study(tiny_study(tmp_path / place))
        hashes.append(prepare(study).hash)
    assert hashes[0] == hashes[1]


def test_parquet_is_a_source(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"body": ["one text", "another"], "kind": ["a", "b"]}).to_parquet(
        tmp_path / "x.parquet"
    )
    source = Source(
        kind="dataset",
        path="parquet",
        data_files=str(tmp_path / "x.parquet"),
        text_column="body",
        domain_column="kind",
    )
    assert [(d.domain, d.text) for d in read_source(source)] == [("a", "one text"), ("b", "another")]


def test_rows_cover_many_documents_and_do_not_depend_on_chance(study):
    prepare(study)
    tokenizer = tiny_tokenizer()
    rows = training_rows(study, tokenizer)
    assert len(rows) == len({r.id for r in rows}) == study.data.train_rows
    assert rows == training_rows(study, tokenizer)
    assert len({r.document for r in rows}) >= study.data.train_rows // 4
    assert all(
        1 < len(r.tokens) <= study.data.context and r.tokens[0] == tokenizer.bos_token_id for r in rows
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 60}, "40 documents, need more than 60 for validation"),
        (
            {"documents": [{"kind": "folder", "path": "/nowhere"}]},
            "no folder '/nowhere'; give an existing folder",
        ),
        (
            {"documents": [{"kind": "folder", "path": "package:nowhere_at_all"}]},
            "package 'nowhere_at_all' is not installed",
        ),
        *(
            ({"documents": [{"kind": "folder", "path": path}]}, message)
            for path, message in (
                ("package:nowhere_at_all.sub", r"package 'nowhere_at_all\.sub' is not installed"),
                ("package:.sub", r"package '\.sub' is not installed"),
                ("package:", "package '' is not installed"),
                ("", "no folder ''; give an existing folder"),
            )
        ),
        *(
            (
                {"documents": [{"kind": "folder", "path": "stdlib", "include": [pattern]}]},
                "include .* of 'stdlib'.*; give patterns of files below its path",
            )
            for pattern in ("/etc/*", "", "../*", "**x")
        ),
        (
            {"documents": [{"kind": "dataset", "path": "json", "data_files": "/nowhere.jsonl"}]},
            "no file '/nowhere.jsonl'; give data_files that are there; they are read from",
        ),
        ({"shifted": {"train": [{"kind": "pydoc"}]}}, "data.shifted.train: this name is reserved"),
    ],
)
def test_bad_sources_are_refused(tmp_path, change, message):
    study = changed(tiny_study(tmp_path), "data", **change)
    with pytest.raises(UserError, match=message):
        prepare(study)
    assert not (study.folder / "data").exists()


def test_a_wrong_column_is_refused(tmp_path):
    path = tiny_study(tmp_path)
    source = {
        "kind": "dataset",
        "path": "json",
        "data_files": str(tmp_path / "corpus.jsonl"),
        "text_column": "body",
    }
    with pytest.raises(UserError, match=r"40 no column 'body'; .*columns of its first row: id, domain, text"):
        prepare(changed(path, "data", documents=[source]))


def test_more_rows_than_the_text_holds_are_refused(tmp_path):
    study = changed(tiny_study(tmp_path), "data", train_rows=10_000)
    prepare(study)
    with pytest.raises(UserError, match=r"data\.train_rows: 10000, but the training documents have \d+ rows"):
        training_rows(study, tiny_tokenizer())


def test_manifest_counts_the_documents(study):
    prepare(study)
    facts = read_manifest(study.folder / "data").facts
    assert facts == {
        "train_documents": 32,
        "validation_documents": 6,
        "test_documents": 2,
        "far_documents": 8,
        "rows": {"documents": 40, "far": 8},
        "left_out": {},
        "groups": {"validation": 6, "test": 2, "train": 32},
    }


def rows_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "dataset", "path": "json", "data_files": str(path)}


def test_a_prompt_column_is_kept_apart_and_an_answer_is_not_cut(tmp_path):
    source = rows_of(
        tmp_path / "pairs.jsonl",
        [{"id": i, "ask": "the river " * 9, "text": text("prose", i)} for i in range(12)],
    )
    documents = [{**source, "prompt_column": "ask"}]
    study = changed(tiny_study(tmp_path), "data", documents=documents, scored_bytes=20, train_rows=6)
    prepare(study)
    validation = read_documents(study.folder / "data", VALIDATION)
    assert all(d.prompt == "the river " * 9 and d.bytes > 20 for d in validation)
    rows = training_rows(study, tiny_tokenizer())
    assert len(rows) == 6
    assert all(0 < row.given < len(row.tokens) - 1 for row in rows)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user", "content": "stone"}, {"role": "assistant", "content": "river"}], None),
        ([{"role": "assistant", "content": "river"}], "nothing before the answer"),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            "no answer at the end",
        ),
        ([{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}], "an empty turn"),
        ("no turns", "no turns of a role and its text"),
    ],
)
def test_a_chat_is_its_turns_and_its_last_answer(tmp_path, turns, message):
    source = Source(**rows_of(tmp_path / "chats.jsonl", [{"chat": turns}]), messages_column="chat")
    if message is None:
        (document,) = read_source(source)
        assert (document.prompt, document.text) == (turns[:-1], "river")
    else:
        with pytest.raises(UserError, match=message):
            list(read_source(source))


def test_a_stream_is_read_as_far_as_it_is_asked_for(tmp_path):
    rows = [{"text": f"document {i}"} for i in range(50)]
    source = rows_of(tmp_path / "many.jsonl", rows) | {"streaming": True, "documents": 7}
    assert [d.text for d in read_source(Source(**source))] == [f"document {i}" for i in range(7)]


def test_a_whole_data_set_is_streamed_without_a_copy_of_it(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "corpus").mkdir()
    rows_of(tmp_path / "corpus" / "many.jsonl", [{"text": f"document {i}"} for i in range(50)])
    source = Source(kind="dataset", path=str(tmp_path / "corpus"), streaming=True)
    converted = tmp_path / "converted"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", converted)
    streamed = list(read_source(source))
    assert [d.text for d in streamed] == [f"document {i}" for i in range(50)]
    assert not list(converted.rglob("*.arrow"))
    assert list(read_source(source.model_copy(update={"streaming": None}))) == streamed
    assert list(converted.rglob("*.arrow"))


def test_a_number_of_documents_reads_no_further_file(tmp_path):
    """Whole, the data set is broken; only who reads on finds out."""
    from datasets import Dataset

    names = ["a.parquet", "b.parquet"]
    Dataset.from_dict({"text": [f"text {i}" for i in range(9)]}).to_parquet(tmp_path / names[0])
    (tmp_path / names[1]).write_bytes(b"cut")
    source = Source(kind="dataset", path="parquet", data_files=[str(tmp_path / name) for name in names])
    few = source.model_copy(update={"documents": 5})
    assert [d.text for d in read_source(few)] == [f"text {i}" for i in range(5)]
    for whole in (source, few.model_copy(update={"streaming": False})):
        with pytest.raises(UserError, match="data source: parquet: "):
            list(read_source(whole))
    assert not is_streamed(few.model_copy(update={"split": "train[:3]"}))


def test_packed_rows_are_full_and_a_model_that_mixes_their_parts_is_refused(tmp_path):
    study = changed(tiny_study(tmp_path), "data", packing=True, context=512, train_rows=8)
    prepare(study)
    rows = training_rows(study, tiny_tokenizer())
    assert any(row.packed for row in rows)
    check_packing(tiny_model(), rows, 0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    torch.manual_seed(0)
    mixing = OPTForCausalLM(
        OPTConfig(**shape, word_embed_proj_dim=32, vocab_size=320, max_position_embeddings=512)
    )
    with pytest.raises(UserError, match="documents see each other in a opt"):
        check_packing(mixing.eval(), rows, 0)


def test_a_template_that_prints_the_day_gives_the_same_rows_tomorrow(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for turn in messages %}{{ turn['content'] }};{% endfor %}"
    )
    turns = [{"role": "user", "content": "hello"}]
    assert lay_out(tokenizer, Document("a", "x", "there", turns)) == ("26 Jul 2024hello;there;", [(17, None)])


def test_what_a_local_source_holds_is_noticed(tmp_path):
    """A folder of its own, and a pattern that goes down into folders."""
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    for given in (
        {"path": str(tmp_path)},
        {"path": "json", "data_files": f"{tmp_path}/**/*.jsonl"},
        {"path": str(tmp_path), "data_files": "in/*.jsonl"},
    ):
        source = Source(kind="dataset", **given)
        before = fingerprint(source)
        file.write_text(file.read_text() + '{"text": "b"}\n')
        assert fingerprint(source) != before
