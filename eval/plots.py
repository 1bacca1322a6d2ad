"""Pictures of the report: deterministic SVG whose colours and fonts the page decides."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from eval.records import HELDOUT, PLAIN
from eval.tables import SYMBOLS, by_recipe, estimate, part_verdict
from eval.verdict import GateFile, Kept

Box = tuple[float, float, float, float]  # left, bottom, right, top

# Colours that stand for variables of the page: matplotlib writes them, `_themed` replaces them.
INK, MUTED, GRID, PANEL = "#010101", "#020202", "#030303", "#040404"
COLOURS = {"PASS": "#050505", "FAIL": "#060606", "INCONCLUSIVE": "#070707"}
SERIES = "#080808"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PANEL: "panel",
    SERIES: "accent",
    COLOURS["PASS"]: "pass",
    COLOURS["FAIL"]: "fail",
    COLOURS["INCONCLUSIVE"]: "unsure",
}
MARKERS = {"PASS": "o", "FAIL": "X", "INCONCLUSIVE": "D"}
DASHES = ["-", "--", ":", "-."]
SHOWN = 24  # more rows or labels cannot be read in one picture
CURVE_POINTS = 400
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a title is text, whatever it holds
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@contextmanager
def _style(name: str) -> Iterator[None]:
    """The report's style; `name` salts the ids, so that two pictures of one page share none."""
    style: Any = {**STYLE, "svg.hashsalt": name}  # matplotlib types every key on its own
    with mpl.rc_context(style), warnings.catch_warnings():
        # Text stays text: the reader's own fonts draw it, and matplotlib's need not hold the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _themed(figure: Figure, alt: str) -> Markup:
    """Inline SVG of `figure`, named `alt`, with the page's variables for colours."""
    text = io.StringIO()
    blank = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(text, format="svg", transparent=True, metadata=blank)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href=", "href=")
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    width, height = figure.get_size_inches() * 72
    top = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width:g} {height:g}">'
    return Markup(re.sub(r"<svg[^>]*>", lambda _: top, svg, count=1))


@dataclass(frozen=True)
class Point:
    recipe: str
    x: float  # ms per token
    y: float  # bits per byte
    disk: float
    verdict: str
    recommended: bool


@dataclass(frozen=True)
class Stage:
    label: str
    value: Kept
    verdict: str = ""
    text: str = ""


def _stages(gate: GateFile) -> list[Stage]:
    """From the base to the last variant shown; the recommended ones are kept where not all fit."""
    student = gate.kept_by_student.over_control
    stages = [
        Stage("base B", Kept(point=0.0), text="no gain, by definition"),
        Stage("teacher T1", Kept(point=1.0), text="all of it, by definition"),
        Stage("student S1, plain", student, text=str(estimate(student))),
    ]
    recipes = [v for v in by_recipe(gate) if v.recipe != PLAIN]
    best = set(gate.recommended.values())
    chosen = {id(v) for v in sorted(recipes, key=lambda v: v.recipe not in best)[:SHOWN]}
    for v in [v for v in recipes if id(v) in chosen]:
        cell = estimate(v.kept_share, part_verdict(v, "retention"))
        stages.append(Stage(v.recipe, v.kept_share, cell.verdict, str(cell)))
    return stages


def _limits(stages: list[Stage]) -> tuple[float, float]:
    """Left and right end of the axis: every point, and intervals until they would hide the rest."""
    ends = [end for s in stages for end in (s.value.low, s.value.point, s.value.high) if end is not None]
    return max(-0.5, min(-0.08, min(ends) - 0.05)), min(2.0, max(1.08, max(ends) + 0.05))


def _draw_stage(axes: Axes, y: int, stage: Stage) -> None:
    colour, value = COLOURS.get(stage.verdict, SERIES), stage.value
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    if value.point is not None:
        axes.plot([value.point], [y], MARKERS.get(stage.verdict, "o"), color=colour, markersize=7)
    axes.text(1.03, y, stage.text, transform=axes.get_yaxis_transform(), va="center")


def chain(gate: GateFile) -> Markup:
    """Share of the teacher's gain that each stage keeps, with intervals and the share that is asked."""
    stages, asked = _stages(gate), gate.budget["f"]
    height = 0.85 + 0.34 * len(stages)
    with _style("chain"):
        figure = Figure(figsize=(9, height))
        axes = figure.add_axes((0.18, 0.5 / height, 0.5, 1 - 0.75 / height))
        axes.set_xlim(*_limits(stages))
        axes.set_ylim(len(stages) - 0.5, -0.5)
        for x in (0.0, 1.0):
            axes.axvline(x, color=GRID, linewidth=1)
        axes.axvline(asked, color=MUTED, linewidth=1, linestyle="--")
        axes.text(asked, -0.6, f"asked: {asked:g}", color=MUTED, ha="center", va="bottom")
        for y, stage in enumerate(stages):
            _draw_stage(axes, y, stage)
        axes.set_yticks(range(len(stages)), [stage.label for stage in stages])
        axes.tick_params(length=0, labelcolor=INK, axis="y")
        axes.set_xlabel("share of the teacher's gain, held-out")
        axes.spines["left"].set_visible(False)
        alt = "; ".join(f"{stage.label}: {stage.text}" for stage in stages)
        return _themed(figure, f"Share of the teacher's gain kept, stage by stage. {alt}")


