"""Who answers for a variant on a target: a signed statement of the verdict and of all that it rests on.

    python -m eval.signoff --new-key FILE
    python -m eval.signoff --study runs/X --variant RECIPE --by NAME --key FILE
    python -m eval.signoff --study runs/X --verify --public FILE

What did not pass needs `--waive REASON --expires YYYY-MM-DD`. Exit codes of `--verify`: 0 all hold, 1 one
does not, 3 error. docs/release.md describes what is signed.
"""

import argparse
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from eval.core.artifacts import MANIFEST, verify_artifact, write_text
from eval.core.budget import load_budget
from eval.core.checks import STUDENT
from eval.core.commands import new_parser, study_from_command, write_json
from eval.core.errors import EXIT_FAIL, EXIT_PASS, UserError, entry
from eval.core.gate_file import GateFile
from eval.core.records import read_costs, read_scores
from eval.core.study import Study, load_study
from eval.signoff.keys import new_key, private_key, public_key, public_path
from eval.signoff.statement import (
    FOLDER,
    PREDICATE,
    TYPE,
    Digest,
    Predicate,
    Statement,
    Subject,
    Waiver,
    sign_statement,
)
from eval.signoff.verify import (
    REPORTS,
    artifacts,
    difference_from_records,
    policy,
    problems,
    read_gate,
    row_of,
    signable_verdict,
    signed_files,
    unmeasured,
)
from eval.stats.crossed import PASS, Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey


def recomputed_gate(run: Path, study: Study, budget: str | None) -> GateFile:
    """gate.json, after it was computed again from the records; what differs is named and refused."""
    gate = read_gate(run)
    if apart := difference_from_records(run, study, load_budget(study, budget), gate):
        named = f" --budget {budget}" if budget else ""
        raise UserError(f"gate.json of {run}", apart, f"run `python -m eval.gate --study {run}{named}` again")
    return gate


def build_waiver(verdict: Verdict, reason: str | None, expires: str | None, today: date) -> Waiver | None:
    """The waiver that a verdict needs.

    Raises:
        UserError: it passed and needs none, needs one that is not given, or the date is not to come.
    """
    if verdict == PASS:
        if reason or expires:
            raise UserError("--waive", "the verdict is PASS", "sign it without a waiver")
        return None
    if not (reason or "").strip() or not expires:
        fix = "do not ship it, or give --waive REASON and --expires YYYY-MM-DD"
        raise UserError("sign-off", f"the verdict is {verdict}", fix)
    try:
        day = date.fromisoformat(expires)
    except ValueError as error:
        raise UserError("--expires", repr(expires), "give a date as YYYY-MM-DD") from error
    if day <= today:
        raise UserError("--expires", expires, f"give a day after today, {today}")
    return Waiver(reason=reason, expires=day)


def refuse_old_clock(run: Path, now: datetime) -> None:
    """A sign-off cannot be older than what it rests on."""
    times = [r.provenance.time for r in read_scores(run)] + [r.provenance.time for r in read_costs(run)]
    newest = max(map(datetime.fromisoformat, times))
    if newest > now:
        raise UserError(
            "clock", f"it is {now}, a record is of {newest}", "set the clock of this machine right"
        )


def refuse_old_report(run: Path) -> None:
    """What people read must have been made from the gate.json that is signed, or after it."""
    judged_at = (run / "gate.json").stat().st_mtime_ns
    for path in (run / name for name in REPORTS):
        if path.is_file() and path.stat().st_mtime_ns < judged_at:
            raise UserError(
                f"report {path}", "older than gate.json", f"run python -m eval.report --study {run}"
            )


def build_statement(
    run: Path,
    *,
    recipe: str,
    target: str,
    by: str,
    signer: "CryptoSigner",
    budget: str | None = None,
    waive: str | None = None,
    expires: str | None = None,
    now: datetime,
) -> Statement:
    """The statement about one variant on one target of a run whose evidence is whole.

    Raises:
        UserError: the evidence is not whole, the target was not measured, or a waiver is missing.
    """
    study = load_study(run)
    gate = recomputed_gate(run, study, budget)
    row = row_of(gate, recipe, target)
    if missing := unmeasured(gate, row):
        raise UserError("sign-off", "not measured", missing)
    verdict, reason = signable_verdict(gate, row)
    refuse_old_clock(run, now)
    refuse_old_report(run)
    folders = artifacts(run, gate, recipe)
    for folder in folders.values():
        verify_artifact(folder)
    files = signed_files(run, gate, recipe)
    names = [(folders[place] / MANIFEST).relative_to(run).as_posix() for place in folders]
    subjects = [name for name, place in zip(names, folders, strict=True) if _is_subject(place, recipe)]
    predicate = Predicate(
        by=by,
        time=now.isoformat(timespec="seconds"),
        public_key=signer.public_key.keyval["public"],
        study=gate.study,
        config=gate.provenance.config,
        recipe=recipe,
        target=target,
        verdict=verdict,
        reason=reason,
        recommended=row.recommended,
        waiver=build_waiver(verdict, waive, expires, now.date()),
        policy=policy(study, load_budget(study, budget), budget, gate),
        test_set=gate.test_set.model_dump(mode="json") if gate.test_set else None,
        data=gate.provenance.data,
        artifacts={place: gate.provenance.artifacts[place] for place in folders},
        files=files,
    )
    subject = [Subject(name=name, digest=Digest(sha256=files[name])) for name in subjects]
    return Statement(type=TYPE, subject=subject, predicate_type=PREDICATE, predicate=predicate)


