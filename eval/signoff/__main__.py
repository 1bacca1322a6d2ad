"""Who answers for a variant on a target: a signed statement of the verdict and of all that it rests on.

    python -m eval.signoff --new-key FILE [--by NAME] [--kind p256]
    python -m eval.signoff --study runs/X --variant RECIPE --by NAME --key FILE
    python -m eval.signoff --study runs/X --verify --public FILE ...

A signature is added to those that are there. What did not pass, or was judged by another budget than the one
fixed when training began, needs `--waive REASON --expires YYYY-MM-DD`, and as many signatures as the budget
says. Exit codes of `--verify`: 0 all hold, 1 one does not, 3 error.
docs/release.md describes what is signed.
"""

import argparse
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.text import Text

from eval.core.artifacts import MANIFEST, verify_artifact, write_text
from eval.core.checks import STUDENT
from eval.core.commands import new_parser, study_from_command, text_line, write_json
from eval.core.errors import EXIT_FAIL, EXIT_PASS, Parser, UserError, entry
from eval.core.jobs import lock_folder
from eval.core.records import read_costs, read_scores
from eval.core.study import load_study
from eval.report.__main__ import refuse_stale
from eval.signoff.keys import (
    Kind,
    Trusted,
    allowed_signer,
    new_key,
    private_key,
    public_path,
    read_trusted,
)
from eval.signoff.page import Shown, read_shown, signoff_files, write_page
from eval.signoff.statement import (
    PREDICATE,
    TYPE,
    Digest,
    Predicate,
    Signed,
    Statement,
    Subject,
    Waiver,
    bundle_hash,
    current_versions,
    latest,
    read_bundle,
    sign_statement,
    signoff_path,
)
from eval.signoff.verify import (
    REPORTS,
    Rerun,
    artifacts,
    judged_folders,
    last_day,
    policy,
    problems,
    row_of,
    signable_verdict,
    signed_figures,
    signed_files,
    to_waive,
    too_few_signatures,
    unmeasured,
)

if TYPE_CHECKING:
    from securesystemslib.signer import Signer


def refuse_what_differs(rerun: Rerun) -> None:
    """gate.json and the reports beside it must be what the records give now, sentences included.

    Raises:
        UserError: the first thing that is not.
    """
    run, fix = rerun.run, f"run `absorb gate --study {rerun.run}` again"
    refuse_stale(rerun.gate, load_study(run), run, fix)  # its cause is what a reader wants first
    if apart := rerun.worded_otherwise():
        raise UserError(f"gate.json of {run}", apart, fix)
    for forged in rerun.forged_reports([name for name in REPORTS if (run / name).is_file()]):
        raise UserError(f"report {run}", forged, f"run `absorb report --study {run}` again")


def build_waiver(
    why: str, reason: str | None, expires: str | None, now: datetime, days: int
) -> Waiver | None:
    """The waiver that a sign-off needs.

    Args:
        why: what has to be waived (`to_waive`); empty where nothing has.
        days: that the budget allows it to last.

    Raises:
        UserError: it needs none, needs one that is not given, or its day is past or too far.
    """
    today, last = now.date(), last_day(now, days)
    if not why:
        if reason or expires:
            raise UserError("--waive", "the verdict is PASS", "sign it without a waiver")
        return None
    if not (reason or "").strip() or not expires:
        fix = "do not ship it, or give --waive REASON and --expires YYYY-MM-DD"
        raise UserError("sign-off", why, fix)
    try:
        day = date.fromisoformat(expires)
    except ValueError as error:
        raise UserError("--expires", repr(expires), "give a date as YYYY-MM-DD") from error
    if day <= today:
        raise UserError("--expires", expires, f"give a day after today, {today}")
    if day > last:
        raise UserError("--expires", expires, f"the budget allows {days} days: give a day up to {last}")
    return Waiver(reason=reason, expires=day)


def refuse_other_waiver(signed: list[Signed], waiver: Waiver | None) -> None:
    """Signatures of one waiver are counted together only where they name the same last day."""
    for one in (one for one in signed if waiver and one.predicate.waiver):
        assert one.predicate.waiver is not None
        assert waiver is not None
        if (day := one.predicate.waiver.expires) != waiver.expires:
            problem = f"{waiver.expires}, {one.predicate.by} signed until {day}"
            raise UserError("--expires", problem, f"give {day}, or have that signed again")


