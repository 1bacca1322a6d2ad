"""Pictures of gate.json: what every stage keeps, what a variant costs for it, losses, latency under load."""

import math
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from eval.core.gate_file import GateFile, KeptShare, Variant
from eval.core.records import PLAIN, VALIDATION
from eval.core.sections.classification import latency_of
from eval.report.format import (
    SYMBOLS,
    by_recipe,
    estimate_cell,
    fixed,
    part_verdict,
    select_variants,
    significant,
)
from eval.report.svg import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    PANEL,
    SERIES,
    SHOWN,
    SOFT,
    Picture,
    inline,
    style,
)

Array = NDArray[np.float64]
Box = tuple[float, float, float, float]  # left, bottom, right, top
DASHES = ["-", "--", ":", "-."]
CURVE_POINTS = 400
PLACES = [(side * dx, dy) for dy in (10, -4, -20, 24, -34) for side, dx in ((1, 10), (-1, 10))]
MARKS = 400  # more points hide each other


@dataclass(frozen=True)
class Point:
    recipe: str
    x: float  # ms per token
    y: float  # bits per byte
    across: tuple[float, float] | None  # bounds of x
    down: tuple[float, float] | None  # y with the bounds of its difference from `plain`: most noise is shared
    disk: float
    verdict: str
    recommended: bool


@dataclass(frozen=True)
class Stage:
    label: str
    value: KeptShare
    verdict: str = ""
    text: str = ""


def omitted(gate: GateFile) -> str:
    """What pictures of one line per variant leave out, in a sentence; nothing where they show all."""
    count = len(by_recipe(gate))
    return f"{SHOWN} of {count} variants are drawn; the budget table holds all." if count > SHOWN else ""


def _stages(gate: GateFile) -> list[Stage]:
    """From the base to the last variant shown."""
    student = gate.kept_by_student.over_control
    stages = [
        Stage("base B", KeptShare(point=0.0), text="no gain, by definition"),
        Stage("teacher T1", KeptShare(point=1.0), text="all of it, by definition"),
        Stage("student S1, plain", student, text=str(estimate_cell(student))),
    ]
    for v in select_variants((v for v in by_recipe(gate) if v.recipe != PLAIN), SHOWN):
        cell = estimate_cell(v.kept_share, part_verdict(v, "retention"))
        stages.append(Stage(v.recipe, v.kept_share, cell.verdict, str(cell)))
    return stages


def _limits(stages: list[Stage]) -> tuple[float, float]:
    """Left and right end of the axis: every point, and intervals until they would hide the rest."""
    ends = [end for s in stages for end in (s.value.low, s.value.point, s.value.high) if end is not None]
    return max(-0.5, min(-0.08, min(ends) - 0.05)), min(2.0, max(1.08, max(ends) + 0.05))


def _draw_stage(axes: Axes, y: int, stage: Stage) -> None:
    colour, value = COLOURS.get(stage.verdict, SERIES), stage.value
    left, right = axes.get_xlim()
    inside = [x for x in value.by_seed if left <= x <= right]
    axes.plot(inside, [y] * len(inside), "|", color=MUTED, markersize=9, markeredgewidth=0.9)
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    if value.point is not None:
        axes.plot([value.point], [y], MARKERS.get(stage.verdict, "o"), color=colour, markersize=7)
    axes.text(1.03, y, stage.text, transform=axes.get_yaxis_transform(), va="center")


def chain(gate: GateFile) -> Picture:
    """Share of the teacher's gain that each stage keeps, with intervals and the share that is asked."""
    stages, required = _stages(gate), gate.budget["f"]
    height = 0.85 + 0.34 * len(stages)
    with style("chain"):
        figure = Figure(figsize=(9, height))
        axes = figure.add_axes((0.18, 0.5 / height, 0.5, 1 - 0.75 / height))
        axes.set_xlim(*_limits(stages))
        axes.set_ylim(len(stages) - 0.5, -0.5)
        for x in (0.0, 1.0):
            axes.axvline(x, color=GRID, linewidth=1)
        axes.axvline(required, color=MUTED, linewidth=1, linestyle="--")
        axes.text(required, -0.6, f"asked: {required:g}", color=MUTED, ha="center", va="bottom")
        for y, stage in enumerate(stages):
            _draw_stage(axes, y, stage)
        axes.set_yticks(range(len(stages)), [stage.label for stage in stages])
        axes.tick_params(length=0, labelcolor=INK, axis="y")
        axes.set_xlabel("share of the teacher's gain, validation")
        axes.spines["left"].set_visible(False)
        text = "; ".join(f"{stage.label}: {stage.text}" for stage in stages)
        svg = inline(figure, "chain", "Share of the teacher's gain retained, stage by stage", text)
    return Picture(svg, omitted(gate))


