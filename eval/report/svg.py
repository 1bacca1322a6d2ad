"""What the report's pictures share: deterministic SVG whose colours and fonts the page decides."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

# Colours that stand for variables of the page: matplotlib writes them, `inline` replaces them.
INK, MUTED, GRID, PANEL = "#010101", "#020202", "#030303", "#040404"
COLOURS = {"PASS": "#050505", "FAIL": "#060606", "INCONCLUSIVE": "#070707"}
SERIES, SOFT = "#080808", "#090909"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PANEL: "panel",
    SERIES: "accent",
    SOFT: "soft",
    COLOURS["PASS"]: "pass",
    COLOURS["FAIL"]: "fail",
    COLOURS["INCONCLUSIVE"]: "unsure",
}
MARKERS = {"PASS": "o", "FAIL": "X", "INCONCLUSIVE": "D"}
SHOWN = 24  # more rows or labels cannot be read in one picture
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


@dataclass(frozen=True)
class Picture:
    """A picture, and what must be said where not everything could be drawn."""

    svg: Markup
    note: str = ""


@contextmanager
def style(name: str) -> Iterator[None]:
    """The report's style; `name` salts the ids, so that two pictures of one page share none."""
    settings: Any = {**STYLE, "svg.hashsalt": name}  # matplotlib types every key on its own
    with mpl.rc_context(settings), warnings.catch_warnings():
        # Text stays text: the reader's own fonts draw it, and matplotlib's need not hold the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def opening(name: str, title: str, text: str, width: float, height: float) -> Markup:
    """The first tags of a picture: `title` names it and `text` describes it to those who cannot see it."""
    place = re.sub(r"\W", "-", name)
    return Markup(
        f'<svg role="img" aria-labelledby="{place}-title" aria-describedby="{place}-text" '
        f'viewBox="0 0 {width:g} {height:g}"><title id="{place}-title">{escape(title)}</title>'
        f'<desc id="{place}-text">{escape(text)}</desc>'
    )


def inline(figure: Figure, name: str, title: str, text: str) -> Markup:
    """Inline SVG of `figure`, with the page's variables for colours."""
    out = io.StringIO()
    blank = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(out, format="svg", transparent=True, metadata=blank)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href=", "href=")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    width, height = figure.get_size_inches() * 72
    top = opening(name, title, text, width, height)
    return Markup(re.sub(r"<svg[^>]*>", lambda _: top, svg, count=1))
