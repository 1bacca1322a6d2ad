"""New documents, and what release, control and fallback say of them and said of the study's."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from eval.core.artifacts import MANIFEST, file_sha256, read_manifest
from eval.core.checks import CONTROL, FALLBACK, STUDENT, find_positions
from eval.core.documents import (
    TEST,
    Document,
    cluster_names,
    json_objects,
    part_of_test,
    tokens_per_batch,
)
from eval.core.documents.chats import is_list_of_calls, parse_arguments, read_answer
from eval.core.documents.encoding import text_ids
from eval.core.errors import UserError, first_error, require_one_of
from eval.core.records import PLAIN, Documents, each_score
from eval.core.study import load_study
from eval.engines import load_engine, load_tokenizer, subject_of
from eval.release.contract_file import Bits, Contract, Target
from eval.release.reference import Reference
from eval.stats.drift import Array, surprise
from eval.watch.history import Look, Seen, drift_values, previous_hash, summed

KEYS = ["id", "domain", "group", "text", "prompt", "messages", "tools"]  # of a line of new documents
TURN_KEYS = ["role", "content", "tool_calls", "tool_call_id", "name"]
TUNED = 4  # times the documents of the first look: where the bounds are narrowest


def read_new(path: Path, limit: int) -> list[Document]:
    """The documents of a JSONL file, texts without a prompt cut to `limit` bytes as those of the study were.

    Raises:
        UserError: a line is no document or holds a key that is not known, an id or a text appears twice, or
            there is none at all.
    """
    rows = json_objects(path, "--data", 'give a JSONL of documents, {"text": "..."} a line')
    documents = [_document(where, row, number, limit) for where, number, row in rows]
    name, times = Counter(document.id for document in documents).most_common(1)[0]
    if times > 1:
        raise UserError(f"--data {path}", f"id {name!r} appears {times} times", "give each document its own")
    same, times = Counter(map(_content, documents)).most_common(1)[0]
    if times > 1:
        problem = f"{same[:40]!r}... is {times} documents, as far as they are read"
        raise UserError(f"--data {path}", problem, "give each text once: copies are no evidence")
    return documents


def _document(where: str, row: dict[str, Any], number: int, limit: int) -> Document:
    for key in row:
        require_one_of(f"{where}: key", key, KEYS)
    prompt: str | list[dict[str, Any]] = ""
    calls: list[dict[str, Any]] = []
    if "messages" in row:
        if "text" in row or "prompt" in row:
            raise UserError(where, "messages beside a text or a prompt", "give the messages alone")
        prompt, text, calls = _last_answer(where, row["messages"])
    else:
        text, prompt = _text(where, row, "text"), _text(where, row, "prompt") if "prompt" in row else ""
    if not prompt:  # an answer to a prompt is not cut
        text = text.encode()[:limit].decode(errors="ignore")
    tools = row.get("tools") or []
    if not isinstance(tools, list) or (tools and not isinstance(prompt, list)):
        raise UserError(
            where, f"tools {tools!r}"[:60], "give `tools` beside `messages`: a list of JSON schemas"
        )
    domain, group = str(row.get("domain", "")), str(row.get("group", ""))
    return Document(str(row.get("id", number)), domain, text, prompt, group, tools=tools, calls=calls or ())


def _text(where: str, row: dict[str, Any], key: str) -> str:
    if not isinstance(text := row.get(key), str) or not text.strip():
        raise UserError(where, repr(text)[:60], f"give each line a `{key}` that is not empty")
    return text.encode(errors="replace").decode()  # half of a surrogate pair is a "?"


def _last_answer(where: str, messages: Any) -> tuple[list[dict[str, Any]], str, list[dict[str, Any]]]:
    """The turns of a chat before its last answer, its text, and the calls of tools that it ends with."""
    turns = messages if isinstance(messages, list) else []
    known = all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in turns)
    if not known or len(turns) < 2 or turns[-1]["role"] != "assistant":
        fix = "give turns with `role` and `content`, of which the last is an answer of the assistant"
        raise UserError(where, f"messages {messages!r}"[:60], fix)
    return [_turn(where, turn) for turn in turns[:-1]], *read_answer(_turn(where, turns[-1]))


def _turn(where: str, turn: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in turn.items() if value is not None}
    for key in given:
        require_one_of(f"{where}: key of a turn", key, TURN_KEYS)
    if given.get("tool_calls"):
        given["tool_calls"] = parse_arguments(given["tool_calls"])
        if not is_list_of_calls(given["tool_calls"]):
            problem = f"tool_calls {given['tool_calls']!r}"[:60]
            raise UserError(where, problem, "give a list of objects, as OpenAI's interface does")
        if not given.get("content"):
            return {**given, "content": ""}
    return {**given, "content": _text(where, turn, "content")}


def _content(document: Document) -> str:
    """What a document is known by: its text, and what comes before that; a blank at an end makes no other."""
    if not document.prompt:
        return document.text.strip()
    return json.dumps([document.prompt, document.text.strip(), *([document.tools] if document.tools else [])])


def check_prompts(release: Path, name: str, documents: list[Document]) -> None:
    """New documents are of the kind that the verdict was of: texts, or answers to what comes before them.

    Raises:
        UserError: some have a prompt where none of the study's had, or none where each had one.
    """
    data = load_study(release / "evidence" / "study.yaml").data
    sources = data.shifted.get(name, data.documents)
    asked = {bool(s.prompt_column or s.prompt_template or s.messages_column) for s in sources}
    odd = [document.id for document in documents if bool(document.prompt) not in asked]
    if odd:
        this, verdict, fix = "no prompt", "had one", "`prompt` with `text`, or `messages`"
        if asked == {False}:
            this, verdict, fix = "a prompt", "had none", "`text` alone"
        problem = f"{this}; the documents of the verdict {verdict}"
        raise UserError(f"--data: document {odd[0]!r}", problem, f"give each line {fix}")


@dataclass(frozen=True)
class Scored:
    """What one model says of the new documents."""

    bits: Array
    tokens: Array


def scored(folder: Path, documents: list[Document], context: int) -> Scored:
    from eval.metrics.likelihood import BATCH_TOKENS, document_bits  # torch: not for --help

    engine = load_engine(subject_of(read_manifest(folder)).engine, folder)
    size = min(BATCH_TOKENS, tokens_per_batch(engine.vocabulary))
    bits, tokens = document_bits(engine.logits, documents, engine.tokenizer, context, size)
    return Scored(np.asarray(bits), np.asarray(tokens, float))


def of_slice(documents: Documents, name: str, first: Documents) -> tuple[Array, Array, Array]:
    """Bits, tokens and bytes of one slice of a score record, [C] each, in the order of the `first` one."""
    indices = [i for i in find_positions(first, documents) if documents.slice[i] == name]
    columns = (documents.bits, documents.tokens, documents.bytes)
    bits, tokens, size = (np.asarray([column[i] for i in indices], float) for column in columns)
    return bits, tokens, size


def released(release: Path, shipped: Target, name: str) -> tuple[Bits, Array, list[str]]:
    """Bits of the three models on the study's documents of a slice; the fallback's tokens; their clusters."""
    kind: Literal["test", "score"] = "test" if name.partition("/")[0] == TEST else "score"
    records = {(r.arm, r.recipe): r.documents for r in each_score(release / "evidence", kind)}
    models = [(STUDENT, shipped.recipe), (CONTROL, shipped.recipe), (FALLBACK, PLAIN)]
    first = records[models[0]]
    (ours, _, size), (control, *_), (base, tokens, _) = (of_slice(records[m], name, first) for m in models)
    clusters = [cluster for cluster, of in zip(first.clusters, first.slice, strict=True) if of == name]
    return Bits(ours, control, base, size), tokens, clusters


def released_by_cluster(release: Path, shipped: Target, name: str) -> Bits:
    """Bits of the three models by cluster, as the contract was made."""
    bits, _, clusters = released(release, shipped, name)
    return bits.by_cluster(clusters)


def reference_of(release: Path) -> Reference:
    path = release / "evidence" / "reference.json"
    try:
        return Reference.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise first_error(f"reference {path}", error, "make the release again") from error


@dataclass(frozen=True)
class Before:
    """What was measured when it was released: on the test documents, once they were opened for this variant.

    The variant was picked on the validation documents, and is a little too good there.
    """

    slice: str
    documents: int
    bits: Bits  # by cluster, as the contract was made
    values: dict[str, Array]  # one per cluster for the questions of `eval.stats.drift`


def before_release(release: Path, shipped: Target, name: str) -> Before:
    reference = reference_of(release)
    require_one_of("--slice", name, sorted(set(shipped.gain) & set(reference.unigram)))
    opened = release / "evidence" / "records" / "test" / shipped.recipe
    known = part_of_test(name) if opened.is_dir() and part_of_test(name) in reference.unigram else name
    bits, tokens, clusters = released(release, shipped, known)
    values = drift_values(bits, tokens, reference.unigram[known], clusters)
    return Before(known, len(clusters), summed(bits, clusters), values)


def text_id(document: Document) -> str:
    """What a history knows a document by."""
    return hashlib.sha256(_content(document).encode()).hexdigest()[:16]


def groups_of(documents: Sequence[Document], kind: str, earlier: Collection[str]) -> list[str]:
    """The group of each new document: those of one are not independent, by the rule of the study.

    Args:
        kind: of the clusters of the study's slice. Where it is `domain`, and documents of more than one came,
            the group is the domain; else it is what the line names, or the document alone.
        earlier: the domains of all looks before.
    """
    named = [replace(one, id=text_id(one)) for one in documents]
    by_domain = cluster_names(named, kind if kind == "domain" else "none", earlier)
    return [
        (one.group or name) if name == one.id else name for one, name in zip(named, by_domain, strict=True)
    ]


def cluster_kind(release: Path, name: str) -> str:
    """What the documents of a slice of the release's study were not independent by."""
    return load_study(release / "evidence" / "study.yaml").data.cluster_of(name)


