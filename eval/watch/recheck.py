"""Does a release still keep its contract on new documents?

    python -m eval.watch.recheck --release FOLDER --data new.jsonl [--append history.jsonl] ...

`new.jsonl` has one document per line: {"text": ...}, and `id`, `domain` and `group` where wanted. The
release, its control and its fallback are scored on them. With `--append` they join those of all looks so far,
and the bounds hold however often one looks. Exit codes: 0 the contract holds, 1 it is broken, 2 more
documents are needed, 3 error. Costs: `python -m eval.cost --variant FOLDER/variants/RECIPE --target NAME`.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.core.artifacts import MANIFEST, FileEntry, file_sha256, hash_files, read_manifest, verify_artifact
from eval.core.checks import CONTROL, FALLBACK, STUDENT
from eval.core.commands import add_json, new_parser, write_json
from eval.core.documents import TEST, Document
from eval.core.errors import EXITS, UserError, entry, require_one_of
from eval.core.gate_file import STYLES, read_gate
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import load_study
from eval.release.contract import costs_of, gain
from eval.release.contract_file import Contract, Signature, Target, read_contract
from eval.release.load_release import SIGNATURE, ReleaseError, check_signature
from eval.report.format import estimate_cell, fixed, significant
from eval.signoff.keys import Trusted, from_text, read_trusted
from eval.signoff.statement import Predicate, expired, read_statement, signoff_path
from eval.signoff.verify import first_difference, row_of
from eval.stats.crossed import FAIL
from eval.stats.drift import NEGLIGIBLE, QUESTIONS, Drift, Moved, drifts, drifts_so_far
from eval.watch.history import (
    Look,
    Seen,
    Series,
    check_history,
    check_new,
    previous_hash,
    read_history,
    series_of,
    write_history,
)
from eval.watch.measure import (
    Before,
    before_release,
    bits_of,
    drift_values,
    read_new,
    released_by_cluster,
    see,
    text_id,
)
from eval.watch.regression import Finding, diagnosis, findings, verdict
from eval.watch.sequences import findings_so_far

TUNED = 4  # times the documents of the first look: where the bounds are narrowest
WIDTH = 130  # columns of the tables where nobody can tell, e.g. in a log


def checked(release: Path, trusted: Trusted | None, target: str | None) -> tuple[Contract, str]:
    """The contract of a release whose bytes are those that were released and signed, and the target.

    Raises:
        UserError: a file is missing, new or changed, or is not what the sign-off speaks of.
    """
    fix = "get the release again"
    recorded = read_manifest(release).files
    current = hash_files(release)
    for name in sorted({*recorded, *current} - {SIGNATURE}):
        if current.get(name) != recorded.get(name):
            how = "missing" if name not in current else "changed" if name in recorded else "not part of it"
            raise UserError(f"release {release}", f"{name} is {how}", fix)
    if trusted is not None:
        check_folder(release, recorded, trusted)
    contract = read_contract(release)
    name = target or next(iter(contract.targets))
    shipped = contract.targets[require_one_of("--target", name, list(contract.targets))]
    statement = read_statement(signoff_path(release, shipped.recipe, name), trusted)
    predicate = statement.predicate
    for place, signed in signed_places(release, contract, shipped).items():
        if file_sha256(release / place) != predicate.files.get(signed):
            raise UserError(f"release {release}", f"{place} is not the {signed} that was signed", fix)
    for folder in (f"variants/{shipped.recipe}", f"evidence/control/{shipped.recipe}", "fallback"):
        verify_artifact(release / folder)  # their manifests were signed: the files must be theirs
    if changed := first_difference(
        contract.model_dump(mode="json"), restated(release, contract, name, predicate)
    ):
        raise UserError(f"release {release}", f"its contract is not what was signed: {changed}", fix)
    return contract, name


def check_folder(release: Path, files: dict[str, FileEntry], trusted: Trusted) -> None:
    """The folder as a whole was signed by a key that is trusted.

    Raises:
        UserError: it was not, or something was changed since.
    """
    listed = {name: entry.model_dump() for name, entry in files.items()}
    problem = "no Ed25519 key is trusted"
    for holder in trusted.values():
        if holder.key.keytype == "ed25519":
            try:
                return check_signature(release, listed, bytes.fromhex(holder.key.keyval["public"]))
            except ReleaseError as error:
                problem = str(error)
    raise UserError(f"release {release}", problem, "get the release again, or the key of who signed it")


def restated(release: Path, contract: Contract, target: str, predicate: Predicate) -> dict[str, Any]:
    """The contract with what it says of a target built again from the signed evidence."""
    gate, study = read_gate(release / "evidence"), load_study(release / "evidence" / "study.yaml")
    signed_target, row = contract.targets[target], row_of(gate, predicate.recipe, predicate.target)
    current = signed_target.model_copy(
        update={
            **predicate.model_dump(include={"recipe", "verdict", "reason"}),
            "waiver": predicate.waiver,
            "signature": Signature(
                by=predicate.by,
                time=predicate.time,
                key=from_text(predicate.public_key).keyid,
                file=signoff_path(Path(), predicate.recipe, predicate.target).as_posix(),
            ),
            "gain": {
                name: gain(gate, row, name, released_by_cluster(release, contract, signed_target, name))
                for name in [VALIDATION, *gate.budget["slices"]]
            },
            "cost": costs_of(row.parts),
        }
    )
    limits = {"context_tokens": study.data.context, "scored_bytes": study.data.scored_bytes}
    whole = contract.model_copy(
        update={
            "study": gate.study,
            "method": gate.method,
            "seed": study.seeds[0],
            "alpha": gate.budget["alpha"],
            "data": gate.provenance.data,
            "config": gate.provenance.config,
            "targets": {**contract.targets, predicate.target: current},
            "inputs": contract.inputs.model_copy(update=limits),
        }
    )
    return whole.model_dump(mode="json")


def signed_places(release: Path, contract: Contract, shipped: Target) -> dict[str, str]:
    """Path in the release -> path that the sign-off has for it."""
    recipe, seed = shipped.recipe, f"s{contract.seed}"

    def folder_of(arm: str) -> str:
        return f"students/{arm}/{seed}" if recipe == PLAIN else f"variants/{recipe}/{arm}/{seed}"

    places = {
        f"variants/{recipe}/{MANIFEST}": f"{folder_of(STUDENT)}/{MANIFEST}",
        f"evidence/control/{recipe}/{MANIFEST}": f"{folder_of(CONTROL)}/{MANIFEST}",
        f"fallback/{MANIFEST}": f"base/{seed}/{MANIFEST}",
        "evidence/gate.json": "gate.json",
        "evidence/study.yaml": "study.yaml",
    }
    for arm, record_recipe in ((STUDENT, recipe), (CONTROL, recipe), (FALLBACK, PLAIN)):
        record = f"records/score/{record_recipe}/{arm}-{seed}.json"
        places[f"evidence/{record}"] = record
    for arm, record_recipe in ((STUDENT, recipe), (CONTROL, recipe), (FALLBACK, PLAIN)):
        record = f"records/test/{record_recipe}/{arm}-{seed}.json"
        if (release / "evidence" / record).is_file():  # the test documents were opened
            places[f"evidence/{record}"] = record
    return places


@dataclass(frozen=True)
class Result:
    findings: list[Finding]
    drift: list[Drift] | list[Moved]  # of these documents, or of all looks
    documents: int
    compared_with: str  # slice of the study
    looks: int = 1

    def drifted(self, alpha: float) -> dict[str, str]:
        """Name of a question -> how it moved, of those that did."""
        words = {}
        for d in self.drift:
            if isinstance(d, Moved):
                if d.since is not None:
                    words[d.name] = f"drifted, since look {d.since}"
            elif d.holm_p <= alpha:
                words[d.name] = "drifted" if abs(d.effect) >= NEGLIGIBLE else "drifted a little"
        return words


def recheck(release: Path, contract: Contract, target: str, name: str, documents: list[Document]) -> Result:
    """The contract of one target and slice, on new documents."""
    shipped = contract.targets[target]
    before = before_release(release, contract, shipped, name)
    seen = see(release, contract, shipped, documents)
    now = bits_of(seen)
    values = drift_values(now, np.asarray(seen.tokens, float), seen.unigram)
    found = findings(shipped.gain[name], before.bits, now, contract.alpha)
    return Result(found, drifts(before.values, values), len(documents), before.slice)


def judge_series(contract: Contract, target: str, name: str, before: Before, series: Series) -> Result:
    """The contract on everything that was seen so far, by bounds that hold at every look."""
    alpha = contract.alpha
    found = findings_so_far(contract.targets[target].gain[name], before.bits, series, alpha)
    drift = drifts_so_far(before.values, series.values, series.first, alpha, series.tuned)
    return Result(found, drift, len(series.domain), before.slice, len(series.days))


def new_look(
    looks: list[Look], release: Path, contract: Contract, target: str, name: str, seen: Seen
) -> Look:
    """The next line of a history; what it says is filled in once it was judged with all before it."""
    return Look(
        number=len(looks) + 1,
        previous=previous_hash(looks),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        release=file_sha256(release / MANIFEST),
        contract=contract.name,
        target=target,
        slice=name,
        tuned=looks[0].tuned if looks else float(TUNED * len(seen.id)),
        seen=seen,
        state="",
        reason="",
    )


def append_look(
    path: Path, release: Path, contract: Contract, target: str, name: str, documents: list[Document]
) -> Result:
    """Scores new documents, judges all looks so far, and writes the history with one line more."""
    looks = read_history(path)
    check_history(path, looks, file_sha256(release / MANIFEST), target, name)
    check_new(path, looks, [text_id(document) for document in documents])
    before = before_release(release, contract, contract.targets[target], name)
    seen = see(release, contract, contract.targets[target], documents)
    look = new_look(looks, release, contract, target, name, seen)
    result = judge_series(contract, target, name, before, series_of([*looks, look]))
    said = {"state": verdict(result.findings), "reason": diagnosis(result.findings)}
    write_history(path, [*looks, look.model_copy(update=said)])
    return result


def contract_table(result: Result, title: str) -> Table:
    table = Table("", "when released", "now", "change", "promised", "", title=title)
    for f in result.findings:
        mark = Text(f.verdict, style=STYLES[f.verdict]) if f.verdict else Text("")
        table.add_row(
            f.name, str(estimate_cell(f.before)), str(estimate_cell(f.now)), str(estimate_cell(f.change)),
            fixed(f.floor), mark,
        )  # fmt: skip
    return table


def drift_table(result: Result, alpha: float) -> Table:
    shown = "delta's bounds" if result.looks > 1 or isinstance(result.drift[0], Moved) else "p (Holm)"
    table = Table("the input", "median when released", "median now", "effect", shown, "")
    moved = result.drifted(alpha)
    for d in result.drift:
        figure = f"[{d.low:+.2f}, {d.high:+.2f}]" if isinstance(d, Moved) else f"{d.holm_p:.3g}"
        figures = [significant(d.before), significant(d.now), f"{d.effect:+.2f}"]
        table.add_row(QUESTIONS[d.name], *figures, Text(figure), moved.get(d.name, ""))
    return table


def show(console: Console, result: Result, contract: Contract, target: str, name: str) -> None:
    shipped = contract.targets[target]
    against = "test documents" if result.compared_with == TEST else f"slice {name}"
    title = f"{contract.name} on {target}: {result.documents} documents against the {against}"
    if isinstance(result.drift[0], Moved):
        title += f"; {result.looks} looks, bounds that hold at every one"
    console.print(contract_table(result, title))
    console.print(drift_table(result, contract.alpha))
    if shipped.waiver:
        console.print(Text(f"shipped on a waiver until {shipped.waiver.expires}: {shipped.waiver.reason}"))
    if result.drifted(contract.alpha):
        console.print(Text("these are not the documents that the contract was made for: see what drifted"))
    decided = verdict(result.findings)
    console.print(
        Text.assemble((decided, STYLES[decided]), f": {diagnosis(result.findings)}"), soft_wrap=True
    )


def arguments() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--release", required=True, help="a folder that `eval.release` made")
    parser.add_argument("--data", required=True, help="new documents, JSONL")
    parser.add_argument("--target", help="of which the artifact is checked (default: the first)")
    parser.add_argument("--slice", default=VALIDATION, help="whose contract is checked (default: validation)")
    about = "public keys, or files of allowed signers: these are trusted and no others"
    parser.add_argument("--public", nargs="+", metavar="FILE", help=about)
    about = "judge these documents with all looks before them, and write them into this file"
    parser.add_argument("--append", type=Path, metavar="HISTORY", help=about)
    add_json(parser)
    return parser


@entry
def main() -> int:
    args = arguments().parse_args()
    release, today = Path(args.release), datetime.now(UTC).date()
    trusted = read_trusted(args.public) if args.public else None
    contract, target = checked(release, trusted, args.target)
    documents = read_new(Path(args.data), contract.inputs.scored_bytes)
    if args.append:
        result = append_look(args.append, release, contract, target, args.slice, documents)
    else:
        result = recheck(release, contract, target, args.slice, documents)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    show(console, result, contract, target, args.slice)
    decided, reason = verdict(result.findings), diagnosis(result.findings)
    if expiry := expired(contract.targets[target].waiver, today):
        console.print(Text(f"broken: {expiry}", style=STYLES[FAIL]))
        decided, reason = FAIL, expiry
    drift = [d._asdict() for d in result.drift]
    owner = {"contract": contract.name, "owner": contract.owner}
    write_json(args.json, {"verdict": decided, "reason": reason, **owner, **asdict(result), "drift": drift})
    return EXITS[decided]


if __name__ == "__main__":
    main()
