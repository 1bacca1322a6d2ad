"""The budget table: one list of columns and cells from gate.json, which the page, table.md, table.csv and the
terminal write out. Nothing is decided here."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from eval.core.gate_file import GateFile, Number, Part, Reference, Variant
from eval.core.records import VALIDATION
from eval.cost.meters import BELOW
from eval.report.format import (
    MISSING,
    NOT_MEASURED,
    REFERENCES,
    TIMES,
    Cell,
    estimate_cell,
    fixed,
    limit_text,
    measured_on,
    part_verdict,
    remarks,
    remedy_text,
    several,
    shifted,
    significant,
    stamp,
)
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS

RANKS = [PASS, INCONCLUSIVE, FAIL]
ALWAYS = ("prefill_p50", "prefill_p95", "decode_p50", "decode_p95", "peak_memory", "disk")
WEIGHTS = {  # where a variant says it
    "zeros": "zero weights, share",
    "low_bit": "low-bit weights, share",
    "reached": "of the weights that its passes name, reached",
}
SEEDED = ("validation_bits_per_byte", "gain_retained")  # columns of which table.csv has each seed
BESIDE = ("flips", "kl")  # of a variant against `plain`
COMPARED = ("better_by", "decode_ratio")  # of a variant to the one in `over`
WHERE_MEASURED = ("knee", "throughput", "energy")  # columns of tables in which some variant has them
UNITS = {
    **dict.fromkeys(("peak_memory", "device_memory", "disk"), "MiB"),
    "load_time": "s",
    "energy": "J/token",
    "knee": "requests/s",
    "throughput": "tokens/s",
}


@dataclass(frozen=True)
class Column:
    """A column of figures; `name` heads it in table.csv, `title` everywhere else."""

    name: str
    title: str


@dataclass(frozen=True)
class Row:
    """One variant on one target; `place` is its place in the table, `costs` is empty if none was measured."""

    variant: Variant
    place: int
    quality: list[Cell]
    costs: list[Cell]

    @property
    def keys(self) -> list[str | float | None]:
        """What the page sorts the columns of the variant, the target, the verdict and quality and cost by."""
        figures = [
            None if cell.value is None else float(f"{cell.value:.6g}") for cell in self.quality + self.costs
        ]
        return [self.variant.recipe, self.variant.target, self.variant.verdict, *figures]


@dataclass(frozen=True)
class ReferenceRow:
    """The teacher or the fallback on a target: what it costs, and no verdict."""

    name: str
    target: str
    costs: list[Cell]  # empty where it was not measured


@dataclass(frozen=True)
class BudgetTable:
    quality: list[Column]
    costs: list[Column]
    rows: list[Row]
    references: list[ReferenceRow]

    @cached_property
    def folded(self) -> dict[str, list[str]]:
        """Target -> its recipes, where none was measured and all of them have a row on another target."""
        measured = {row.variant.target for row in self.rows if row.costs}
        shown = {row.variant.recipe for row in self.rows if row.variant.target in measured}
        folds: dict[str, list[str]] = {}
        for v in (row.variant for row in self.rows if row.variant.target not in measured):
            folds.setdefault(v.target, []).append(v.recipe)
        return {target: names for target, names in folds.items() if shown.issuperset(names)}

    @property
    def shown(self) -> list[Row]:
        """The rows of the other targets."""
        return [row for row in self.rows if row.variant.target not in self.folded]

    def by_recipe(self) -> list[Row]:
        """One row per recipe and engine, as in gate.json: quality is the same on every target."""
        return list({(row.variant.recipe, row.variant.engine): row for row in reversed(self.rows)}.values())


def build_budget_table(gate: GateFile, variants: list[Variant] | None = None) -> BudgetTable:
    """The rows of these variants in this order, or of all in the order of gate.json.

    Quality is validation bits per byte, the share of the gain retained, the guard share, then the share
    retained on every shifted slice, and where it is known what share of the weights is zero or of few bits,
    and what share the passes reached of those that they name.
    Cost is the usual quantities, those that the budget limits, and those that only some variants have.
    """
    limited = [name for target in gate.budget["targets"].values() for name in target.get("limits", {})]
    measured = {name for v in gate.variants for name, n in (v.cost or {}).items() if n.value is not None}
    usual = [name for name in ALWAYS if not (gate.task == "classification" and name.startswith("decode"))]
    costs = list(dict.fromkeys([*usual, *limited, *(name for name in WHERE_MEASURED if name in measured)]))
    quality = [
        Column("validation_bits_per_byte", "validation bits/byte"),
        Column("gain_retained", "share of the gain retained"),
        Column("guard_share", "guard share"),
        *(Column(f"gain_retained_{name}", f"retained, {name}") for name in shifted(gate)),
        *(Column(name, WEIGHTS[name]) for name in known_weights(gate)),
    ]
    return BudgetTable(
        quality,
        [Column(name, f"{name.replace('_', ' ')}, {UNITS.get(name, 'ms')}") for name in costs],
        [
            Row(v, i, quality_cells(gate, v), cost_cells(v, costs))
            for i, v in enumerate(gate.variants if variants is None else variants)
        ],
        [ReferenceRow(REFERENCES[r.arm], r.target, reference_cells(r, costs)) for r in gate.references],
    )


def reference_cells(reference: Reference, names: list[str]) -> list[Cell]:
    cost = reference.cost
    return [cost_cell(cost.get(name), reference.arm) for name in names] if cost else []


def fold_lines(gate: GateFile, table: BudgetTable) -> dict[str, str]:
    """A line for each target on which nothing was measured -> the command that measures it."""
    how = {v.target: v.how or "" for v in reversed(gate.variants)}
    return {
        f"{target}: {several(names)}: {NOT_MEASURED}": how[target] for target, names in table.folded.items()
    }


def quality_cells(gate: GateFile, variant: Variant) -> list[Cell]:
    slices = [variant.slices[name] for name in shifted(gate)]
    return [
        estimate_cell(variant.scores.get(VALIDATION)),
        estimate_cell(variant.kept_share, part_verdict(variant, "retention")),
        estimate_cell(variant.guard_share, part_verdict(variant, "guard")),
        *(estimate_cell(one.kept_share, one.verdict) for one in slices),
        *(weight_cell(getattr(variant, name)) for name in known_weights(gate)),
    ]


def known_weights(gate: GateFile) -> list[str]:
    """The shares of `WEIGHTS` that some variant says; those of an earlier version say none."""
    return [name for name in WEIGHTS if any(getattr(v, name) is not None for v in gate.variants)]


def weight_cell(share: float | None) -> Cell:
    """A share of the weights: counted, and so without an interval."""
    return Cell(MISSING) if share is None else Cell(fixed(share), value=share)


def cost_cells(variant: Variant, names: list[str]) -> list[Cell]:
    """One cell per quantity; none where the variant was not measured."""
    if variant.cost is None:
        return []
    limits = {part.name.removeprefix("cost:"): part for part in variant.parts}
    return [cost_cell(variant.cost.get(name), variant.recipe, limits.get(name)) for name in names]


def cost_cell(number: Number | None, recipe: str, limit: Part | None = None) -> Cell:
    """The figure with its bounds and its limit or its ratio to another variant, or what it would need."""
    verdict = limit.verdict if limit else ""
    if number is None:
        return Cell(NOT_MEASURED if limit else MISSING, verdict=verdict)
    needs = f"needs {number.needs} requests" if number.needs else MISSING
    if number.value is None and number.unit == UNITS["energy"]:
        needs = BELOW
    if number.value is None:
        return Cell(needs, verdict=verdict)
    notes = [bound_note(number)] if bound_note(number) else []
    if number.upper is None:
        notes = [f"bound {needs}"]
    if limit is not None and (text := limit_text(limit)):
        notes = [text] if limit.unit[:2] != "x " else [*notes, text]
    elif number.relative is not None and number.relative.of != recipe:
        notes.append(f"{significant(number.relative.point)}{TIMES} {number.relative.of}")
    text = significant(number.value)
    return Cell(text, tuple(notes), verdict, number.value, number.lower, number.upper)


def bound_note(number: Number) -> str:
    """The bound that a limit is held against: the upper one, or the lower one where more is better."""
    more = number.unit.endswith("s/s")
    bound = number.lower if more else number.upper
    if bound is None or bound == number.value:  # none, or counted and not estimated
        return ""
    return f"{'≥' if more else '≤'} {significant(bound)}"


def csv_text(gate: GateFile) -> str:
    """table.csv: one row per variant and target, then the teacher and the fallback, then the pairs of
    variants that were compared (`over` is not empty); every figure at full precision, its bounds and the
    verdict of its part, the values of each seed, what would make it pass, how to measure what was not, by
    what it was judged and when, and the notes on the whole. A field is empty where there is nothing to say.
    """
    table = build_budget_table(gate)
    titles = table.quality + table.costs
    ends = ("", "_low", "_high")
    figures = [f"{column.name}{end}" for column in titles for end in (*ends, "_verdict")]
    seeds = [f"{name}_s{seed}" for name in SEEDED for seed in gate.seeds]
    differences = [f"{name}{end}" for name in (*BESIDE, *COMPARED) for end in ends]
    names = ["recipe", "target", "engine", "verdict", "recommended", "cost", *figures, *seeds]
    names += ["reason", "to_pass", "over", *differences, "not_measured", "judged", "notes"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    for fields in (*_variant_rows(gate, table), *_reference_rows(gate, table), *_comparison_rows(gate)):
        writer.writerow({**fields, "judged": stamp(gate), "notes": "; ".join(remarks(gate))})
    return out.getvalue()


def _variant_rows(gate: GateFile, table: BudgetTable) -> Iterator[dict[str, str]]:
    for row in table.rows:
        v, quality = row.variant, gate.quality.get(row.variant.recipe)
        by_seed = zip(SEEDED, (v.scores[VALIDATION].by_seed, v.kept_share.by_seed), strict=True)
        seeds = {
            f"{name}_s{seed}": repr(x)
            for name, of in by_seed
            for seed, x in zip(gate.seeds, of, strict=False)
        }
        differences = (quality.flips, quality.kl) if quality else ()
        missing = {f"cost on {v.target}": v.how} if v.how else {}
        missing |= quality.how if quality else {}
        yield {
            **{"recipe": v.recipe, "target": v.target, "engine": v.engine, "verdict": v.verdict},
            "recommended": str(v.recommended).lower(),
            "cost": measured_on(gate, v.target) if row.costs else NOT_MEASURED,
            **_figures(table.quality, row.quality),
            **_figures(table.costs, row.costs),
            **seeds,
            **{"reason": v.reason, "to_pass": remedy_text(v)},
            **{
                key: text
                for name, one in zip(BESIDE, differences, strict=False)
                if one is not None
                for key, text in _bounds(name, one.value, one.low, one.high).items()
            },
            "not_measured": "; ".join(f"{what}: {how}" for what, how in missing.items()),
        }


def _reference_rows(gate: GateFile, table: BudgetTable) -> Iterator[dict[str, str]]:
    for beside in table.references:
        when = measured_on(gate, beside.target) if beside.costs else NOT_MEASURED
        names = {"recipe": beside.name, "target": beside.target, "recommended": "false", "cost": when}
        yield {**names, **_figures(table.costs, beside.costs)}


def _comparison_rows(gate: GateFile) -> Iterator[dict[str, str]]:
    """One row per pair and target on which both were measured; one without a target where there is none."""
    for one in gate.comparisons:
        pair = {"recipe": one.recipe, "over": one.over}
        pair |= _bounds(COMPARED[0], one.lead.point, one.lead.low, one.lead.high)
        for target, ratio in one.decode.items():
            ratios = _bounds(COMPARED[1], ratio.point, ratio.lower, ratio.upper)
            yield {**pair, "target": target, **ratios}
        if not one.decode:
            yield pair


def _figures(columns: list[Column], cells: list[Cell]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for column, cell in zip(columns, cells, strict=False):  # no cells where nothing was measured
        fields |= _bounds(column.name, cell.value, cell.low, cell.high)
        fields[f"{column.name}_verdict"] = cell.verdict
    return fields


def _bounds(name: str, value: float | None, low: float | None, high: float | None) -> dict[str, str]:
    ends = {"": value, "_low": low, "_high": high}
    return {f"{name}{end}": "" if number is None else repr(number) for end, number in ends.items()}
