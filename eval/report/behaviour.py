"""What recipes do beside bits per byte, as cells: behaviour, classes, tasks. Nothing is decided here."""

from eval.core.gate_file import Difference, Estimate, GateFile, Quality
from eval.core.records import PLAIN, VALIDATION
from eval.report.format import ARMS, MISSING, NOT_MEASURED, Cell, estimate_cell, fixed, significant

AGREEMENT = "flips and KL"  # what `how` of a quality calls them


def difference_cell(value: Difference | None, missing: str = MISSING) -> Cell:
    """A difference from the uncompressed student with its interval, and what mere reruns differ by."""
    if value is None:
        return Cell(missing)
    span = f"[{significant(value.low)}, {significant(value.high)}]"
    return Cell(significant(value.value), (span, f"noise {significant(value.floor)}"), value=value.value)


BEHAVIOUR = [
    "next token right, validation",
    "calibration error, validation",
    "flips against plain, share",
    "KL against plain, bits/token",
    "slice that retains least",
]


def behaviour_cells(gate: GateFile) -> dict[str, list[Cell]]:
    """Recipe -> the cells of `BEHAVIOUR`; what there is nothing to measure of has no words."""

    def figure(estimates: dict[str, Estimate]) -> Cell:
        return estimate_cell(estimates[VALIDATION]) if VALIDATION in estimates else Cell(NOT_MEASURED)

    def against_plain(quality: Quality) -> list[Cell]:
        missing = NOT_MEASURED if AGREEMENT in quality.how else MISSING
        return [difference_cell(value, missing) for value in (quality.flips, quality.kl)]

    return {
        recipe: [
            *(figure(estimates) for estimates in (quality.accuracy, quality.calibration_error)),
            *against_plain(quality),
            Cell(quality.worst_slice or MISSING),
        ]
        for recipe, quality in gate.quality.items()
    }


CLASSES = ["texts", "accuracy", "F1", "false alarms", "Brier", "calibration error"]


def class_rows(gate: GateFile) -> list[tuple[str, str, list[Cell]]]:
    """Slice, or a domain in it; model; the cells of `CLASSES`. Nothing where texts have no labels."""
    rows = []
    for one in gate.classes:
        place = one.slice if one.domain is None else f"{one.slice}, {one.domain}"
        rates = [
            Cell(MISSING) if value is None else estimate_cell(value) for value in (one.f1, one.false_alarms)
        ]
        unknown = NOT_MEASURED if one.domain is None else MISSING  # the error of a domain is not estimated
        error = unknown if one.calibration_error is None else fixed(one.calibration_error)
        numbers = [fixed(one.brier), error]
        cells = [Cell(str(one.texts)), estimate_cell(one.accuracy), *rates, *map(Cell, numbers)]
        rows.append((place, one.arm if one.recipe == PLAIN else f"{one.arm}, {one.recipe}", cells))
    return rows


def task_arms(gate: GateFile) -> list[str]:
    """Arms that are scored on tasks."""
    scored = {arm for quality in gate.quality.values() for scores in quality.tasks.values() for arm in scores}
    return [arm for arm in ARMS if arm in scored]


def task_rows(gate: GateFile) -> list[tuple[str, str, list[Cell]]]:
    """Recipe, task, and the mean score of each of `task_arms`."""
    arms = task_arms(gate)

    def cell(scores: dict[str, Estimate | None], arm: str) -> Cell:
        if arm not in scores:
            return Cell(MISSING)
        return Cell(NOT_MEASURED) if (score := scores[arm]) is None else estimate_cell(score)

    return [
        (recipe, task, [cell(scores, arm) for arm in arms])
        for recipe, quality in gate.quality.items()
        for task, scores in quality.tasks.items()
    ]
