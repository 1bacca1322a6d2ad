"""A run folder that can be released: real tiny models of the first seed, and records that fit them.

Not `run_builder.Run` alone, because a release loads and runs the models: their real bits must be in the records.
Three models are trained for ever longer: the base, the control and the student. Their bits are those of every
seed, with a little noise added; the teachers' are the base's and the student's. With `chat` every document is a
question, half of its text, and the answer, the other half, laid out by a template.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.method import make_method
from eval.core.artifacts import Key, build_artifact, read_manifest
from eval.core.documents import Document, collate, windows
from eval.core.records import CostRecord, Documents, write_record
from eval.core.sections import Source
from eval.core.study import Study
from eval.metrics.likelihood import document_bits
from tests.eval.run_builder import Run, tokenizer
from tests.helpers import text, tiny_model

CONTEXT = 64
RECIPES = {"small": ("torch", 1.0, 0.6), "half": ("torch", 0.2, 1.0)}
STEPS = {"B": 10, "S0": 16, "S1": 60}
LIKE = {"B": "B", "T0": "B", "CE": "S0", "S0": "S0", "S1": "S1", "T1": "S1"}
PARENTS = {"base-s0": "base/s0", "data": "data"}
SIZES = {"train": 24, "validation": 40, "far": 30}


TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_SOURCE = {"kind": "dataset", "path": "json", "messages_column": "messages"}


@cache
def words(chat: bool):
    words = tokenizer()
    words.chat_template = TEMPLATE if chat else None
    return words


@cache
def documents(split: str, chat: bool = False) -> list[Document]:
    """Two thirds code, one third prose; on the slice far the other way round."""
    start, length = {"train": 0, "validation": 100, "far": 200}[split], 30
    domains = [("prose", "code")[(i % 3 == 0) == (split == "far")] for i in range(SIZES[split])]
    texts = [(d, text(d, start + i, words=length + 10 * (i % 4))) for i, d in enumerate(domains)]
    plain = [Document(f"{split}{i}", domain, content) for i, (domain, content) in enumerate(texts)]
    return [in_two_turns(document) for document in plain] if chat else plain


def in_two_turns(document: Document) -> Document:
    half = len(document.text) // 2
    asked = [{"role": "user", "content": document.text[:half]}]
    return replace(document, prompt=asked, text=document.text[half:])


@cache
def trained(arm: str, chat: bool = False):
    torch.set_num_threads(1)
    model = tiny_model()
    rows = [row for d in documents("train", chat) for row in windows(words(chat), d, CONTEXT)]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(STEPS[arm]):
        batch = collate([rows[(8 * step + i) % len(rows)] for i in range(8)], 0)
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@cache
def bits(arm: str, split: str, chat: bool = False) -> tuple[list[float], list[int]]:
    model = trained(arm, chat)
    every = documents(split, chat)
    return document_bits(lambda batch: model(**batch.inputs).logits, every, words(chat), CONTEXT)


@dataclass
class RealRun(Run):
    """As `Run`, but a release can be built of it."""

    chat: bool = False

    @property
    def study(self) -> Study:
        study = super().study
        changes: dict[str, Any] = {"context": CONTEXT, "cluster": "none"}  # as its records have no clusters
        if self.chat:
            changes["documents"] = [Source(**CHAT_SOURCE)]
        few = study.cost.model_copy(update={"processes": 2})  # so often the loader of a release is started
        return study.model_copy(update={"data": study.data.model_copy(update=changes), "cost": few})

    def make(self) -> "RealRun":
        """As `Run.make`, with what is known of the method of the first seed's teacher."""
        super().make()
        method = make_method(self.study.method)
        parents = {role: read_manifest(self.path / place).hash for role, place in PARENTS.items()}
        facts = {"arm": "T1", "seed": 0, "recipe": "plain", "method": "ensemble", "files": method.files}
        key = Key("method", code={"method": "1", **method.code})
        with build_artifact(
            self.path / "method/T1/s0",
            kind="method",
            name="method/T1/s0",
            key=key,
            parents=parents,
            facts=facts,
        ):
            pass
        return self

    def artifact(self, place: str, parents: dict[str, str] | None = None, content: str = "") -> str:
        *_, arm, seed = [None, None, *place.replace("base", "B").split("/")]
        recipe = place.split("/")[1] if place.startswith("variants") else "plain"
        facts = {"arm": arm, "seed": 0, "recipe": recipe, "engine": "torch"} if seed == "s0" else {}
        if place == "students/S1/s0":
            facts["method"] = asdict(make_method(self.study.method).card)
        with build_artifact(
            self.path / place, kind="model", name=place, key=Key(place), parents=parents or {}, facts=facts
        ) as aside:
            if place == "data":
                for split in SIZES:
                    rows = [json.dumps(vars(d)) + "\n" for d in documents(split, self.chat)]
                    (aside / f"{split}.jsonl").write_text("".join(rows))
            elif seed == "s0":
                trained(LIKE[arm], self.chat).save_pretrained(aside)
                words(self.chat).save_pretrained(aside)
                (aside / "note").write_text(place)
            else:
                (aside / "model.safetensors").write_text(place)
        return read_manifest(self.path / place).hash

    def documents(self, arm: str, seed: int, retained: float) -> Documents:
        noise_rng = np.random.default_rng([seed, *map(ord, arm)])
        columns: dict[str, list] = {name: [] for name in ("id", "slice", "bytes", "tokens", "bits")}
        for split in ("validation", "far"):
            model_bits, tokens = bits(LIKE[arm], split, self.chat)
            control, _ = bits("S0", split, self.chat)
            for d, b, c, t in zip(documents(split, self.chat), model_bits, control, tokens, strict=True):
                noise = noise_rng.normal(0, 0.005) * d.bytes if seed else 0.0
                values = (d.id, split, d.bytes, t, c + retained * (b - c) + noise)
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
        return Documents(**columns)

    def fallback_cost(self) -> Path:
        """The base's cost, of the same rounds as the others."""
        plain = self.path / "records/cost/cpu/plain/S1-s0.json"
        record = CostRecord.model_validate_json(plain.read_text())
        base = read_manifest(self.path / "base/s0")
        moved = record.provenance.model_copy(update={"artifact": base.hash})
        changes = {"arm": "B", "provenance": moved, "disk_bytes": base.bytes}
        return write_record(self.path, record.model_copy(update=changes))