def _is_subject(place: str, recipe: str) -> bool:
    arm, _, variant = place.split("/", 2)
    return (arm, variant) == (STUDENT, recipe)


def sign(run: Path, args: argparse.Namespace) -> Path:
    signer = private_key(Path(args.key))
    statement = build_statement(
        run,
        recipe=args.variant,
        target=args.target,
        by=args.by,
        signer=signer,
        budget=args.budget,
        waive=args.waive,
        expires=args.expires,
        now=datetime.now(UTC),
    )
    path = run / FOLDER / f"{args.variant}-{args.target}.json"
    write_text(path, sign_statement(statement, signer))
    return path


def verification_text(
    path: Path, statement: Statement | None, problems: list[str], trusted: "SSlibKey | None"
) -> Text:
    """What --verify says of one sign-off."""
    if problems or statement is None:
        reasons = (f"\n  {text}" for text in problems)
        return Text.assemble(f"{path}: ", ("does not hold", "bold red"), *reasons)
    predicate = statement.predicate
    by = f"signed by {predicate.by} on {predicate.time}, by budget {predicate.policy.name}"
    lines = [f"{predicate.verdict} of {predicate.recipe} on {predicate.target}, {by}"]
    if predicate.waiver:
        lines.append(f"waived until {predicate.waiver.expires}: {predicate.waiver.reason}")
    if trusted is None:
        lines.append("by a key that it names itself: give --public FILE to know that it is the signer's")
    return Text.assemble(f"{path}: ", ("holds", "bold green"), *(f"\n  {text}" for text in lines))


def verify(run: Path, trusted: "SSlibKey | None", today: date, console: Console) -> list[str]:
    """Checks every sign-off of a run, prints what was found and returns the problems, each with its file."""
    paths = sorted((run / FOLDER).glob("*.json"))
    if not paths:
        raise UserError(f"sign-offs of {run}", "there are none", "sign a variant first")
    every: list[str] = []
    for path in paths:
        statement, problem_texts = problems(path, run, trusted, today)
        every += [f"{path}: {text}" for text in problem_texts]
        console.print(verification_text(path, statement, problem_texts, trusted), soft_wrap=True)
    return every


def arguments() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--new-key", metavar="FILE", help="make a private key, and FILE.pub, and end")
    parser.add_argument("--variant", help="the recipe that is signed")
    parser.add_argument("--target", default="cpu", help="the target on which it is (default: cpu)")
    parser.add_argument("--by", help="who signs")
    parser.add_argument("--key", help="the signer's private key")
    parser.add_argument("--waive", metavar="REASON", help="sign what did not pass, for this reason")
    parser.add_argument("--expires", metavar="YYYY-MM-DD", help="the last day of the waiver")
    parser.add_argument("--budget", help="the budget that gate.json was made with, if not the study's")
    parser.add_argument("--verify", action="store_true", help="check the sign-offs of the run")
    parser.add_argument("--public", help="the signer's public key: only this one is trusted")
    return parser


@entry
def main() -> int:
    first = argparse.ArgumentParser(add_help=False)  # a key belongs to no study
    first.add_argument("--new-key")
    if key_path := first.parse_known_args()[0].new_key:
        key = new_key(Path(key_path))
        print(f"private key {key_path}, public key {public_path(Path(key_path))}, id {key.keyid[:12]}")
        return EXIT_PASS
    study, args = study_from_command(arguments(), measures=True)
    run = study.folder
    if args.verify:
        trusted = public_key(Path(args.public)) if args.public else None
        failures = verify(run, trusted, datetime.now(UTC).date(), Console())
        write_json(args.json, {"holds": not failures, "problems": failures})
        return EXIT_FAIL if failures else EXIT_PASS
    for name in ("variant", "by", "key"):
        if not (getattr(args, name) or "").strip():
            raise UserError(f"--{name}", "missing", "give --variant, --by and --key, or --verify")
    path = sign(run, args)
    print(f"signed {path}; check it with python -m eval.signoff --study {run} --verify")
    write_json(args.json, {"signed": str(path)})
    return EXIT_PASS


if __name__ == "__main__":
    main()
