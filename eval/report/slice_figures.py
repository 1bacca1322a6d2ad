"""Where the gain is retained: by slice from gate.json, and document by document from the score records."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import ValidationError

from eval.core.errors import UserError
from eval.core.gate_file import GateFile, KeptShare
from eval.core.records import PLAIN, VALIDATION, Score
from eval.report.figures import omitted
from eval.report.format import by_recipe, fixed, part_verdict, select_variants
from eval.report.svg import COLOURS, GRID, INK, MARKERS, MUTED, SERIES, SHOWN, SOFT, Picture, inline, style

Array = NDArray[np.float64]

ACROSS = 3  # panels side by side
WEAKEST = 5  # documents that are named
DOTS = 400  # a curve of sorted documents needs no more
CHOSEN = 3  # variants whose documents are shown


def _axis(shares: Iterable[KeptShare]) -> tuple[float, float]:
    """Ends of an axis of shares: every point, and intervals until they would hide the rest."""
    ends = [end for s in shares for end in (s.low, s.point, s.high) if end is not None]
    return max(-0.5, min([-0.05, *ends])), min(2.0, max([1.05, *ends]))


def _slice_panel(axes: Axes, gate: GateFile, name: str, shares: list[tuple[KeptShare, str]]) -> None:
    required = gate.budget["f"] if name == VALIDATION else gate.budget["slices"].get(name)
    for x in (0.0, 1.0):
        axes.axvline(x, color=GRID, linewidth=1)
    if required is not None:
        axes.axvline(required, color=MUTED, linewidth=1, linestyle="--")
    for y, (share, verdict) in enumerate(shares):
        colour = COLOURS.get(verdict, SERIES)
        if share.low is not None and share.high is not None:
            axes.plot([share.low, share.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        if share.point is not None:
            axes.plot([share.point], [y], MARKERS.get(verdict, "o"), color=colour, markersize=6)
    title = f"{name}, asked: {required:g}" if required is not None else f"{name}, nothing asked"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)


def slices(gate: GateFile) -> Picture:
    """The share of the gain that every variant retains on every slice, one panel per slice."""
    shown = select_variants(by_recipe(gate), SHOWN)
    by_slice = {VALIDATION: [(v.kept_share, part_verdict(v, "retention")) for v in shown]}
    for name in (one for one in gate.documents if one != VALIDATION):
        by_slice[name] = [(v.slices[name].kept_share, v.slices[name].verdict or "") for v in shown]
    down = math.ceil(len(by_slice) / ACROSS)
    ends = _axis(share for shares in by_slice.values() for share, _ in shares)
    with style("slices"):
        figure = Figure(figsize=(9, down * (0.75 + 0.26 * len(shown)) + 0.1), layout="constrained")
        grid = figure.subplots(down, ACROSS, squeeze=False, sharey=True).ravel()
        for axes, (name, shares) in zip(grid, by_slice.items(), strict=False):
            _slice_panel(axes, gate, name, shares)
            axes.set_xlim(*ends)
            axes.tick_params(length=0, labelcolor=INK, axis="y")
        grid[0].set_yticks(range(len(shown)), [v.recipe for v in shown])
        for axes in grid[len(by_slice) :]:
            axes.set_visible(False)
        figure.supxlabel("share of the teacher's gain", fontsize=10, color=MUTED)
        description = "; ".join(
            f"{name}: "
            + ", ".join(f"{v.recipe} {fixed(s.point, 2)}" for v, (s, _) in zip(shown, shares, strict=True))
            for name, shares in by_slice.items()
        )
        svg = inline(figure, "slices", "Share of the teacher's gain retained on every slice", description)
    return Picture(svg, omitted(gate))


@dataclass(frozen=True)
class Documents:
    """Gains of the documents of one slice in bits per byte, [C] each, the least gain of the variant first."""

    slice: str
    ids: list[str]
    variant: Array  # of the variant over its control, mean over the seeds
    teacher: Array  # of T1 over T0

    @property
    def better(self) -> int:
        """How many documents the variant predicts better than its control does."""
        return int((self.variant > 0).sum())

    @property
    def weakest(self) -> list[tuple[str, float]]:
        return [(self.ids[i], float(self.variant[i])) for i in range(min(WEAKEST, len(self.ids)))]

    @property
    def quartiles(self) -> list[float]:
        """Least, first quartile, median, third quartile and greatest gain of the variant."""
        return [float(q) for q in np.quantile(self.variant, [0, 0.25, 0.5, 0.75, 1])]


def _mean_bits(run: Path, gate: GateFile, arm: str, recipe: str) -> tuple[Score, Array]:
    """A record that names the documents, and the mean over seeds of their bits [C] in its order."""
    first, total = None, np.zeros(0)
    for seed in gate.seeds:
        path = run / "records" / "score" / recipe / f"{arm}-s{seed}.json"
        try:
            score = Score.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            fix = f"run absorb score --study {run}"
            raise UserError(f"record {path}", "cannot be read as a score", fix) from error
        columns = score.documents
        bits = dict(zip(zip(columns.slice, columns.id, strict=True), columns.bits, strict=True))
        first = first or score
        keys = zip(first.documents.slice, first.documents.id, strict=True)
        ordered = np.array([bits[key] for key in keys])
        total = ordered if score is first else total + ordered
    assert first is not None
    return first, total / len(gate.seeds)


def _per_byte(run: Path, gate: GateFile, better: tuple[str, str], worse: tuple[str, str]) -> dict:
    """(slice, id) -> bits per byte that `better` saves against `worse`; each an arm and a recipe."""
    (one, ours), (other, theirs) = (_mean_bits(run, gate, *model) for model in (better, worse))
    there = dict(zip(zip(other.documents.slice, other.documents.id, strict=True), theirs, strict=True))
    columns = zip(one.documents.slice, one.documents.id, one.documents.bytes, ours, strict=True)
    return {(name, i): (there[name, i] - bits) / size for name, i, size, bits in columns}


def documents(run: Path, gate: GateFile, recipe: str, teacher: dict | None = None) -> list[Documents]:
    """Gains document by document, slice by slice; the figures rest on the records that the gate read."""
    variant = _per_byte(run, gate, ("S1", recipe), ("S0", recipe))
    teacher = teacher or teacher_gains(run, gate)
    sections = []
    for name in gate.documents:
        ids = sorted(
            (i for slice_name, i in variant if slice_name == name), key=lambda i: (variant[name, i], i)
        )
        values = (np.array([gain[name, i] for i in ids]) for gain in (variant, teacher))
        sections.append(Documents(name, ids, *values))
    return sections


def teacher_gains(run: Path, gate: GateFile) -> dict:
    """(slice, id) -> bits per byte that T1 saves against T0."""
    return _per_byte(run, gate, ("T1", PLAIN), ("T0", PLAIN))


def chosen(gate: GateFile) -> list[str]:
    """Recipes whose documents are shown: the recommended ones, else the uncompressed student."""
    best = [name for name in gate.recommended.values() if name is not None]
    return list(dict.fromkeys(best))[:CHOSEN] or [PLAIN]


def _document_panel(axes: Axes, documents: Documents) -> None:
    """Documents by the gain of the variant; behind each the teacher's gain on the same one."""
    size = len(documents.ids)
    few = np.unique(np.linspace(0, size - 1, min(size, DOTS)).round().astype(int))
    rank = (few + 0.5) / size * 100
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.vlines(rank, documents.variant[few], documents.teacher[few], color=GRID, linewidth=1, zorder=1)
    axes.plot(rank, documents.teacher[few], "o", color=SOFT, markersize=3.2, zorder=2, label="teacher")
    axes.plot(rank, documents.variant[few], "o", color=SERIES, markersize=3.2, zorder=3, label="variant")
    axes.set_title(
        f"{documents.slice}: {documents.better} of {size} gain", loc="left", fontsize=10, color=INK
    )
    axes.set_xlim(0, 100)
    axes.grid(axis="y")


def strips(by_slice: list[Documents], recipe: str, place: int = 0) -> Markup:
    """The gain of the variant on every document, sorted, one panel per slice."""
    down, name = math.ceil(len(by_slice) / ACROSS), f"documents-{place}"
    with style(name):
        figure = Figure(figsize=(9, 2.5 * down), layout="constrained")
        grid = figure.subplots(down, ACROSS, squeeze=False, sharey=True).ravel()
        for axes, one in zip(grid, by_slice, strict=False):
            _document_panel(axes, one)
        for axes in grid[len(by_slice) :]:
            axes.set_visible(False)
        figure.supxlabel("documents, from the least gain to the greatest, %", fontsize=10, color=MUTED)
        figure.supylabel("gain, bits/byte", fontsize=10, color=MUTED)
        grid[0].legend(loc="upper left", labelcolor=INK, handletextpad=0.1)
        description = "; ".join(
            f"{one.slice}: {one.better} of {len(one.ids)} documents gain" for one in by_slice
        )
        return inline(figure, name, f"Gain retained by {recipe}, document by document", description)
