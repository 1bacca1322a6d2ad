"""The same validation documents, damaged ever more: what is left of the gain, and of the student's lead.

A dose-response curve by kind of damage. Doses are slices of `data.corruptions`; nothing is trained for them.
They are told beside the verdict of a challenge and no part of it: a budget asks nothing of damaged documents,
unless it names such a slice; then that is a row like that of every slice.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from eval.challenge.outcome import Dose, claim_on, judge_claims
from eval.core.budget import Budget
from eval.core.checks import CONTROL, FALLBACK, STUDENT
from eval.core.gate_file import Estimate
from eval.core.records import VALIDATION
from eval.core.sections.classification import in_words
from eval.core.sections.corruption import DAMAGED
from eval.gate.evidence import Contrast, Evidence
from eval.report.format import bounds_text
from eval.report.svg import GRID, INK, MUTED, style

PICTURE = "doses.svg"


def doses_of(evidence: Evidence, budget: Budget) -> list[Dose]:
    """Of each kind of damage every dose, from none at all upwards; nothing where no document was damaged."""
    corruptions = sorted(evidence.study.data.corruptions, key=lambda one: one.strength)
    places = []
    for kind in dict.fromkeys(one.kind for one in evidence.study.data.corruptions):
        places.append((kind, 0.0, VALIDATION))
        places += [(kind, one.strength, one.slice) for one in corruptions if one.kind == kind]
    claims = [claim_on(evidence, name, budget.f) for _, _, name in places]
    outcomes = judge_claims(claims, budget.alpha)
    doses = []
    for (kind, strength, name), outcome in zip(places, outcomes, strict=True):
        worst, control = _worst(evidence, name)
        doses.append(
            Dose(
                kind=kind,
                strength=strength,
                slice=name,
                gain=outcome.gain,
                lead=outcome.lead,
                share=outcome.share,
                p=outcome.p,
                worst=worst,
                worst_control=control,
            )
        )
    return doses


def _worst(evidence: Evidence, name: str) -> tuple[float, float]:
    """Over the base, the student where it lost most of all clusters, and the control there."""
    sizes = evidence.clusters[name].sums(evidence.bytes)
    ours, control = (
        evidence.saved_bits(name, Contrast(arm, FALLBACK)).mean(0) / sizes for arm in (STUDENT, CONTROL)
    )
    place = int(np.argmin(ours))
    return float(ours[place]), float(control[place])


def by_kind(doses: list[Dose]) -> dict[str, list[Dose]]:
    kinds: dict[str, list[Dose]] = {}
    for dose in doses:
        kinds.setdefault(dose.kind, []).append(dose)
    return kinds


def sentences(doses: list[Dose], budget: Budget) -> Iterator[str]:
    """Of each kind up to which dose the claims are shown.

    The doses are tested in ascending order, each at alpha, and the first that is not shown ends the search:
    the chance that too large a dose is named is at most alpha (tests in a fixed order, Maurer et al. 1995).
    """
    for kind, of_kind in by_kind(doses).items():
        share = _shown([dose.p for dose in of_kind], of_kind, budget.alpha)
        lead = _shown([1.0 if (p := dose.lead.p) is None else p for dose in of_kind], of_kind, budget.alpha)
        kept = f"at least {budget.f:g} of the gain is shown {share}"
        yield f"{kind}: {kept}; a lead of S1 over S0 {lead}"


def _shown(values: list[float], doses: list[Dose], alpha: float) -> str:
    last = None
    for dose, p in zip(doses, values, strict=True):
        if p > alpha:
            break
        last = dose
    if last is None:
        return "not even without damage"
    return f"up to {_text(last)}" if last.strength else "without damage alone"


def _text(dose: Dose) -> str:
    return f"{100 * dose.strength:g} % of {DAMAGED[dose.kind]}" if dose.strength else "no damage"


def table(doses: list[Dose], task: str) -> Table:
    """A row for each dose."""
    title = in_words("the same documents, damaged: bits per byte, with bounds at alpha", task)
    shown = Table(
        "damage", "teacher's gain", "lead of S1", "share", "worst cluster: S1 (S0) over B", title=title
    )
    for kind, of_kind in by_kind(doses).items():
        for dose in of_kind:
            share = "-" if dose.share is None else "{:.2f} [{:.2f}, {:.2f}]".format(*dose.share)
            worst = f"{dose.worst:+.3f} ({dose.worst_control:+.3f})"
            cells = bounds_text(dose.gain), bounds_text(dose.lead), share, worst
            shown.add_row(f"{kind}: {_text(dose)}", *cells)
    return shown


def draw(doses: list[Dose], budget: Budget, task: str, path: Path) -> None:
    """Left the gain, the lead and the worst cluster by dose; right the share. A row for each kind."""
    kinds = by_kind(doses)
    with style("doses"):
        figure = Figure(figsize=(8, 2.6 * len(kinds)), layout="constrained")
        grid = figure.subplots(len(kinds), 2, squeeze=False)
        for (bits, share), (kind, of_kind) in zip(grid, kinds.items(), strict=True):
            _line(bits, [dose.gain for dose in of_kind], "T1 - T0", MUTED, "--")
            _line(bits, [dose.lead for dose in of_kind], "S1 - S0", INK, "-")
            worst = [dose.worst for dose in of_kind]
            bits.plot(range(len(worst)), worst, "x:", color=MUTED, label="S1 - B, worst cluster")
            bits.axhline(0, color=GRID, linewidth=1)
            bits.set_ylabel(in_words("bits/byte", task))
            bits.legend(fontsize=8)
            points = [Estimate(point=s[0], low=s[1], high=s[2]) if (s := d.share) else None for d in of_kind]
            _line(share, points, "share of the gain", INK, "-")
            share.axhline(budget.f, color=MUTED, linewidth=1, linestyle="--")
            share.set_ylabel("share of the gain")
            for axes in (bits, share):
                axes.set_xticks(range(len(of_kind)), [f"{100 * dose.strength:g} %" for dose in of_kind])
                axes.set_xlabel(f"{kind}: share of {DAMAGED[kind]}")
        figure.savefig(path, format="svg", metadata={"Date": None})


def _line(axes: Axes, values: list[Estimate | None], label: str, colour: str, dashes: str) -> None:
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    axes.plot(
        [place for place, _ in known],
        [value.point for _, value in known],
        f"o{dashes}",
        color=colour,
        label=label,
        markersize=4,
    )
    for place, value in known:
        if value.low is not None and value.high is not None:
            axes.plot([place, place], [value.low, value.high], "-", color=colour, linewidth=1)