def notes_on_groups(kind: str, documents: Sequence[Document]) -> list[str]:
    """What is to be said where the new documents do not name the clusters that the study had."""
    if kind not in ("group", "source") or any(one.group for one in documents):
        return []
    return [f"the study judged documents by {kind}, and no new one has a `group`: each counts as independent"]


def see(
    release: Path,
    contract: Contract,
    shipped: Target,
    name: str,
    documents: list[Document],
    looks: Sequence[Look] = (),
) -> Seen:
    """The new documents of a slice as the release, its control and its fallback find them, after `looks`."""
    reference, context = reference_of(release), contract.inputs.context_tokens
    folders = [f"variants/{shipped.recipe}", f"evidence/control/{shipped.recipe}", "fallback"]
    ours, control, base = (scored(release / folder, documents, context) for folder in folders)
    tokenizer = load_tokenizer(release / "fallback")
    earlier = {domain for look in looks for domain in look.seen.domain}
    return Seen(
        id=[text_id(document) for document in documents],
        domain=[document.domain for document in documents],
        group=groups_of(documents, cluster_kind(release, name), earlier),
        bytes=[document.bytes for document in documents],
        tokens=[int(count) for count in base.tokens],
        unigram=[
            surprise(reference.counts, reference.vocabulary, text_ids(tokenizer, document.text))
            for document in documents
        ],
        release=ours.bits.tolist(),
        control=control.bits.tolist(),
        fallback=base.bits.tolist(),
    )


def by_group(seen: Seen) -> tuple[Bits, dict[str, Array]]:
    """Bits of the new documents, summed by group, and the values of drift, one per group."""
    bits = Bits(*(np.asarray(c, float) for c in (seen.release, seen.control, seen.fallback, seen.bytes)))
    values = drift_values(bits, np.asarray(seen.tokens, float), seen.unigram, seen.groups)
    return summed(bits, seen.groups), values


def new_look(
    looks: list[Look], release: Path, contract: Contract, target: str, name: str, seen: Seen
) -> Look:
    """The next line of a history; what it says is filled in once it was judged with all before it."""
    return Look(
        number=len(looks) + 1,
        previous=previous_hash(looks),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        release=file_sha256(release / MANIFEST),
        contract=contract.name,
        target=target,
        slice=name,
        tuned=looks[0].tuned if looks else float(TUNED * len(seen.id)),
        seen=seen,
        state="",
        reason="",
    )
