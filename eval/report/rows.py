"""The budget table of the page: one row per variant and target, which opens to its evidence.

A browser lays out a few hundred rows at once and no more. So the first ones are written out, and can be read
without a script; what follows lies beside them, compressed, and the script shows the part that is asked for.
"""

import base64
import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment

from eval.core.gate_file import GateFile, Variant
from eval.report import format as tables
from eval.report.evidence_pages import dossier
from eval.report.format import Cell
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS

Json = dict[str, Any]

WRITTEN = 100  # rows that stand in the page itself
RANKS = [PASS, INCONCLUSIVE, FAIL]
PACK = 50  # evidence that is unpacked together


@dataclass(frozen=True)
class Row:
    """One variant on one target; `place` is where it comes in the table."""

    variant: Variant
    place: int
    cells: list[Cell]
    costs: int  # how many of the cells are of cost

    @property
    def measured(self) -> list[Cell]:
        """The cells that hold something: those of cost come last, and hold nothing if it was not measured."""
        return self.cells if self.variant.cost else self.cells[: -self.costs]

    @property
    def keys(self) -> list[str | float | None]:
        """What each column is sorted by; None comes last."""
        figures = [None if cell.sort is None else float(f"{cell.sort:.6g}") for cell in self.cells]
        return [self.variant.recipe, self.variant.target, self.variant.verdict, *figures]


def titles(gate: GateFile) -> list[str]:
    names = map(tables.cost_title, tables.cost_names(gate))
    return ["variant", "target", "verdict", *tables.quality_titles(gate), *names]


def rows(gate: GateFile) -> list[Row]:
    """What is recommended first, then by target and verdict, then as in gate.json."""
    columns, targets = tables.cost_names(gate), list(gate.budget["targets"])
    order = {v.target: targets.index(v.target) for v in gate.variants}
    found = sorted(gate.variants, key=lambda v: (not v.recommended, order[v.target], RANKS.index(v.verdict)))
    return [
        Row(v, i, [*tables.quality_cells(gate, v), *tables.cost_cells(v, columns)], len(columns))
        for i, v in enumerate(found)
    ]


def packed(pieces: Iterable[str]) -> str:
    """A list of texts as base64 of gzip of JSON; the same texts give the same bytes."""
    text = json.dumps(list(pieces), ensure_ascii=False).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def table(gate: GateFile, environment: Environment) -> Json:
    """The rows that are written out, and what the script needs of all."""
    found, head = rows(gate), titles(gate)
    made: Any = environment.get_template("row.html.j2").make_module({"titles": head})
    rest = found[WRITTEN:]
    packs = (rest[i : i + PACK] for i in range(0, len(rest), PACK))
    return {
        "titles": head,
        "written": [made.row(row, dossier(gate, row.variant)) for row in found[:WRITTEN]],
        "data": {
            "keys": [row.keys for row in found],
            "rows": packed(made.row(row, "") for row in rest) if rest else "",
            "evidence": [packed(dossier(gate, row.variant) for row in pack) for pack in packs],
            "pack": PACK,
        },
    }
