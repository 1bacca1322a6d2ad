"""The one-file HTML report: what the template needs, in the order of the page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval import plots, tables
from eval.artifacts import MANIFEST, read_manifest
from eval.records import HELDOUT
from eval.tables import Cell
from eval.verdict import GateFile, Variant

Json = dict[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
HEADLINES = {
    "PASS": "May ship",
    "FAIL": "Must not ship",
    "INCONCLUSIVE": "Not decided: more evidence is needed",
}
CURVES = ("B", "S1", "S0", "CE")  # arms that are trained, in the order of the page
PARTS = {
    "assay": "The study sees the teacher's gain",
    "retention": "The gain over the control is kept",
    "guard": "The lead over the fallback is kept",
    "fallback": "Better than the fallback",
}


@dataclass(frozen=True)
class Row:
    """One variant on one target."""

    variant: Variant
    cells: list[Cell]


def part_title(name: str) -> str:
    """What a part of the gate asks, in plain words."""
    kind, _, rest = name.partition(":")
    if kind == "slice":
        return f"The gain is kept on the slice {rest}"
    if kind == "cost":
        return f"Within the limit: {rest.replace('_', ' ')}"
    return PARTS.get(name, name)


def rows(gate: GateFile) -> list[Row]:
    return [Row(v, [*tables.quality_cells(gate, v), *tables.cost_cells(v)]) for v in gate.variants]


def curves(run: Path) -> dict[str, dict[str, list[list[float]]]]:
    """{arm: {seed: [[step, loss], ...]}} of the base and of every student whose manifest holds a curve."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for path in sorted([*run.glob(f"base/*/{MANIFEST}"), *run.glob(f"students/*/*/{MANIFEST}")]):
        facts = read_manifest(path.parent).facts
        if facts.get("loss_curve"):
            found.setdefault(facts["arm"], {})[str(facts["seed"])] = facts["loss_curve"]
    return {arm: found[arm] for arm in CURVES if arm in found}


def figures(gate: GateFile, run: Path) -> Json:
    """Inline SVG: the chain of kept gain, one size-latency-gain picture per target, losses per arm."""
    targets = list(gate.budget["targets"])
    return {
        "chain": plots.chain(gate),
        "pareto": {name: svg for name in targets if (svg := plots.pareto(gate, name))},
        "losses": [plots.losses(f"{arm}, {tables.ARMS[arm]}", seeds) for arm, seeds in curves(run).items()],
    }


def page(gate: GateFile, run: Path, study_yaml: str) -> str:
    """The whole report as one HTML document that asks for nothing outside itself."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        estimate=tables.estimate, significant=tables.significant, part_title=part_title, fixed=tables.fixed
    )
    inline = {
        name: Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("style.css", "table.js")
    }
    return environment.get_template("report.html.j2").render(
        gate=gate,
        run=run.as_posix(),
        study_yaml=study_yaml,
        headline=HEADLINES[gate.verdict],
        symbols=tables.SYMBOLS,
        arms=tables.ARMS,
        slices=[HELDOUT, *tables.shifted(gate)],
        titles=[*tables.quality_titles(gate), *tables.cost_titles()],
        footnote=tables.FOOTNOTE,
        shares=tables.student_shares(gate),
        rows=rows(gate),
        figures=figures(gate, run),
        style=inline["style.css"],
        script=inline["table.js"],
    )
