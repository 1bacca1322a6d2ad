"""The rows of a challenge: one change of a study each, as overrides of its keys, the cheapest first."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.core.errors import UserError
from eval.core.study import Study, load_study

SAME, PLACEBO, DAMAGED = "as_it_is", "placebo", "damaged"
RATES = {"half_rate": 0.5, "double_rate": 2.0}
NAME = "[a-z0-9_]+"
OTHER_SEEDS, MORE_SEEDS = 1000, 2  # added to every seed; beside those of the study
DOSES = [{"kind": "typos", "strength": strength} for strength in (0.01, 0.03, 0.1)]


@dataclass(frozen=True)
class Row:
    """A study again with `words` on its command line; `trains` says what of it is trained anew."""

    name: str  # of its run folder
    what: str  # is changed
    words: tuple[str, ...] = ()
    trains: int = 0  # 0: nothing; 1: students; 2: teachers; 3: bases

    def study(self, source: Path, runs: Path) -> Study:
        """The changed study. It has no recipe and no arm: what is challenged is the plain student."""
        words = [*self.words, "--recipes=[]", "--arms={}", "--runs", str(runs), "--name", self.name]
        return load_study(source, words)


def plan_rows(study: Study, extra: list[str]) -> tuple[list[Row], dict[str, str]]:
    """The rows, the cheapest first, and of what cannot be tried the reason.

    Args:
        extra: rows of the user's own: `name=--KEY VALUE ...`.

    Raises:
        UserError: one of these has another form, or a name that is taken.
    """
    skipped: dict[str, str] = {}
    rows = [
        Row(SAME, "as it is"),
        *_damage(study, skipped),
        *_rates(study),
        *_less_data(study, skipped),
        *_seeds(study),
    ]
    rows.append(Row(PLACEBO, "a method that changes nothing", ("--method", "{name: placebo}"), 2))
    rows += [*_parts(study, skipped), *_sizes(study, skipped)]
    if study.base.architecture is None:
        skipped["another base"] = "give one: --row 'other_base=--base.path PATH'"
    skipped["other data of the same domain"] = "give some: --row 'other_data=--data.documents [...]'"
    rows += own_rows(extra, {row.name for row in rows})
    return sorted(rows, key=lambda row: row.trains), skipped


def own_rows(texts: list[str], taken: Iterable[str] = ()) -> list[Row]:
    """Rows of the user's own: `name=--KEY VALUE ...` each.

    Raises:
        UserError: one has another form, or a name that is taken.
    """
    rows: list[Row] = []
    for text in texts:
        name, _, words = text.partition("=")
        names = {*taken, *(row.name for row in rows)}
        if not re.fullmatch(NAME, name) or not words.startswith("--") or name in names:
            problem = f"found {text!r}, expected a new name of a-z, 0-9 and _, then = and keys of the study"
            raise UserError("--row", problem, "write it like --row 'long=--train.epochs 4'")
        keys = [word.partition(" ") for word in re.split(r"\s+(?=--)", words.strip())]
        rows.append(Row(name, words, tuple(f"{key}={value}" for key, _, value in keys), 3))
    return rows


def _flags(values: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        word
        for key, value in values.items()
        for word in (f"--{key}", yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip())
    )


def _rates(study: Study) -> Iterator[Row]:
    sections = {"train": study.train} | ({"ce_train": study.ce_train} if study.ce_train else {})
    for name, factor in RATES.items():
        values = {
            f"{section}.optimizer.{key}": factor * rate
            for section, train in sections.items()
            for key in ("lr", "lr_rest")
            if (rate := getattr(train.optimizer, key)) is not None
        }
        yield Row(name, f"learning rate x {factor:g}", _flags(values), 1)


def _damage(study: Study, skipped: dict[str, str]) -> Iterator[Row]:
    """Its own corruptions are scored with the study as it is."""
    if study.teacher is not None and study.teacher.file is not None:
        skipped["damaged documents"] = (
            "the teacher's answers lie in a file: put data.corruptions into the study"
        )
    elif not study.data.corruptions:
        yield Row(DAMAGED, "validation documents with typos", _flags({"data.corruptions": DOSES}))


def _less_data(study: Study, skipped: dict[str, str]) -> Iterator[Row]:
    count = study.data.train_rows
    sections = (study.train, study.ce_train, study.base.train)
    least = max(train.rows for train in sections if train is not None)
    if count == "all" or count // 2 < least:
        skipped["half of the data"] = f"data.train_rows is {count}: give --row 'less=--data.train_rows N'"
    else:
        yield Row("half_data", f"{count // 2} training rows", _flags({"data.train_rows": count // 2}), 3)


def _seeds(study: Study) -> Iterator[Row]:
    others = [seed + OTHER_SEEDS for seed in study.seeds]
    what = "other bases, teachers and orders" if study.base.architecture else "other orders and teachers"
    yield Row("other_seeds", f"{what}: seeds {others}", _flags({"seeds": others}), 3)
    more = [*study.seeds, *(max(study.seeds) + 1 + i for i in range(MORE_SEEDS))]
    yield Row("more_seeds", f"{len(more)} seeds", _flags({"seeds": more}), 3)


def _parts(study: Study, skipped: dict[str, str]) -> Iterator[Row]:
    """One part of the method less: a member of an ensemble; in a chain, each method alone under test."""
    settings = study.method.settings
    members, methods = settings.get("members"), settings.get("methods")
    if isinstance(methods, list):
        for place, part in enumerate(methods):
            name = part.get("name", place) if isinstance(part, dict) else part
            words = _flags({"method.settings.tested": place})
            yield Row(f"only_part_{place}", f"{name} alone under test: T0 has the others", words, 2)
    elif isinstance(members, int) and members > 2:
        words = _flags({"method.settings.members": members - 1})
        yield Row("member_less", f"{members - 1} members", words, 2)
    else:
        skipped["a part left out"] = (
            "the method has no parts that are known here: --row 'less=--method.settings...'"
        )


def _sizes(study: Study, skipped: dict[str, str]) -> Iterator[Row]:
    layers = (study.base.architecture or {}).get("num_hidden_layers")
    if not isinstance(layers, int):
        skipped["another size"] = "the base is a trained model: --row 'smaller=--base.path PATH'"
        return
    key = "base.architecture.num_hidden_layers"
    if layers > 1:
        yield Row("half_depth", f"depth {layers // 2} in place of {layers}", _flags({key: layers // 2}), 3)
    yield Row("double_depth", f"depth {2 * layers} in place of {layers}", _flags({key: 2 * layers}), 3)
