"""One row of a source as a document: a text, an answer after a prompt, or the last answer of a chat."""

import json
from collections.abc import Sequence
from string import Formatter
from typing import Any, NamedTuple

from distill.data.files import MARK, UNDECODABLE, RawRow, Unusable
from eval.core.artifacts import text_sha256
from eval.core.documents import Document
from eval.core.documents.chats import is_list_of_calls, parse_arguments, read_answer
from eval.core.sections import Source

SPEAKERS = {  # of ShareGPT's form, by the roles of OpenAI's
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
CALLS = ("tool_calls", "tool_call_id", "name")  # parts of a turn that a template may read too
ID_DIGITS = 16  # of a SHA-256, in hexadecimal: two of 10 million documents share them once in 400,000 corpora
EMPTY_FILE = "an empty file"  # it holds nothing that could be used
NO_TEXT, NO_PROMPT, NOT_A_TEXT = "no text", "no prompt", "not a text"
NO_TURNS, EMPTY_TURN = "no turns of a role and its text", "an empty turn"
NO_TOOLS, NO_CALLS = "tools that are no list of schemas", "calls of tools that are no list of objects"
NO_ANSWER, NO_QUESTION = "no answer at the end", "nothing before the answer"
Turn = dict[str, Any]


class Raw(NamedTuple):
    """A row as it was found."""

    origin: str  # the file and its line, or whatever else names it to a reader
    row: RawRow
    domain: str
    group: str = ""
    folder: str = ""  # the name of the one that a file lies in


def content_hash(text: str, prompt: str | list[Turn] = "", tools: Sequence[dict[str, Any]] = ()) -> str:
    """SHA-256 of a text with its prompt and the tools that it may call."""
    return text_sha256(json.dumps([prompt, text, *([tools] if tools else [])]) if prompt else text)


def make_document(source: Source, raw: Raw, labels: Sequence[str] = ()) -> Document:
    """The document of a row; its id is the start of the hash of its content, or its `id_column`.

    Args:
        labels: the classes that it may be of; none: texts have no labels.

    Raises:
        Unusable: with the reason.
    """
    row = raw.row
    if isinstance(row, Unusable):
        raise row
    for column in required_columns(source):
        if column not in row:
            raise Unusable(f"no column {column!r}")
    prompt: str | list[Turn] = ""
    tools: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    if source.messages_column:
        prompt, text, calls = split_chat(row[source.messages_column])
        tools = read_tools(row[source.tools_column]) if source.tools_column else []
    else:
        text = require_text(row[source.text_column], NO_TEXT)
        if source.text_after is not None:
            text = require_text(text.partition(source.text_after)[2], NO_TEXT)
        if source.prompt_column:
            prompt = require_text(row[source.prompt_column], NO_PROMPT)
        elif source.prompt_template:
            prompt = require_text(fill(source.prompt_template, row), NO_PROMPT)
    check_characters(json.dumps([prompt, text, tools], ensure_ascii=False) if prompt else text)
    domain = raw.domain if source.domain_column is None else _as_name(row[source.domain_column]) or "none"
    group = raw.group if source.group_column is None else _as_name(row[source.group_column])
    name = _as_name(row[source.id_column]) if source.id_column else ""
    name = name or content_hash(text, prompt, tools)[:ID_DIGITS]
    label = find_label(source, raw, row, labels) if labels else None
    group = group or name
    return Document(
        name, domain, text, prompt, group, raw.origin, tools=tools, calls=calls or (), label=label
    )


def find_label(source: Source, raw: Raw, row: dict[str, Any], labels: Sequence[str]) -> int:
    """Number of the class of a row: that of its source, of its column or of its folder.

    Raises:
        Unusable: it has another one.
    """
    name = source.label or (_as_name(row[source.label_column]) if source.label_column else raw.folder)
    if name not in labels:
        raise Unusable(f"a label that is none of {', '.join(labels)}")
    return labels.index(name)


def required_columns(source: Source) -> list[str]:
    """Columns without which no document can be made of a row of `source`."""
    columns = [source.messages_column or source.text_column, source.prompt_column, source.domain_column]
    columns += [
        source.group_column,
        source.id_column,
        source.label_column,
        source.tools_column,
        *template_columns(source.prompt_template or ""),
    ]
    return [column for column in columns if column]


def template_columns(template: str) -> list[str]:
    """Names in braces; `{{` stands for a brace."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def fill(template: str, row: dict[str, Any]) -> str:
    """The template with columns of the row in place of their names; null is an empty text."""
    parts = (
        (text, "" if name is None or row[name] is None else str(row[name]))
        for text, name, _, _ in Formatter().parse(template)
    )
    return "".join(text + value for text, value in parts)


def _as_name(value: Any) -> str:
    """A text, a number or a list as a name; null is none."""
    if value is None:
        return ""
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)


def require_text(text: Any, reason: str) -> str:
    """`text`, where it is one and not blank; else `Unusable(reason)`."""
    if text is not None and not isinstance(text, str):
        raise Unusable(NOT_A_TEXT)
    if text is None or not text.strip():
        raise Unusable(reason)
    return text


def check_characters(text: str) -> None:
    """Refuses what was read in the wrong encoding: bytes left over, lone surrogates, NUL characters."""
    if MARK in text or "\0" in text or not _is_encodable(text):
        raise Unusable(UNDECODABLE)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_chat(messages: Any) -> tuple[list[Turn], str, list[Turn]]:
    """The turns before the last answer, the text of that answer, and the calls of tools that it ends with.

    Turns are of OpenAI's form, with `role` and `content`, or of ShareGPT's, with `from` and `value`. A system
    turn without a text says nothing and is left out.

    Raises:
        Unusable: there are no such turns, the last one is no answer, or a turn is empty.
    """
    if not isinstance(messages, list) or not messages:
        raise Unusable(NO_TURNS)
    turns = [turn for message in messages if (turn := _turn(message)) is not None]
    if not turns or turns[-1]["role"] != "assistant":
        raise Unusable(NO_ANSWER)
    if len(turns) < 2:
        raise Unusable(NO_QUESTION)
    return turns[:-1], *read_answer(turns[-1])


def _turn(message: Any) -> Turn | None:
    """One turn with `role` and `content`; None for a system turn without a text."""
    if not isinstance(message, dict):
        raise Unusable(NO_TURNS)
    role, content = message.get("role"), message.get("content")
    if "role" not in message:
        role, content = SPEAKERS.get(str(message.get("from")).lower()), message.get("value")
    if not isinstance(role, str):
        raise Unusable(NO_TURNS)
    turn: Turn = {"role": role, "content": _content(content)}
    turn |= {key: _drop_nulls(message[key]) for key in CALLS if message.get(key)}
    if "tool_calls" in turn:
        turn["tool_calls"] = parse_arguments(turn["tool_calls"])
        if not is_list_of_calls(turn["tool_calls"]):
            raise Unusable(NO_CALLS)
    if turn["content"].strip() or turn.get("tool_calls"):
        return turn
    if turn["role"] == "system":
        return None
    raise Unusable(EMPTY_TURN)


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """The tools of a chat: a list of JSON schemas, the JSON of one, or null for none.

    Raises:
        Unusable: it is none of these.
    """
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except (ValueError, RecursionError):
        raise Unusable(NO_TOOLS) from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(NO_TOOLS)
    return _drop_nulls(tools)


def _drop_nulls(value: Any) -> Any:
    """Without the keys that are null: a data set in columns gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: _drop_nulls(part) for key, part in value.items() if part is not None}
    return [_drop_nulls(part) for part in value] if isinstance(value, list) else value


def _content(content: Any) -> str:
    """The text of a turn: a text, null, or a list of parts that are texts."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
    if not isinstance(content, str):
        raise Unusable(NOT_A_TEXT)
    return content
