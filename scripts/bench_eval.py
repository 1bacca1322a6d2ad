"""How fast is the evidence? `python -m scripts.bench_eval [gate] [scoring] [--json FILE]`.

gate: time and peak memory of `python -m eval.gate` over 5 seeds, 20 variants and 10,000 documents, the whole
command with its start. Asked: under 5 seconds and 1 GB. scoring: tokens per second of scoring, as a share of
those of a bare forward loop at its best batch size. Asked: 0.9 and more.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from eval.core.commands import add_json, write_json
from eval.core.errors import entry, require_one_of

Rows = list[dict[str, object]]


def gate() -> Rows:
    from scripts.bench_gate import gate_rows

    return gate_rows()


def scoring() -> Rows:
    from scripts.bench_scoring import scoring_rows

    return scoring_rows()


PARTS: dict[str, Callable[[], Rows]] = {"gate": gate, "scoring": scoring}


def build_table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table


@entry
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_eval", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"what to measure: {', '.join(PARTS)}; default: all")
    add_json(parser)
    args = parser.parse_args()
    names = [require_one_of("part", name, list(PARTS)) for name in args.parts] or list(PARTS)
    result = {}
    for name in names:
        result[name] = PARTS[name]()
        Console().print(build_table(name, result[name]))
    write_json(args.json, result)


if __name__ == "__main__":
    main()