def refuse_old_clock(run: Path, now: datetime) -> None:
    """A sign-off cannot be older than what it rests on."""
    times = [r.provenance.time for r in read_scores(run)] + [r.provenance.time for r in read_costs(run)]
    newest = max(map(datetime.fromisoformat, times))
    if newest > now:
        raise UserError(
            "clock", f"it is {now}, a record is of {newest}", "set the clock of this machine right"
        )


def build_statement(
    run: Path,
    *,
    recipe: str,
    target: str,
    by: str,
    signer: "Signer",
    waive: str | None = None,
    expires: str | None = None,
    now: datetime,
) -> Statement:
    """The statement about one variant on one target of a run whose evidence is whole.

    Raises:
        UserError: the evidence is not whole, the target was not measured, or a waiver is missing.
    """
    rerun = Rerun(run)
    refuse_what_differs(rerun)
    gate, path = rerun.gate, signoff_path(run, recipe, target)
    row = row_of(gate, recipe, target)
    if missing := unmeasured(gate, row):
        raise UserError("sign-off", "not measured", missing)
    if not gate.runs:
        raise UserError("sign-off", "gate.json lists no verdict", f"run absorb gate --study {run}")
    verdict, reason = signable_verdict(gate, row)
    refuse_old_clock(run, now)
    folders = artifacts(run, gate, recipe)
    for folder in dict.fromkeys([*folders.values(), *judged_folders(run, gate)]):
        verify_artifact(folder)
    files, asked = signed_files(run, gate, recipe), policy(run, gate)
    waiver = build_waiver(to_waive(gate, verdict, reason), waive, expires, now, asked.days)
    if path.is_file():
        signed = latest(read_bundle(path))
        refuse_other_waiver([one for one in signed if one.key != signer.public_key.keyid], waiver)
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
        waiver=waiver,
        policy=asked,
        data=gate.provenance.data,
        artifacts={place: gate.provenance.artifacts[place] for place in folders},
        files=files,
        figures=signed_figures(gate, row),
        judged=gate.runs[-1],
        versions=current_versions(),
        previous=bundle_hash(path),
    )
    subject = [Subject(name=name, digest=Digest(sha256=files[name])) for name in subjects]
    return Statement(type=TYPE, subject=subject, predicate_type=PREDICATE, predicate=predicate)


def _is_subject(place: str, recipe: str) -> bool:
    arm, _, variant = place.split("/", 2)
    return (arm, variant) == (STUDENT, recipe)


def add_signature(run: Path, statement: Statement, signer: "Signer") -> Path:
    """Adds the lines of a signature to those that are there; returns their file."""
    path = signoff_path(run, statement.predicate.recipe, statement.predicate.target)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_text(path, before + sign_statement(statement, signer))
    return path


def sign(run: Path, args: argparse.Namespace) -> Path:
    signer = private_key(args.key, Path(args.public[0]) if args.public else None)
    with lock_folder(run):
        statement = build_statement(
            run,
            recipe=args.variant,
            target=args.target,
            by=args.by,
            signer=signer,
            waive=args.waive,
            expires=args.expires,
            now=datetime.now(UTC),
        )
        path = add_signature(run, statement, signer)
        write_page(run, read_shown(run, None), "Whose the keys are was not looked at.")
    return path


def still_needed(path: Path) -> list[str]:
    """What a sign-off that was just added rests on, and what it waits for."""
    signed = latest(read_bundle(path))
    missing = [f"{text}: another key signs it too, to the same day" for text in too_few_signatures(signed)]
    return [*conditions(signed[-1].predicate), *missing]


def conditions(predicate: Predicate) -> list[str]:
    """What must be said wherever a sign-off is shown."""
    texts = (
        []
        if predicate.policy.fixed
        else ["by another budget than one that was fixed before the first figure"]
    )
    if predicate.waiver:
        texts.append(f"waived until {predicate.waiver.expires}: {predicate.waiver.reason}")
    return texts