def _points(gate: GateFile, target: str) -> list[Point]:
    """Measured variants on one target, fastest first."""
    points = []
    for v in gate.variants:
        decode, disk = ((v.cost or {}).get(name) for name in ("decode_p50", "disk"))
        if v.target == target and decode and decode.value is not None:
            size = disk.value if disk and disk.value is not None else 0.0
            level = v.scores[HELDOUT].point
            points.append(Point(v.recipe, decode.value, level, size, v.verdict, v.recommended))
    return sorted(points, key=lambda p: (p.x, p.y))


def _frontier(points: list[Point]) -> list[Point]:
    """Points that no other beats in both latency and bits per byte; `points` come fastest first."""
    best, found = math.inf, []
    for point in points:
        if point.y < best:
            best = point.y
            found.append(point)
    return found


def _place_labels(axes: Axes, points: list[Point]) -> None:
    """Writes names beside points, each at the first place that is free of other names and points."""
    spots = [(p, *axes.transData.transform((p.x, p.y))) for p in points]
    taken: list[Box] = [(x - 10, y - 10, x + 10, y + 10) for _, x, y in spots]
    for p, x, y in spots:
        text = p.recipe + (" *" if p.recommended else "")
        for dx, dy in [(8, 10), (12, -4), (8, -20), (-8, 10), (-12, -4), (-8, -20)]:
            left = x + dx - (6.0 * len(text) if dx < 0 else 0)
            box = (left, y + dy, left + 6.0 * len(text), y + dy + 9)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        side = "right" if dx < 0 else "left"
        axes.annotate(text, (p.x, p.y), (dx, dy), textcoords="offset points", ha=side)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _latency_axis(axes: Axes, points: list[Point]) -> None:
    """A logarithmic axis where the slowest would squeeze the rest against the edge; room for the names."""
    low, high = points[0].x, points[-1].x
    axes.set_xlabel("decode p50, ms per token")
    if high > 8 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, high * 1.2)


def _references(axes: Axes, gate: GateFile) -> None:
    """Lines at the fallback and at the teacher, named in the margin: the gain lies between them."""
    for arm, name in (("B", "base B"), ("T1", "teacher T1")):
        level = gate.scores[arm][HELDOUT].point
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.text(1.01, level, name, transform=axes.get_yaxis_transform(), color=MUTED, va="center")


def pareto(gate: GateFile, target: str) -> Markup | None:
    """Decode latency against held-out bits per byte; the area of a mark grows with bytes on disk."""
    points = _points(gate, target)
    if not points:
        return None
    biggest = max(p.disk for p in points) or 1.0
    with _style(f"pareto-{target}"):
        figure = Figure(figsize=(7.4, 4.4), dpi=72)
        axes = figure.add_axes((0.11, 0.12, 0.75, 0.8))
        axes.grid(axis="y")
        _references(axes, gate)
        best = _frontier(points)
        axes.plot([p.x for p in best], [p.y for p in best], color=GRID, linewidth=4, zorder=1)
        for p in points:
            area, colour = 30 + 220 * p.disk / biggest, COLOURS[p.verdict]
            axes.scatter([p.x], [p.y], area, colour, marker=MARKERS[p.verdict], edgecolors=PANEL, zorder=2)
        _latency_axis(axes, points)
        axes.margins(y=0.12)
        axes.set_ylabel("held-out bits/byte (lower is better)")
        axes.autoscale_view()
        _place_labels(axes, sorted(points, key=lambda p: not p.recommended)[:SHOWN])
        _legend(axes, {p.verdict for p in points})
        alt = f"Held-out bits per byte against decode latency on {target}; the budget table holds the figures"
        return _themed(figure, alt)


def _legend(axes: Axes, verdicts: set[str]) -> None:
    marks = [
        Line2D([], [], marker=MARKERS[v], color=COLOURS[v], linestyle="", label=v)
        for v in SYMBOLS
        if v in verdicts
    ]
    axes.legend(handles=marks, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1), borderaxespad=0.2)


def losses(title: str, curves: dict[str, list[list[float]]]) -> Markup:
    """Training loss over steps, one line per seed; `curves` maps a seed to [[step, loss], ...]."""
    with _style(f"loss-{title}"):
        figure = Figure(figsize=(4.2, 2.8))
        axes = figure.add_axes((0.14, 0.17, 0.83, 0.7))
        axes.grid(axis="y")
        for i, (seed, curve) in enumerate(curves.items()):
            few = curve[:: math.ceil(len(curve) / CURVE_POINTS)]
            dash = DASHES[i % len(DASHES)]
            axes.plot(*zip(*few, strict=True), dash, color=SERIES, linewidth=1.3, label=f"seed {seed}")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.legend(loc="upper right", labelcolor=MUTED)
        ends = "; ".join(f"seed {seed} ends at {curve[-1][1]:.3f}" for seed, curve in curves.items())
        return _themed(figure, f"Training loss of {title}: {ends}")