def _points(gate: GateFile, target: str) -> list[Point]:
    """Measured variants on one target, fastest first."""
    points = []
    leads = {
        one.recipe: (one.lead.point - one.lead.high, one.lead.point - one.lead.low)
        for one in gate.comparisons
        if one.over == PLAIN and one.lead.low is not None and one.lead.high is not None
    }
    for v in gate.variants:
        decode, disk = ((v.cost or {}).get(name) for name in (latency_of(gate.task), "disk"))
        if v.target == target and decode and decode.value is not None:
            size = disk.value if disk and disk.value is not None else 0.0
            level = v.scores[VALIDATION].point
            across = None if decode.lower is None or decode.upper is None else (decode.lower, decode.upper)
            lead = leads.get(v.recipe)
            down = None if lead is None else (level + lead[0], level + lead[1])
            points.append(Point(v.recipe, decode.value, level, across, down, size, v.verdict, v.recommended))
    return sorted(points, key=lambda p: (p.x, p.y))


def _frontier(points: list[Point]) -> list[Point]:
    """Points that no other beats in both latency and bits per byte; `points` come fastest first."""
    best, frontier = math.inf, []
    for point in points:
        if point.y < best:
            best = point.y
            frontier.append(point)
    return frontier


def _place_labels(axes: Axes, points: list[Point]) -> None:
    """Writes names beside points, each at the first place that is free of other names and points."""
    spots = [(p, *axes.transData.transform((p.x, p.y))) for p in points]
    taken: list[Box] = [(x - 10, y - 10, x + 10, y + 10) for _, x, y in spots]
    for p, x, y in spots:
        text = p.recipe + (" *" if p.recommended else "")
        for dx, dy in PLACES:
            left = x + dx - (6.0 * len(text) if dx < 0 else 0)
            box = (left, y + dy, left + 6.0 * len(text), y + dy + 9)
            if not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        side = "right" if dx < 0 else "left"
        axes.annotate(text, (p.x, p.y), (dx, dy), textcoords="offset points", ha=side)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _latency_axis(axes: Axes, points: list[Point]) -> None:
    """A logarithmic axis where the slowest would squeeze the rest against the edge; room for the names."""
    ends = [end for p in points for end in (p.x, *(p.across or ()))]
    # a bound that says nothing would hide the rest
    low, high = max(min(ends), points[0].x / 4), min(max(ends), 4 * points[-1].x)
    axes.set_xlabel("decode p50, ms per token")
    if high > 8 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.5, high * 2)
        _log_ticks(axes.xaxis)
    else:
        axes.set_xlim(0, high * 1.2)


def _references(axes: Axes, gate: GateFile) -> None:
    """Lines at the fallback and at the teacher, named in the margin: the gain lies between them."""
    for arm, name in (("B", "base B"), ("T1", "teacher T1")):
        level = gate.scores[arm][VALIDATION].point
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.text(1.01, level, name, transform=axes.get_yaxis_transform(), color=MUTED, va="center")


def _select_points(points: list[Point], front: list[Point]) -> list[Point]:
    """Those that are drawn: the front and the recommended, then an even choice of the rest."""
    first = [p for p in points if p.recommended or p in front]
    rest = [p for p in points if not p.recommended and p not in front]
    step = max(1, math.ceil(len(rest) / max(1, MARKS - len(first))))
    return sorted([*first, *rest[::step]], key=lambda p: (p.x, p.y))


def _scatter(axes: Axes, points: list[Point]) -> None:
    """One mark per point, the area with the bytes on disk; what is recommended stands inside a ring."""
    biggest = max(p.disk for p in points) or 1.0
    for verdict, marker in MARKERS.items():
        some = [p for p in points if p.verdict == verdict]
        area = np.array([30 + 220 * p.disk / biggest for p in some])
        x, y, colour = [p.x for p in some], [p.y for p in some], COLOURS[verdict]
        for p in some:
            if p.across:
                axes.plot(p.across, [p.y, p.y], color=colour, linewidth=0.8, alpha=0.6, zorder=2)
            if p.down:
                axes.plot([p.x, p.x], p.down, color=colour, linewidth=0.8, alpha=0.6, zorder=2)
        axes.scatter(x, y, area, colour, marker=marker, edgecolors=PANEL, zorder=3)
    for p in points:
        if p.recommended:
            ring = 30 + 220 * p.disk / biggest
            axes.scatter(
                [p.x], [p.y], ring * 3, "none", edgecolors=COLOURS[p.verdict], linewidths=1.5, zorder=2
            )


def _described(points: list[Point], front: list[Point], target: str) -> str:
    """The front in words; the other figures stand in the budget table."""
    names = "; ".join(
        f"{p.recipe}, {significant(p.x)} ms per token, {fixed(p.y)} bits per byte, {significant(p.disk)} MiB"
        for p in front[:SHOWN]
    )
    more = f" and {len(front) - SHOWN} more" if len(front) > SHOWN else ""
    return f"Of {len(points)} variants measured on {target}, no other is better in both than: {names}{more}."