def verification_text(path: Path, signed: list[Signed], problems: list[str]) -> Text:
    """What --verify says of the sign-offs of one variant."""
    if problems:
        reasons = (f"\n  {text}" for text in problems)
        return Text.assemble(f"{path}: ", ("does not hold", "bold red"), *reasons)
    lines = []
    for one in signed:
        predicate = one.predicate
        by = f"signed by {predicate.by} on {predicate.time} with the key of {one.holder}"
        what = f"{predicate.verdict} of {predicate.recipe} on {predicate.target}"
        lines += [f"{what}, {by}, by budget {predicate.policy.name}", *conditions(predicate)]
    return Text.assemble(f"{path}: ", ("holds", "bold green"), *(f"\n  {text}" for text in lines))


def verify(run: Path, trusted: Trusted, today: date, console: Console) -> list[str]:
    """Checks every sign-off of a run, prints what was found and returns the problems, each with its file."""
    paths, rerun = signoff_files(run), Rerun(run)
    if not paths:
        raise UserError(f"sign-offs of {run}", "there are none", "sign a variant first")
    every, shown = [], []
    for path in paths:
        signed, problem_texts = problems(path, rerun, trusted, today)
        every += [f"{path}: {text}" for text in problem_texts]
        shown.append(Shown(path.name, signed, problem_texts))
        console.print(verification_text(path, signed, problem_texts), soft_wrap=True)
    names = ", ".join(sorted(holder.name for holder in trusted.values()))
    write_page(run, shown, f"Checked on {today} with all that they rest on, and with the keys of {names}.")
    return every


def arguments() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--new-key", metavar="FILE", help="make a private key, and FILE.pub, and end")
    about = "of the new key: Ed25519, or ECDSA on P-256, which a model signature of OpenSSF needs"
    parser.add_argument("--kind", choices=get_args(Kind), default="ed25519", help=about)
    parser.add_argument("--variant", help="the recipe that is signed")
    parser.add_argument("--target", default="cpu", help="the target on which it is (default: cpu)")
    parser.add_argument("--by", type=text_line, help="who signs")
    parser.add_argument("--key", help="the signer's private key: a file, or the URI of a key service")
    parser.add_argument(
        "--waive", type=text_line, metavar="REASON", help="sign what did not pass, for this reason"
    )
    parser.add_argument("--expires", metavar="YYYY-MM-DD", help="the last day of the waiver")
    parser.add_argument("--verify", action="store_true", help="check the sign-offs of the run")
    about = "public keys, or files of allowed signers: these are trusted and no others"
    parser.add_argument("--public", nargs="+", metavar="FILE", help=about)
    return parser


@entry
def main() -> int:
    first = Parser(add_help=False)  # a key belongs to no study
    first.add_argument("--new-key")
    first.add_argument("--by", type=text_line)
    first.add_argument("--kind", choices=get_args(Kind), default="ed25519")
    given = first.parse_known_args()[0]
    if key_path := given.new_key:
        key = new_key(Path(key_path), given.kind)
        print(f"private key {key_path}, public key {public_path(Path(key_path))}, id {key.keyid[:12]}")
        print(f"for a file of allowed signers: {allowed_signer(given.by or Path(key_path).name, key)}")
        return EXIT_PASS
    study, args = study_from_command(arguments(), measures=True)
    run = study.folder
    if args.verify:
        if not args.public:
            raise UserError("--public", "missing", "name the keys that you trust: --public FILE ...")
        failures = verify(run, read_trusted(args.public), datetime.now(UTC).date(), Console())
        write_json(args.json, {"holds": not failures, "problems": failures})
        return EXIT_FAIL if failures else EXIT_PASS
    for name in ("variant", "by", "key"):
        if not (getattr(args, name) or "").strip():
            raise UserError(f"--{name}", "missing", "give --variant, --by and --key, or --verify")
    path = sign(run, args)
    print(f"signed {path}; check it with absorb sign --study {run} --verify --public KEY.pub")
    for line in still_needed(path):
        print(line)
    write_json(args.json, {"signed": str(path)})
    return EXIT_PASS


if __name__ == "__main__":
    main()
