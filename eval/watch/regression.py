"""Did the method's gain regress, or did everything get worse? Pure functions of bits per document.

On new documents every model may do worse. What the method is worth is what it saves against its control and
the fallback on the same documents, paired; how hard the documents are is what the fallback says of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.core.gate_file import Estimate
from eval.release.contract_file import Bits, Gain, Of, Saving, over_documents
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict, cluster_bounds, t_quantile

Array = NDArray[np.float64]
HARDER = (
    0.05  # of the fallback's bits per byte at the release: so much more is harder, within it is as before
)


@dataclass(frozen=True)
class Finding:
    """One figure when it was released and now."""

    name: str
    before: Estimate
    now: Estimate
    change: Estimate  # between bounds at alpha, documents of then and now sampled apart
    floor: float | None = None
    verdict: Verdict | None = None  # null where the contract has no floor
    reason: str = ""

    @property
    def rose(self) -> bool:
        return self.change.low is not None and self.change.low > 0

    @property
    def fell(self) -> bool:
        return self.change.high is not None and self.change.high < 0


def change(before: ArrayLike, now: ArrayLike, alpha: float) -> Estimate:
    """Difference of two means over documents that were sampled apart (Welch 1947), with bounds at alpha."""
    a, b = np.asarray(before, float), np.asarray(now, float)
    point = float(b.mean() - a.mean())
    if min(len(a), len(b)) < 2:
        return Estimate(point=point, low=None, high=None)
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    if (total := float(parts.sum())) == 0:
        return Estimate(point=point, low=point, high=point)
    nu = total**2 / float((parts**2 / [len(a) - 1, len(b) - 1]).sum())
    half = t_quantile(alpha, nu) * total**0.5
    return Estimate(point=point, low=point - half, high=point + half)


def check_saving(name: str, before: Array, now: Array, floor: float | None, alpha: float) -> Finding:
    """What is saved, held against its floor with one-sided bounds over documents."""
    then, since = over_documents(before, alpha), over_documents(now, alpha)
    base = Finding(name, then, since, change(before, now, alpha), floor)
    if floor is None:
        return base
    bounds = cluster_bounds(now, alpha)
    verdict: Verdict
    if bounds is None:
        verdict, reason = INCONCLUSIVE, "one document, or one group, says nothing about others"
    elif bounds[0] == bounds[1]:
        verdict, reason = INCONCLUSIVE, "all documents say the same: that is no sample of others"
    elif bounds[0] >= floor:
        verdict, reason = PASS, f"at least {bounds[0]:.3f}, promised {floor:.3f}"
    elif bounds[1] < floor:
        verdict, reason = FAIL, f"at most {bounds[1]:.3f}, promised {floor:.3f}"
    else:
        verdict, reason = INCONCLUSIVE, f"between {bounds[0]:.3f} and {bounds[1]:.3f}, promised {floor:.3f}"
    return Finding(name, base.before, base.now, base.change, floor, verdict, reason)


def findings(gain: Gain, before: Bits, now: Bits, alpha: float) -> list[Finding]:
    """How hard the documents are for each model, then what the release saves over the two others."""
    levels = [
        Finding(
            f"{of}, bits per byte", over_documents(a, alpha), over_documents(b, alpha), change(a, b, alpha)
        )
        for of in ("release", "control", "fallback")
        for a, b in [(before.level(of), now.level(of))]
    ]
    savings: dict[Of, Saving] = {"control": gain.over_control, "fallback": gain.over_fallback}
    return levels + [
        check_saving(f"saved over the {of}", before.over(of), now.over(of), saving.floor, alpha)
        for of, saving in savings.items()
    ]


def verdict(findings: list[Finding]) -> Verdict:
    """Every floor must hold; one that is missed decides."""
    verdicts = [finding.verdict for finding in findings if finding.verdict]
    return FAIL if FAIL in verdicts else INCONCLUSIVE if INCONCLUSIVE in verdicts else PASS


def about_as_before(fallback: Finding, moved: str) -> str:
    """What to say of a fallback that was not shown to do better or worse."""
    low, high, meant = fallback.change.low, fallback.change.high, HARDER * (fallback.before.point or 0.0)
    if low is None or high is None:
        return f"whether the fallback does as well as before cannot be told ({moved}, without bounds)"
    between = f"({moved}; between {low:+.3f} and {high:+.3f})"
    if max(-low, high) > meant:
        wide = f"that is within {meant:.3f}, {100 * HARDER:.0f} %"
        return f"whether the fallback does as well as before, {wide}, cannot be told {between}"
    return f"the fallback does about as well as before {between}"


def diagnosis(findings: list[Finding]) -> str:
    """One sentence: what became of the gain, and what of everything."""
    fallback = next(finding for finding in findings if finding.name.startswith("fallback"))
    gains = [finding for finding in findings if finding.floor is not None]
    broken = [finding for finding in gains if finding.verdict == FAIL]
    unsure = [finding for finding in gains if finding.verdict == INCONCLUSIVE]
    less = [finding for finding in gains if finding.fell]
    moved = f"{fallback.change.point:+.3f} bits per byte"
    if fallback.rose:
        world = f"everything got worse, the fallback too ({moved})"
    elif fallback.fell:
        world = f"the fallback does better than before ({moved})"
    else:
        world = about_as_before(fallback, moved)
    if broken:
        regressed = f"the method's gain has regressed ({broken[0].name}: {broken[0].reason})"
        return f"{regressed}, and {world}" if fallback.rose else f"{regressed}, while {world}"
    if unsure:
        return f"whether the gain holds is open ({unsure[0].name}: {unsure[0].reason}); {world}"
    if less:
        loss = f"{less[0].change.point:+.3f} bits per byte {less[0].name}"
        return f"the gain is smaller than when it was released ({loss}) and still what was promised; {world}"
    return f"the gain holds; {world}"
