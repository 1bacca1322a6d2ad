"""Files in every encoding and packing, data sets whose errors say why, chats and prompts of every form."""

import gzip
import json
from collections import Counter
from dataclasses import replace

import pytest
import zstandard

from distill.data.files import text_lines
from distill.data.sources import fingerprint, read_source
from distill.data.spool import document_line
from eval.core.documents import parse_document
from eval.core.documents.encoding import encode
from eval.core.errors import UserError
from eval.core.sections import Source
from eval.watch.measure import read_new
from tests.helpers import tiny_tokenizer

WORDS = "Grüße, naïve café\r\nsecond line"
ROWS = [{"text": WORDS}, {"text": "zwei\n"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)


def source_of(file, **changes):
    return Source(**{"kind": "dataset", "path": "json", "data_files": str(file), **changes})


def counted(source):
    left_out = Counter()
    return list(read_source(source, left_out)), left_out


@pytest.mark.parametrize(
    ("written", "given"),
    [("utf-8", {}), ("utf-8-sig", {}), ("utf-16", {}), ("utf-32", {}), ("utf-16", {"encoding": "latin-1"}),
     ("latin-1", {"encoding": "latin-1"}), ("utf-16-le", {"encoding": "utf-16-le"}), ("cp1252", {"encoding": "cp1252"})],
)  # fmt: skip
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_every_encoding_and_packing_gives_the_same_documents(tmp_path, written, given, packing):
    """A byte order mark counts more than `encoding`; line ends inside a text stay as they are."""
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    rows, whole = tmp_path / f"rows.jsonl{packing}", tmp_path / f"whole.txt{packing}"
    rows.write_bytes(pack(LINES.encode(written)))
    whole.write_bytes(pack(WORDS.encode(written)))
    lines = source_of(rows, **given)
    assert [d.text for d in read_source(lines)] == [WORDS, "zwei\n"]
    folder = Source(kind="folder", path=str(tmp_path), include=["*.txt*"], **given)
    (document,) = read_source(folder)
    assert document.text == WORDS
    assert document.id == next(iter(read_source(lines))).id, "the same content, the same id"
    text = source_of(whole, path="text", **given)
    assert [d.text for d in read_source(text)] == ["Grüße, naïve café", "second line"]


def test_frames_one_after_another_are_all_read(tmp_path):
    for name, pack in ((".zst", zstandard.compress), (".gz", gzip.compress)):
        path = tmp_path / f"x{name}"
        path.write_bytes(pack(b"one\n") + pack(b"two\n"))
        assert [line for _, line in text_lines(path, "utf-8")] == ["one\n", "two\n"]


def test_a_wrong_encoding_costs_the_rows_that_it_breaks(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES.encode("latin-1"))
    documents, left_out = counted(source_of(path))
    assert [d.text for d in documents] == ["zwei\n"]
    assert left_out == {"not decodable": 1}
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_bytes(WORDS.encode("latin-1"))
    (tmp_path / "f" / "b.txt").write_bytes("no mark".encode("utf-16-le"))
    (tmp_path / "f" / "c.txt").write_text("good")
    documents, left_out = counted(Source(kind="folder", path=str(tmp_path / "f"), include=["*"]))
    assert [d.origin for d in documents] == ["f/c.txt"]
    assert left_out == {"not decodable": 2}


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    path, pack = tmp_path / name, zstandard.compress if name.endswith("zst") else gzip.compress
    path.write_bytes(pack(LINES.encode() * 50)[:-9])
    with pytest.raises(UserError, match=rf"data source .*{name}: .*; copy the file again") as caught:
        list(read_source(source_of(path)))
    assert caught.value.__cause__ is not None
    path.write_bytes(b"not packed at all")
    with pytest.raises(UserError, match="copy the file again"):
        list(read_source(source_of(path)))


def test_csv_and_a_list_of_objects_are_rows(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('kind,text\na,"one, and\ntwo"\nb,three\nc,too,many\n')
    documents, left_out = counted(source_of(table, path="csv", domain_column="kind"))
    assert [(d.domain, d.text, d.origin) for d in documents] == [
        ("a", "one, and\ntwo", "t.csv:1"),
        ("b", "three", "t.csv:2"),
    ]
    assert left_out == {"another number of columns": 1}
    listed = tmp_path / "l.json"
    listed.write_text(json.dumps([*ROWS, 3], indent=1))
    documents, left_out = counted(source_of(listed))
    assert [d.origin for d in documents] == ["l.json:1", "l.json:2"]
    assert left_out == {"not a JSON object": 1}
    listed.write_text("[{]")
    with pytest.raises(UserError, match=r"l\.json: a list that is not JSON"):
        list(read_source(source_of(listed)))


def test_a_folder_called_json_disturbs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(LINES)
    source = source_of("rows.jsonl")
    before = fingerprint(source), [d.text for d in read_source(source)]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "rows.jsonl").write_text('{"text": "of another"}\n')
    assert (fingerprint(source), [d.text for d in read_source(source)]) == before


def test_rows_of_many_shapes_do_not_disturb_each_other(tmp_path):
    """What a column of one type could not hold: texts beside numbers, turns with other keys."""
    rows = [
        {"text": "a", "x": 1},
        {"text": "b", "x": "one"},
        {"text": "c", "x": {"y": [1, "two"]}},
        {"text": "d"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert [(d.text, d.origin) for d in read_source(source_of(path))] == [
        ("a", "rows.jsonl:1"), ("b", "rows.jsonl:3"), ("c", "rows.jsonl:5"), ("d", "rows.jsonl:7"),
    ]  # fmt: skip


def test_an_error_of_a_data_set_keeps_its_cause(tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"data source: parquet: .*[Pp]arquet.*; fix path") as caught:
        list(read_source(source_of(path, path="parquet")))
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_column_is_refused_at_once(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"body": ["one"], "kind": ["a"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no column 'text'; choose among body, kind"):
        list(read_source(source_of(tmp_path / "x.parquet", path="parquet")))


SHAREGPT = [
    {"from": "system", "value": " "},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "there"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
CALL = [{"id": "1", "function": {"name": "f", "arguments": {}}}]
TOOLS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "content": "7", "tool_call_id": "1", "at": "noon"},
]
ANSWER = {"role": "assistant", "content": "there"}
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("turns", "prompt"),
    [
        (SHAREGPT, [USER]),
        ([*PARTS, ANSWER], [USER]),
        ([{"role": "system", "content": ""}, USER, ANSWER], [USER]),
        ([{"role": "system", "content": "Be kind."}, USER, ANSWER], [{"role": "system", "content": "Be kind."}, USER]),
        ([{**USER, "tool_calls": None}, ANSWER], [USER]),
        ([*TOOLS, ANSWER], [USER, {"role": "assistant", "content": "", "tool_calls": CALL},
                            {"role": "tool", "content": "7", "tool_call_id": "1"}]),
    ],
)  # fmt: skip
def test_chats_of_every_form_are_turns_and_an_answer(tmp_path, turns, prompt):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"chat": turns}) + "\n")
    (document,) = read_source(source_of(path, messages_column="chat"))
    assert (document.prompt, document.text) == (prompt, "there")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([USER, {**ANSWER, "content": None}], "an empty turn"),
        ([{"role": "user", "content": ""}, ANSWER], "an empty turn"),
        ([USER], "no answer at the end"),
        ([USER, ANSWER, USER], "no answer at the end"),
        ([ANSWER], "nothing before the answer"),
        ([USER, {**ANSWER, "tool_calls": ["f"]}], "calls of tools that are no list of objects"),
        ([USER, {**ANSWER, "tool_calls": "[{}]"}], "calls of tools that are no list of objects"),
        ([{"from": "narrator", "value": "Once."}, ANSWER], "no turns of a role and its text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER], "not a text"),
        (None, "no turns of a role and its text"),
        ([], "no turns of a role and its text"),
    ],
)
def test_a_chat_that_cannot_be_learned_is_counted(tmp_path, turns, reason):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": one}) + "\n" for one in (turns, [USER, ANSWER])))
    documents, left_out = counted(source_of(path, messages_column="chat"))
    assert len(documents) == 1
    assert left_out == {reason: 1}


