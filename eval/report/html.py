"""The one-file HTML report: what the template needs, in the order of the page."""

import base64
import gzip
import hashlib
import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.gate_file import GateFile
from eval.core.records import PLAIN, VALIDATION
from eval.report import behaviour as beside
from eval.report import figures as plots
from eval.report import format as tables
from eval.report import lineage
from eval.report import slice_figures as spread
from eval.report.budget_table import RANKS, build_budget_table, fold_lines
from eval.report.evidence_pages import render_evidence

Json = dict[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = {
    "budget": "Budget table",
    "chain": "Gain retained, stage by stage",
    "against": "Variant against variant",
    "pareto": "Size, latency and gain",
    "load": "Under load",
    "slices": "Slices and documents",
    "arms": "Arms",
    "behaviour": "Behaviour and tasks",
    "loss": "Training",
    "lineage": "From the paper to the artifact",
    "where": "Where this comes from",
}
WRITTEN = 100  # rows of the budget table that stand in the page itself
PACK = 50  # evidence that is unpacked together
TRAINED = ("B", "S1", "S0", "CE")  # arms with a loss curve, in the order of the page


def headline(gate: GateFile) -> str:
    """The verdict in a few words: which variant on which target."""
    if gate.verdict == "PASS":
        choices = [f"{recipe} on {target}" for target, recipe in gate.recommended.items() if recipe]
        other = ", by another budget than the fixed one" if gate.fixed and gate.fixed.other else ""
        return f"ship {' and '.join(choices)}{other}"
    return {"FAIL": "nothing may ship", "INCONCLUSIVE": "not decided, more evidence is needed"}[gate.verdict]


def _curve(folder: Path) -> list[list[float]] | None:
    if not (folder / MANIFEST).is_file():
        return None
    curve: list[list[float]] | None = read_manifest(folder).facts.get("loss_curve")
    return curve


def curves(run: Path, gate: GateFile) -> dict[str, dict[str, list[list[float]]]]:
    """{title: {seed: [[step, loss], ...]}} of the arms, then of the variants that were trained again."""
    folders = {f"{arm}, {tables.ARMS[arm]}": f"students/{arm}" for arm in TRAINED} | {
        f"B, {tables.ARMS['B']}": "base"
    }
    again = [
        v.recipe for v in tables.select_variants(tables.by_recipe(gate), plots.SHOWN) if v.recipe != PLAIN
    ]
    folders |= {f"S1 after {recipe}, recovered": f"variants/{recipe}/S1" for recipe in again}
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for title, folder in folders.items():
        seeds = {str(seed): _curve(run / folder / f"s{seed}") for seed in gate.seeds}
        by_seed = {seed: curve for seed, curve in seeds.items() if curve}
        if by_seed and by_seed not in curves.values():  # a recipe that goes on from another has its curve too
            curves[title] = by_seed
    return curves


def figures(gate: GateFile, run: Path) -> Json:
    """Inline SVG of every section."""
    targets = list(gate.budget["targets"])
    return {
        "chain": plots.chain(gate),
        "pareto": {t: picture for i, t in enumerate(targets) if (picture := plots.pareto(gate, t, i))},
        "load": {t: picture for i, t in enumerate(targets) if (picture := plots.load(gate, t, i))},
        "slices": spread.slices(gate),
        "losses": [plots.losses(i, *pair) for i, pair in enumerate(curves(run, gate).items())],
        "lineage": lineage.graph(lineage.nodes(run, gate)),
    }


def documents(gate: GateFile, run: Path) -> Json:
    """Recipe -> picture and rows of its documents, of the recommended ones."""
    teacher_gains, sections = spread.teacher_gains(run, gate), {}
    for i, recipe in enumerate(spread.chosen(gate)):
        by_slice = spread.documents(run, gate, recipe, teacher_gains)
        sections[recipe] = {"svg": spread.strips(by_slice, recipe, i), "rows": by_slice}
    return sections


@cache
def environment() -> Environment:
    """Templates in which whatever comes from users is escaped."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals.update(symbols=tables.SYMBOLS, to_pass=tables.remedy_text, arm_cell=tables.arm_cell)
    templates.filters.update(
        day=tables.day,
        estimate=tables.estimate_cell,
        fixed=tables.fixed,
        htmljson=lambda value: htmlsafe_json_dumps(value, separators=(",", ":")),
        significant=tables.significant,
    )
    return templates


def compress_texts(pieces: Iterable[str]) -> str:
    """A list of texts as base64 of gzip of JSON; the same texts give the same bytes."""
    text = json.dumps(list(pieces), ensure_ascii=False).encode()
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def render_budget_rows(gate: GateFile, environment: Environment) -> Json:
    """The rows of the budget table that are written out, and what the script needs of all.

    A browser lays out a few hundred rows at once and no more. So the first ones are written out, and can be
    read without a script; the others lie beside them, compressed, and the script shows the part that is asked
    for. What is recommended comes first, then by target and verdict, then as in gate.json.
    """
    targets = list(gate.budget["targets"])
    variants = sorted(
        gate.variants, key=lambda v: (not v.recommended, targets.index(v.target), RANKS.index(v.verdict))
    )
    whole = build_budget_table(gate, variants)
    rows = whole.shown
    table = replace(whole, rows=rows)
    titles = ["variant", "target", "verdict", *(column.title for column in table.quality + table.costs)]
    macros: Any = environment.get_template("row.html.j2").make_module({"titles": titles})
    rest = table.rows[WRITTEN:]
    packs = (rest[i : i + PACK] for i in range(0, len(rest), PACK))
    return {
        "titles": titles,
        "costs": [column.title for column in table.costs],
        "references": table.references,
        "folded": fold_lines(gate, whole),
        "targets": list(dict.fromkeys(row.variant.target for row in rows)),
        "unmeasured": tables.measuring_commands(gate, whole.folded),
        "written": [macros.row(row, render_evidence(gate, row.variant)) for row in table.rows[:WRITTEN]],
        "data": {
            "keys": [row.keys + [None] * (len(titles) - len(row.keys)) for row in table.rows],
            "rows": compress_texts(macros.row(row, "") for row in rest) if rest else "",
            "evidence": [
                compress_texts(render_evidence(gate, row.variant) for row in pack) for pack in packs
            ],
            "pack": PACK,
        },
    }


def render_page(gate: GateFile, run: Path, study_yaml: str) -> str:
    """The whole report as one HTML document that asks for nothing outside itself.

    Raises:
        UserError: a score record of a recommended variant cannot be read.
    """
    templates, pictures = environment(), figures(gate, run)
    pictures["against"] = gate.comparisons
    pictures["behaviour"] = beside.behaviour_cells(gate) or beside.task_rows(gate)
    style, script = (Markup((TEMPLATES / name).read_text("utf-8")) for name in ("style.css", "table.js"))
    return templates.get_template("report.html.j2").render(
        gate=gate,
        run=shlex.quote(gate.folder),
        study_yaml=study_yaml,
        headline=headline(gate),
        other_budget=f" --budget {shlex.quote(gate.budget['name'])}  # its name, or its file"
        if gate.fixed and gate.fixed.other
        else "",
        test_set=tables.test_set_line(gate),
        data_lines=tables.data_lines(run, gate),
        sections={name: title for name, title in SECTIONS.items() if pictures.get(name, True)},
        arms=tables.ARMS,
        slices=[VALIDATION, *tables.shifted(gate)],
        footnote=tables.FOOTNOTE,
        stamp=tables.stamp(gate),
        made=tables.short_stamp(gate),
        scored=tables.measured_on(gate, "scores"),
        costed=tables.cost_stamp(gate),
        saved=tables.saved_text(gate),
        comparisons=tables.comparison_rows(gate),
        left_out=tables.pairs_left_out(gate),
        seeds=tables.seed_rows(gate),
        not_measured=tables.NOT_MEASURED,
        shares=tables.student_shares(gate),
        table=render_budget_rows(gate, templates),
        behaviour=beside.behaviour_cells(gate),
        behaviour_titles=beside.BEHAVIOUR,
        classes=beside.class_rows(gate),
        class_titles=beside.CLASSES,
        tasks=beside.task_rows(gate),
        task_arms=beside.task_arms(gate),
        figures=pictures,
        documents=documents(gate, run),
        card=lineage.card(run, gate),
        lineage=lineage.nodes(run, gate),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
