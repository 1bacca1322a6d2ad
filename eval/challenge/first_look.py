"""`python -m eval.challenge.first_look ours/method.py`: is there a gain, and does a student take any of it?

The cheapest test of an idea, a minute or two on two cores: the study configs/studies/try.yaml with your
method, on small models and Python's standard library. It ends in one screen and a picture, with what so small
a study can see. What it does not see may be there; what it sees is no verdict. The next step is a study.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from eval.challenge.outcome import Claim, Outcome, judge_claims, read_evidence
from eval.challenge.runs import run_study
from eval.core.budget import Budget
from eval.core.checks import CE, check_plan
from eval.core.commands import add_json, add_keys_help, new_console, new_parser, stamp_line, write_json
from eval.core.errors import UserError, entry
from eval.core.gate_file import Estimate
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import Study, load_study
from eval.gate.evidence import Evidence
from eval.gate.quality import GAIN, GAIN_OVER_CE, kept_gain
from eval.report.svg import INK, style
from eval.stats.crossed import crossed_mean
from eval.stats.power import components, effect_for

STUDY, PICTURE = "try", "first_look.svg"


def find_module(method: str) -> tuple[str, Path | None]:
    """The name of a method in a study, and the folder from which it is imported, for a file's path.

    Raises:
        UserError: there is no such file, or its name cannot be imported.
    """
    if not method.endswith(".py"):
        return method, None
    path = Path(method).resolve()
    if not path.is_file():
        raise UserError(f"method {method}", "no such file", "give a method's file, or its name in a study")
    if not (path.stem.isidentifier() and path.parent.name.isidentifier()):
        problem = f"{path.parent.name}.{path.stem} cannot be imported"
        raise UserError(f"method {method}", problem, "call file and folder by letters, digits and _")
    return f"{path.parent.name}.{path.stem}", path.parent.parent


def look(evidence: Evidence, budget: Budget) -> list[Outcome]:
    """The three contrasts of a first look, each tested against 0 on the validation documents."""
    gain = evidence.gain(VALIDATION, GAIN)
    contrasts = [
        ("T1 - T0: the method's gain in its teacher", GAIN),
        ("S1 - S0: what a student takes of it", kept_gain(PLAIN)),
        *([("S1 - CE: over plain training", GAIN_OVER_CE)] if CE in evidence.arms else []),
    ]
    claims = []
    for what, contrast in contrasts:
        table = evidence.gain(VALIDATION, contrast)
        share = contrast == kept_gain(PLAIN)
        claims.append(Claim(what, what, "above 0", gain, table, table, share=share))
    return judge_claims(claims, budget.alpha)


def least_effect(evidence: Evidence, budget: Budget) -> dict[str, float]:
    """Bits per byte that a gain must have so that this plan sees it four times in five; NaN: never."""
    effects = {}
    for name, contrast in (("gain", GAIN), ("student", kept_gain(PLAIN))):
        table = evidence.gain(VALIDATION, contrast)
        known = not crossed_mean(table).problem
        s, c = table.shape
        effects[name] = float(effect_for(components(table), s, c, budget.alpha)) if known else float("nan")
    return effects


def draw(evidence: Evidence, budget: Budget, path: Path) -> None:
    """Bits per byte of every arm with the bounds at alpha: lower is better."""
    with style("first-look"):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        for place, arm in enumerate(evidence.arms):
            mean = crossed_mean(evidence.scores(VALIDATION, arm))
            low, high = mean.bounds(budget.alpha)
            axes.plot([mean.point], [place], "o", color=INK)
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], "-", color=INK)
        axes.set_yticks(range(len(evidence.arms)), evidence.arms)
        axes.invert_yaxis()
        axes.set_xlabel("bits per byte on validation documents, lower is better")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def show(study: Study, outcomes: list[Outcome], effects: dict[str, float]) -> None:
    table = Table("", "bits/byte", "bounds", "p", title=f"{study.method.name}: a first look")
    for one in outcomes:
        table.add_row(
            one.what,
            f"{one.lead.point:+.4f}",
            _interval(one.lead),
            "-" if one.lead.p is None else f"{one.lead.p:.2g}",
        )
    new_console().print(table)
    print(stamp_line("looked at"))
    student = outcomes[1]
    if student.share is not None:
        point, low, high = student.share
        print(f"share of the gain that the student keeps: {point:.2f} [{low:.2f}, {high:.2f}]")
    plan = f"{student.seeds} seeds and {student.clusters} clusters of documents"
    print(
        f"seen four times in five by {plan}: a gain of the teacher of {effects['gain']:.3f} bits/byte, "
        f"a lead of the student of {effects['student']:.3f}"
    )


def _interval(bounds: Estimate) -> str:
    if bounds.low is None or bounds.high is None:
        return "cannot be had"
    return f"{bounds.low:+.4f} to {bounds.high:+.4f}"


@entry
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("method", help="the file of a method, or the name that a study gives it")
    parser.add_argument("--settings", default="{}", metavar="YAML", help="method.settings (default: none)")
    add_json(parser)
    add_keys_help(parser)
    args, words = parser.parse_known_args()
    name, path = find_module(args.method)
    if path is not None:
        sys.path.insert(0, str(path))
    study = load_study(STUDY, ["--method", f"{{name: {name}, settings: {args.settings}}}", *words])
    check_plan(study)
    run_study(study, path)
    evidence, budget = read_evidence(study)
    outcomes, effects = look(evidence, budget), least_effect(evidence, budget)
    show(study, outcomes, effects)
    draw(evidence, budget, study.folder / PICTURE)
    print(study.folder / PICTURE)
    write_json(args.json, {"method": name, "contrasts": outcomes, "effect_for_80": effects})


if __name__ == "__main__":
    main()