WRITES_CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("said", [None, "I look. "])
def test_a_chat_that_ends_with_calls_of_tools_is_learned_as_its_template_writes_them(tmp_path, said):
    """Arguments that are a string of JSON, as OpenAI's interface gives them, are written once."""
    call = [{"id": "1", "function": {"name": "sum", "arguments": '{"a": "\u20ac", "b": 1}'}}]
    turns = [USER, {"role": "assistant", "content": said, "tool_calls": call}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"chat": turns}) + "\n")
    (document,) = read_source(source_of(tmp_path / "chats.jsonl", messages_column="chat"))
    parsed = [{"id": "1", "function": {"name": "sum", "arguments": {"a": "\u20ac", "b": 1}}}]
    assert document.text == (said or "") + json.dumps(parsed, ensure_ascii=False)
    again = parse_document(document_line(document))
    assert again == replace(document, group=again.group, tools=())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = WRITES_CALLS
    (encoding,) = encode(tokenizer, [again])
    answer = f'{said or ""}sum({{"a": "\u20ac", "b": 1}})</assistant>'
    assert tokenizer.decode(encoding.ids[: encoding.given]).endswith("<user>hi</user><assistant>")
    assert tokenizer.decode(encoding.ids[encoding.given :]) == answer
    (tmp_path / "new.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (new,) = read_new(tmp_path / "new.jsonl", 3)
    assert (new.text, new.prompt, new.calls) == (document.text, document.prompt, document.calls)
    tokenizer.chat_template = WRITES_CALLS.replace("m.tool_calls", "m.nothing")
    with pytest.raises(UserError, match="the chat template does not write the calls of tools; take a base"):
        encode(tokenizer, [again])


SCHEMA = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("given", [[SCHEMA], json.dumps([SCHEMA]), [{**SCHEMA, "strict": None}]])
def test_the_tools_of_a_chat_reach_its_template(tmp_path, given):
    """`strict: null`: a data set in columns gives every schema the keys of all others."""
    template = "{% for t in tools or [] %}<{{ t | tojson }}>{% endfor %}{% for m in messages %}{{ m.content }}|{% endfor %}"
    rows = [{"chat": [USER, ANSWER], "tools": given}, {"chat": [USER, ANSWER], "tools": None}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_tools, without = read_source(source_of(path, messages_column="chat", tools_column="tools"))
    assert (with_tools.tools, list(without.tools)) == ([SCHEMA], [])
    assert with_tools.id != without.id
    again = parse_document(document_line(with_tools))
    assert again == replace(with_tools, group=again.group)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    written = [tokenizer.decode(encoding.ids) for encoding in encode(tokenizer, [again, without])]
    assert [text.count('"sum"') for text in written] == [1, 0]
    assert written[0].endswith(written[1].removeprefix(tokenizer.bos_token or ""))


def test_tools_that_are_no_schemas_are_counted(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": [USER, ANSWER], "tools": t}) + "\n" for t in ("{sum}", "[]")))
    documents, left_out = counted(source_of(path, messages_column="chat", tools_column="tools"))
    assert len(documents) == 1
    assert left_out == {"tools that are no list of schemas": 1}


def test_a_prompt_of_several_columns_is_laid_out_by_a_template(tmp_path):
    rows = [
        {"q": "Why?", "more": None, "n": 3, "text": "So."},
        {"q": " ", "more": "", "n": None, "text": "x"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, left_out = counted(source_of(path, prompt_template="{q}{more} ({n}) {{}}: "))
    assert [d.prompt for d in documents] == ["Why? (3) {}: ", "  () {}: "]
    documents, left_out = counted(source_of(path, prompt_template="{q}{more}"))
    assert [(d.prompt, d.text) for d in documents] == [("Why?", "So.")]
    assert left_out == {"no prompt": 1}


def test_files_of_a_folder_can_be_grouped_by_the_top_folder(tmp_path):
    for name in ("a/x.py", "a/b/y.py", "c/z.py", "top.py"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(f"{name}\n")
    documents = list(read_source(Source(kind="folder", path=str(tmp_path / "src"), group_by_folder=True)))
    groups = {d.origin: d.group for d in documents}
    assert groups == {
        "src/a/x.py": "src/a", "src/a/b/y.py": "src/a", "src/c/z.py": "src/c", "src/top.py": "src/top",
    }  # fmt: skip
