"""The page of a watched release: what it saves and how hard the texts are, look by look; opens offline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from eval.release.contract_file import Bits, Contract
from eval.report.svg import GRID, MUTED, SERIES, inline, style
from eval.stats.drift import QUESTIONS
from eval.stats.sequential import half_widths
from eval.watch.history import Array, Look, series_of
from eval.watch.regression import HARDER
from eval.watch.sequences import PARTS, look_count

DAYS = 6  # that can be read side by side
TEMPLATES = Path(__file__).parent / "templates"


def by_look(looks: list[Look], of: str, alpha: float) -> tuple[Array, Array, Array]:
    """[looks] the mean of each look, and the bounds of everything up to it."""
    means, lows, highs = [], [], []
    for number in range(1, len(looks) + 1):
        series, alone = series_of(looks[:number]), series_of(looks[number - 1 : number])
        values, own = (
            part.bits.level("fallback") if of == "level" else part.bits.over(of)  # type: ignore[arg-type]
            for part in (series, alone)
        )
        half = float(half_widths(len(values), alpha, series.tuned)) * float(
            values.std(ddof=1) if len(values) > 1 else 0
        )
        means.append(float(own.mean()))
        lows.append(float(values.mean()) - half if half > 0 else np.nan)
        highs.append(float(values.mean()) + half if half > 0 else np.nan)
    return np.array(means), np.array(lows), np.array(highs)


def picture(
    name: str, looks: list[Look], lines: Sequence[tuple[float, str]], alpha: float, title: str
) -> Markup:
    """One figure over the looks, with the lines that it is held against."""
    means, low, high = (np.where(np.isfinite(x), x, np.nan) for x in by_look(looks, name, alpha))
    at = np.arange(1, len(looks) + 1)
    with style(f"monitor-{name}"):
        figure = Figure(figsize=(7, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(at, low, high, color=GRID, alpha=0.5, linewidth=0)
        axes.plot(at, means, "o-", color=SERIES, markersize=4, linewidth=1)
        for y, label in lines:
            axes.axhline(y, color=MUTED, linewidth=1, linestyle="--")
            axes.annotate(label, (1, y), xytext=(2, 2), textcoords="offset points", color=MUTED, fontsize=8)
        shown = at[:: -(-len(at) // DAYS)]
        axes.set_xticks(shown, [looks[i - 1].day for i in shown], fontsize=8)
        axes.set_ylabel("bits/byte")
        last = "" if not len(means) else f"; at the last look {means[-1]:.3f}"
        return inline(figure, f"monitor-{name}", title, f"{title}, {look_count(len(looks))}{last}")


def page_of(
    contract: Contract,
    target: str,
    before: Bits,
    looks: list[Look],
    parts: Sequence[Any],
    share: float,
    notes: Sequence[str] = (),
) -> str:
    """The page, whole; `notes` say which domains are not judged by themselves."""
    level = contract.alpha / PARTS
    pictures: dict[str, Markup] = {}  # title -> picture
    for of in ("control", "fallback"):
        was = float(before.over(of).mean())
        lines = [(was, "when released"), (share * was, f"{100 * share:.0f} % of it")]
        title = f"Saved over the {of}, bits per byte"
        pictures[title] = picture(of, looks, lines, level, title)
    usual = float(before.level("fallback").mean())
    lines = [(usual, "when released"), (usual * (1 + HARDER), f"{100 * HARDER:.0f} % more")]
    title = "How hard the texts are for the fallback, bits per byte"
    pictures[title] = picture("level", looks, lines, level, title)
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return templates.get_template("monitor.html.j2").render(
        contract=contract,
        target=target,
        looks=looks,
        look_count=look_count(len(looks)),
        parts=parts,
        pictures=pictures,
        notes=notes,
        questions=QUESTIONS,
    )