def pareto(gate: GateFile, target: str, place: int = 0) -> Picture | None:
    """Decode latency against validation bits per byte; the area of a mark grows with bytes on disk."""
    points = _points(gate, target)
    if not points:
        return None
    front = _frontier(points)
    shown = _select_points(points, front)
    name = f"pareto-{place}"
    with style(name):
        figure = Figure(figsize=(7.4, 4.4), dpi=72)
        axes = figure.add_axes((0.11, 0.12, 0.75, 0.8))
        axes.grid(axis="y")
        _references(axes, gate)
        axes.plot([p.x for p in front], [p.y for p in front], color=SOFT, linewidth=1.8, zorder=1)
        _scatter(axes, shown)
        _latency_axis(axes, points)
        axes.margins(y=0.12)
        axes.set_ylabel("validation bits/byte (lower is better)")
        axes.autoscale_view()
        _place_labels(axes, sorted(shown, key=lambda p: (not p.recommended, p not in front))[:SHOWN])
        _legend(axes, {p.verdict for p in shown})
        title = f"Validation bits per byte against decode latency on {target}"
        svg = inline(figure, name, title, _described(points, front, target))
    return Picture(svg, _omitted_note(len(points), len(shown)))


def _omitted_note(points: int, shown: int) -> str:
    """What the picture leaves out, in a sentence; nothing where it leaves out nothing."""
    if shown < points:
        return (
            f"{shown} of {points} variants are drawn: the front, the recommended and an even choice of the "
            f"rest; at most {SHOWN} are named."
        )
    return f"{SHOWN} of {points} variants are named." if points > SHOWN else ""


def _legend(axes: Axes, verdicts: set[str]) -> None:
    marks = [
        Line2D([], [], marker=MARKERS[v], color=COLOURS[v], linestyle="", label=v)
        for v in SYMBOLS
        if v in verdicts
    ]
    axes.legend(handles=marks, loc="lower center", ncols=3, bbox_to_anchor=(0.5, 1), borderaxespad=0.2)


def smooth(values: Array) -> Array:
    """The mean over a tenth of the values around each; fewer at the ends."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = (np.clip(np.arange(len(values)) + by, 0, len(values)) for by in (-half, half + 1))
    return (sums[last] - sums[first]) / (last - first)


def losses(place: int, title: str, curves: dict[str, list[list[float]]]) -> Markup:
    """Training loss over steps, one line per seed; `curves` maps a seed to [[step, loss], ...]."""
    name = f"loss-{place}"
    with style(name):
        figure = Figure(figsize=(4.2, 2.8))
        axes = figure.add_axes((0.14, 0.17, 0.83, 0.7))
        axes.grid(axis="y")
        for i, (seed, curve) in enumerate(curves.items()):
            few = curve[:: math.ceil(len(curve) / CURVE_POINTS)]
            dash = DASHES[i % len(DASHES)]
            steps, values = np.array(few).T
            axes.plot(steps, values, color=SERIES, linewidth=0.6, alpha=0.25)
            axes.plot(steps, smooth(values), dash, color=SERIES, linewidth=1.6, label=f"seed {seed}")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.legend(loc="upper right", labelcolor=MUTED)
        ends = "; ".join(f"seed {seed} ends at {curve[-1][1]:.3f}" for seed, curve in curves.items())
        return inline(figure, name, f"Training loss of {title}", ends)


def load(gate: GateFile, target: str, place: int = 0) -> Picture | None:
    """Latency at p95, the wait included, over the rate of requests; one line per variant."""
    loaded = [v for v in gate.variants if v.target == target and v.load]
    shown, name = select_variants(loaded, len(DASHES) * 2), f"load-{place}"
    if not shown:
        return None
    with style(name):
        figure = Figure(figsize=(7.4, 3.6))
        axes = figure.add_axes((0.11, 0.15, 0.62, 0.78))
        axes.grid(axis="y")
        descriptions = [_rates(axes, v, i) for i, v in enumerate(shown)]
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
        axes.set_xlabel("requests per second")
        axes.set_ylabel("p95 until the last token, ms")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), labelcolor=INK)
        svg = inline(figure, name, f"Latency under load on {target}", "; ".join(descriptions))
    few = f"{len(shown)} of {len(loaded)} variants are drawn." if len(shown) < len(loaded) else ""
    return Picture(svg, few)


def _rates(axes: Axes, variant: Variant, place: int) -> str:
    """Draws one variant, and says it."""
    assert variant.load is not None
    points = [(r.rate, r.p95.value) for r in variant.load.rates if r.p95.value is not None]
    colour, dash = (SERIES, COLOURS["INCONCLUSIVE"])[place // len(DASHES)], DASHES[place % len(DASHES)]
    axes.plot(
        [x for x, _ in points], [y for _, y in points], dash, marker="o", color=colour, label=variant.recipe
    )
    return f"{variant.recipe}: " + ", ".join(f"{significant(y)} ms at {x:g} a second" for x, y in points)
