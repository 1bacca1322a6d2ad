"""`python -m eval.challenge --study STUDY`: does the idea survive when one thing is changed at a time?

Every row is the study again with one change (learning rate, data, seeds, size, a part left out, a method that
does nothing), trained and scored beside the others in `runs/NAME-challenge/`, the cheapest first. The same
documents are scored damaged too, at several doses, for which nothing is trained. What a
row shares with the study is not made again; a command that was stopped goes on where it was. The claim of a
row is that of the study's budget: at least f of the teacher's gain is kept, over the control.
"""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from eval.challenge.doses import PICTURE, doses_of, draw, sentences, table
from eval.challenge.outcome import (
    COLLAPSES,
    ChallengeFile,
    Claim,
    Dose,
    Outcome,
    best_ce_train,
    claims_of,
    conclude,
    judge_claims,
    rare_failures,
    read_evidence,
    rival_claims,
)
from eval.challenge.rows import DAMAGED, SAME, Row, plan_rows
from eval.challenge.runs import run_study, share_artifacts
from eval.core.artifacts import write_text
from eval.core.budget import Budget
from eval.core.checks import check_plan
from eval.core.commands import new_console, new_parser, stamp_line, study_from_command, write_json
from eval.core.errors import UserError, entry
from eval.core.sections.classification import in_words
from eval.core.study import Study, check_trained, study_text
from eval.gate.evidence import Evidence
from eval.report.format import bounds_text


@dataclass
class Challenge:
    """The rows of one study in their folder, and of each that is done what was measured."""

    study: Study
    folder: Path
    rows: list[Row]
    evidence: dict[str, Evidence] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        parent = self.folder / "study.yaml"
        write_text(parent, study_text(self.study))
        self.studies = {row.name: row.study(parent, self.folder) for row in self.rows}
        for study in self.studies.values():
            check_plan(study)  # before the first is trained

    def run(self, stop: bool = False) -> list[str]:
        """Runs every row that is not done, or until one collapses; returns the names of those left out."""
        done = {row.name: read_done(self.studies[row.name]) for row in self.rows}
        left = [row.name for row in self.rows if done[row.name] is None]
        start, count = time.monotonic(), 0
        for place, row in enumerate(self.rows):
            if row.name in left:
                self._run_row(row)
                count += 1
                seconds = time.monotonic() - start
                rest = seconds / count * (len(left) - count)
                print(
                    f"challenge: {row.what} done, {place + 1} of {len(self.rows)}, {seconds:.0f} s, "
                    f"about {rest:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )
            evidence, self.budget = done[row.name] or read_evidence(self.studies[row.name])
            self.evidence[row.name] = evidence
            self.claims += claims_of(row.name, row.what, evidence, self.budget)
            if stop and any(one.verdict == COLLAPSES for one in judge_claims(self.claims, self.budget.alpha)):
                return [later.name for later in self.rows[place + 1 :]]
        return []

    def outcomes(self) -> list[Outcome]:
        """Of every row that was run, and of the rivals at their best rate."""
        claims = [*self.claims, *rival_claims(self.evidence, self.budget)]
        return judge_claims(claims, self.budget.alpha)

    def doses(self) -> list[Dose]:
        """Of the validation documents, damaged; none where that row was left out."""
        return doses_of(self.evidence.get(DAMAGED, self.evidence[SAME]), self.budget)

    def _run_row(self, row: Row) -> None:
        run = self.studies[row.name].folder
        source = self.folder / SAME if row.name != SAME else self.study.folder
        if not run.exists() and (source / "study.yaml").is_file():
            share_artifacts(source, run)
        run_study(self.studies[row.name])


def read_done(study: Study) -> tuple[Evidence, Budget] | None:
    """What was measured of a study; None where it is not trained and scored as it is set."""
    try:
        check_trained(study)
        return read_evidence(study)
    except UserError:  # it is run, and then read again
        return None


def show(outcomes: list[Outcome], task: str, console: Console) -> None:
    shown = Table(
        "what was changed",
        "teacher's gain",
        "lead of S1",
        "share",
        "claim",
        "verdict",
        title=in_words("bits per byte, each with its bounds at alpha", task),
    )
    for one in outcomes:
        share = "-" if one.share is None else f"{one.share[0]:.2f} [{one.share[1]:.2f}, {one.share[2]:.2f}]"
        verdict = f"{one.verdict}: {one.needs}" if one.needs else one.verdict
        shown.add_row(one.what, bounds_text(one.gain), bounds_text(one.lead), share, one.claim, verdict)
    console.print(shown)
    console.print(stamp_line("challenged"), soft_wrap=True)


@entry
def main() -> None:
    parser = new_parser(__doc__)
    about = "one more row: NAME=--KEY VALUE ..., keys of the study; may be given several times"
    parser.add_argument("--row", action="append", default=[], metavar="ROW", help=about)
    parser.add_argument(
        "--first-collapse", action="store_true", help="stop after the first row that collapses"
    )
    study, args = study_from_command(parser, trained=False, measures=True)
    rows, skipped = plan_rows(study, args.row)
    folder = study.folder.with_name(f"{study.name}-challenge")
    challenge = Challenge(study, folder, rows)
    left = challenge.run(args.first_collapse)
    outcomes = challenge.outcomes()
    sentence = conclude(outcomes)
    console = new_console()
    show(outcomes, study.task, console)
    notes = rare_failures(challenge.evidence[SAME])
    if doses := challenge.doses():
        console.print(table(doses, study.task))
        draw(doses, challenge.budget, study.task, folder / PICTURE)
        notes += [*sentences(doses, challenge.budget), f"a picture of it: {folder / PICTURE}"]
    if own := best_ce_train(challenge.evidence):
        text = yaml.safe_dump({"ce_train": own}, default_flow_style=True, width=math.inf).strip()
        notes.append(f"CE has its best rate of those tried with this in the study: {text[1:-1]}")
    notes += [f"not run, because a row before collapsed: {name}" for name in left]
    notes += [f"not tried: {what}: {why}" for what, why in skipped.items()]
    for note in notes:
        print(note)
    print(f"{study.name} {sentence}")
    result = ChallengeFile(
        study=study.name,
        config=study.hash(),
        verdict=sentence,
        rows=outcomes,
        doses=doses,
        ce_train=own,
        notes=notes,
    )
    write_json(folder / "challenge.json", result)
    write_json(args.json, result)


if __name__ == "__main__":
    main()
