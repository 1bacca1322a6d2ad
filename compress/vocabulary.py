"""A smaller vocabulary: which tokens texts need, and a tokenizer without the others.

Dropping tokens that no text has must not change how these texts are split. Unigram and WordPiece models
take the best or the longest of the tokens that fit: what was best stays best among fewer. A BPE model
merges pairs in a fixed order: it needs every pair that a kept token is merged from, and then merges the
same pairs, since none of those it lost was ever the next to merge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.core.documents import Document
from eval.core.documents.encoding import Learned, encode
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte that no other token holds, in models with `byte_fallback`
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates")
TOGETHER = 256  # documents that are tokenized in one call
LEARNED = Learned(end_of_answer=True)


def used_ids(tokenizer: PreTrainedTokenizerBase, documents: Iterable[Document]) -> set[int]:
    """The ids that documents are split into."""
    used: set[int] = set()
    for some in _together(documents):
        used.update(*(encoding.ids for encoding in encode(tokenizer, some, LEARNED)))
    return used


def _together(documents: Iterable[Document]) -> Iterator[list[Document]]:
    rest = iter(documents)
    return iter(lambda: list(islice(rest, TOGETHER)), [])


def needed_ids(content: dict[str, Any], used: Collection[int]) -> list[int]:
    """The ids of a tokenizer that must stay, ascending, for texts to be split into the ids `used` as before.

    These, what they are merged from, added tokens (special ones are among them), what spells any text
    (bytes, or single characters where there are none), and what stands for an unknown one.

    Args:
        content: of `tokenizer.json`.

    Raises:
        UserError: its model is none of `MODELS`.
    """
    model, ids = content["model"], token_ids(content)
    if model["type"] not in MODELS:
        fix = "leave the pass out of the recipe"
        raise UserError("vocabulary", f"a {model['type']} tokenizer, not {', '.join(MODELS)}", fix)
    kept = {*used, *(entry["id"] for entry in content["added_tokens"])}
    kept |= {i for token, i in ids.items() if BYTE.fullmatch(token)}
    if model["type"] == "Unigram":
        kept |= {model["unk_id"]} - {None}
    elif (unknown := model.get("unk_token")) in ids:
        kept.add(ids[unknown])
    sources: dict[int, set[int]] = {}
    if model["type"] == "BPE":
        for left, right, merged in merges_of(content):
            sources.setdefault(ids[merged], set()).update((ids[left], ids[right]))
    if not model.get("byte_fallback"):
        prefix = model.get("continuing_subword_prefix") or ""
        single = (i for token, i in ids.items() if len(token.removeprefix(prefix)) == 1)
        kept |= {i for i in ids.values() if i not in sources} if sources else {*single}
    waiting = list(kept)
    while waiting:
        new = sources.get(waiting.pop(), set()) - kept
        kept |= new
        waiting += new
    return sorted(kept)


def token_ids(content: dict[str, Any]) -> dict[str, int]:
    """Token -> id of the model of a tokenizer, without those that are only added."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {token: i for i, (token, _) in enumerate(vocabulary)}


def merges_of(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The pairs of a BPE model and what each is merged to, in order."""
    skipped = len(content["model"].get("continuing_subword_prefix") or "")
    for merge in content["model"]["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        yield left, right, left + right[skipped:]


def without_tokens(content: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The content of `tokenizer.json` with the ids `kept` alone, numbered from 0 in their order."""
    new = {old: i for i, old in enumerate(kept)}
    model, ids = content["model"], token_ids(content)
    changed = {**model}
    if isinstance(model["vocab"], dict):
        changed["vocab"] = {token: new[i] for token, i in ids.items() if i in new}
    else:
        changed["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in new]
        changed["unk_id"] = None if model["unk_id"] is None else new[model["unk_id"]]
    if model["type"] == "BPE":
        pairs = zip(model["merges"], merges_of(content), strict=True)
        changed["merges"] = [pair for pair, parts in pairs if all(ids[part] in new for part in parts)]
    added = [{**entry, "id": new[entry["id"]]} for entry in content["added_tokens"]]
    padding = content.get("padding")
    return {
        **content,
        "model": changed,
        "added_tokens": added,
        "padding": padding and {**padding, "pad_id": new[padding["pad_id"]]},
        "post_processor": _renumber(content.get("post_processor"), new),
    }


def _renumber(processor: Any, new: dict[int, int]) -> Any:
    """A post-processor, or a part of one, with the ids of its special tokens exchanged."""
    if isinstance(processor, list):
        return [_renumber(part, new) for part in processor]
    if not isinstance(processor, dict):
        return processor
    changed = {name: _renumber(part, new) for name, part in processor.items()}
    if isinstance(ids := processor.get("ids"), list):  # of TemplateProcessing
        changed["ids"] = [new[i] for i in ids]
    for name in ("sep", "cls"):  # of RobertaProcessing and BertProcessing: [token, id]
        if isinstance(pair := processor.get(name), list):
            changed[name] = [pair[0], new[pair[1]]]
    return changed


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, content: dict[str, Any], folder: Path) -> None:
    """Saves a tokenizer with the content of another `tokenizer.json`, as transformers loads it."""
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in FILES:  # lists of the old ids
            path.unlink()
    (folder / FILES[0]).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)
    settings["tokenizer_class"] = "TokenizersBackend"  # which splits as the file says, whatever the family
    (folder / FILES[1]).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def check_round_trip(
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    kept: list[int],
    documents: Iterable[Document],
) -> int:
    """Compares both tokenizers on documents: the same tokens, and the same texts of them; returns how many.

    Raises:
        UserError: a document is split otherwise.
    """
    place, count = {number: i for i, number in enumerate(kept)}, 0
    for some in _together(documents):
        pairs = zip(encode(old, some, LEARNED), encode(new, some, LEARNED), strict=True)
        for document, (before, after) in zip(some, pairs, strict=True):
            same = [place.get(i) for i in before.ids] == after.ids
            if not (same and old.decode(before.ids) == new.decode(after.ids)):
                problem = "it is split into other tokens without those that no document has"
                fix = "leave the pass out of the recipe for this tokenizer"
                raise UserError(f"vocabulary: document {document.id!r}", problem, fix)
        count += len(some)
    return count
