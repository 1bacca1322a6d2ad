"""Chats: laid out by the template of a tokenizer, and where their answers stand in that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from itertools import takewhile
from typing import Any, Literal, Protocol

from eval.core.errors import UserError

DAY = datetime(2024, 7, 26)  # for chat templates that print one: rows must be the same tomorrow
MARK = chr(0x10F000)  # a private character, which no template changes: it stands in the place of a turn

Answer = tuple[int, int | None]  # characters from where to where; None: to the end
Answers = list[Answer]
Chat = list[dict[str, Any]]
Read = Callable[..., str]  # turns -> what the template writes


class Readable(Protocol):
    """What is read of a document."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def prompt(self) -> str | list[dict[str, str]]: ...
    @property
    def tools(self) -> Sequence[dict[str, Any]]: ...
    @property
    def calls(self) -> Sequence[dict[str, Any]]: ...
    @property
    def label(self) -> int | None: ...


class ChatRefused(UserError):
    """A chat that a template does not lay out; `problem` is one for all that fail alike."""


def parse_arguments(calls: Any) -> Any:
    """Calls of tools with arguments that are objects: a template would write a string of JSON as a string."""
    if isinstance(calls, list):
        return [parse_arguments(call) for call in calls]
    if not isinstance(calls, dict):
        return calls
    parsed = {name: parse_arguments(part) if name == "function" else part for name, part in calls.items()}
    if isinstance(arguments := parsed.get("arguments"), str):
        with suppress(ValueError, RecursionError):
            parsed["arguments"] = json.loads(arguments)
    return parsed


def is_list_of_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(isinstance(call, dict) for call in calls)


def read_answer(turn: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The text of a chat's last turn, and the calls of tools that it ends with; their JSON ends the text."""
    calls = turn.get("tool_calls", [])
    return turn["content"] + _calls_as_text(calls), calls


def _calls_as_text(calls: Sequence[dict[str, Any]]) -> str:
    return json.dumps(list(calls), ensure_ascii=False) if calls else ""


def _answer_turn(document: Readable) -> dict[str, Any]:
    """The last turn of a chat, as `read_answer` read it."""
    content = document.text.removesuffix(_calls_as_text(document.calls))
    called = {"tool_calls": list(document.calls)} if document.calls else {}
    return {"role": "assistant", "content": content, **called}


def lay_out(
    tokenizer,
    document: Readable,
    turns: Literal["last", "all"] = "last",
    change: Callable[[Any], Any] = lambda value: value,
) -> tuple[str, Answers]:
    """A chat as the tokenizer's own template writes it, and where its answers stand in that.

    An answer is what the template adds to the turns before it. Some write a turn otherwise once others
    follow, as Qwen3 does with thoughts: all answers are then what `{% generation %}` marks in the whole chat,
    and without such marks what stands there in the place of each turn, with the end that the last one has.

    Args:
        change: is applied to every turn and to the tools before.

    Raises:
        UserError: there is no template.
        ChatRefused: it fails, or where it writes an answer cannot be told.
    """
    thing = f"document {document.id!r}"
    if tokenizer.chat_template is None:
        fix = "take an instruction-tuned base, or give a prompt column in place of messages"
        raise UserError(thing, "a chat, and the tokenizer has no chat template", fix)
    assert not isinstance(document.prompt, str)
    chat = change([*document.prompt, _answer_turn(document)])
    tools = change(list(document.tools)) or None
    read = partial(_write_chat, tokenizer, thing, tools=tools)
    whole, last = read(chat), len(chat) - 1
    chosen = [i for i in range(1, last) if turns == "all" and chat[i]["role"] == "assistant"]
    found = [_added(read, chat, whole, i) for i in [*chosen, last]]
    if None in found and turns == "all" and (marked := _generated(tokenizer, thing, chat, tools)):
        found = list(marked)
    elif None in found:
        pairs = zip([*chosen, last], found, strict=True)
        found = [answer or _in_place(read, chat, whole, i) for i, answer in pairs]
    answers = [answer for answer in found if answer is not None]
    if len(answers) < len(found):
        problem = "where the chat template writes an answer cannot be told"
        raise ChatRefused(thing, problem, "give a prompt column in place of messages")
    if any(str(_function_name(call)) not in whole[answers[-1][0] :] for call in document.calls):
        fix = "take a base whose template writes them"
        raise ChatRefused(thing, "the chat template does not write the calls of tools", fix)
    return whole, answers


def _added(read: Read, chat: Chat, whole: str, i: int) -> Answer | None:
    """What turn `i` adds to the turns before it; None: the template rewrites those, or the turn later."""
    before = read(chat[:i], add_generation_prompt=True)
    if i == len(chat) - 1:
        return (len(before), None) if whole.startswith(before) else None
    through = read(chat[: i + 1])
    return (len(before), len(through)) if whole.startswith(before) and whole.startswith(through) else None


def _generated(tokenizer, thing: str, chat: Chat, tools: Any) -> Answers:
    """What a template marks as written by the assistant; empty where it marks nothing."""
    template = tokenizer.get_chat_template(tools=tools)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):  # as transformers looks for it
        return []
    from transformers.utils.chat_template_utils import render_jinja_template  # seconds to import

    names = {**tokenizer.special_tokens_map, "strftime_now": DAY.strftime}
    with _refused_by_template(thing):
        options = {"chat_template": template, "return_assistant_tokens_mask": True}
        _, (spans,) = render_jinja_template([chat], tools=tools, **options, **names)
    return spans


def _in_place(read: Read, chat: Chat, whole: str, i: int) -> Answer | None:
    """What stands in the place of turn `i`, with its end; None: what is around it depends on the turn."""
    around, last = _around(read, chat, i), _around(read, chat, len(chat) - 1)
    if around is None or last is None:
        return None
    (before, after), (_, end) = around, last
    start, stop = len(before), len(whole) - len(after)
    if not (start <= stop and whole.startswith(before) and whole.endswith(after)):
        return None
    same = takewhile(lambda pair: pair[0] == pair[1], zip(after, end, strict=False))
    return start, None if i == len(chat) - 1 else stop + len(list(same))


def _around(read: Read, chat: Chat, i: int) -> tuple[str, str] | None:
    """What a template writes before and after the place of turn `i`; None: it does not write it once."""
    parts = read([*chat[:i], {"role": "assistant", "content": MARK}, *chat[i + 1 :]]).split(MARK)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _function_name(call: dict[str, Any]) -> Any:
    function = call.get("function", call)
    return function.get("name") if isinstance(function, dict) else function


def _write_chat(tokenizer, thing: str, chat: Chat, **settings: Any) -> str:
    with _refused_by_template(thing):
        return tokenizer.apply_chat_template(chat, tokenize=False, strftime_now=DAY.strftime, **settings)


@contextmanager
def _refused_by_template(thing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program of others: it may raise anything
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        fix = "leave the chat out, or take a base whose template accepts it"
        raise ChatRefused(thing, f"the chat template raises: {cause}", fix) from error
