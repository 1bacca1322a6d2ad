"""Does a release still keep its contract on new documents?

    python -m eval.watch.recheck --release FOLDER --data new.jsonl --public KEY.pub [--append history.jsonl]

`new.jsonl` has one document per line: {"text": ...}, {"prompt": ..., "text": ...} or {"messages": [...]}, as
those of the study, and `id`, `domain`, `group` and `tools` where wanted. The release, its control and its
fallback are scored on them. With `--append` they join those of all looks so far, and the bounds hold however
often one looks. Exit codes: 0 the contract holds, 1 it is broken, 2 more documents are needed, 3 error.
Costs: `python -m eval.cost --variant FOLDER/variants/RECIPE --target NAME`.
"""

import argparse
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.core.artifacts import MANIFEST, file_sha256
from eval.core.commands import STYLES, add_json, new_console, new_parser, stamp_line, write_json
from eval.core.documents import Document
from eval.core.errors import EXITS, entry
from eval.core.records import VALIDATION
from eval.release.contract_file import Contract
from eval.report.format import estimate_cell, fixed, significant
from eval.signoff.keys import read_trusted
from eval.signoff.statement import expired
from eval.stats.crossed import FAIL
from eval.stats.drift import NEGLIGIBLE, QUESTIONS, Drift, Moved, drifts, drifts_so_far
from eval.watch.history import (
    Series,
    check_history,
    check_new,
    lock_history,
    read_history,
    series_of,
    write_history,
)
from eval.watch.measure import (
    Before,
    before_release,
    by_group,
    check_prompts,
    cluster_kind,
    new_look,
    notes_on_groups,
    read_new,
    see,
    text_id,
)
from eval.watch.regression import Finding, diagnosis, findings, verdict
from eval.watch.sequences import findings_so_far, look_count
from eval.watch.verify import UNVERIFIED, checked


@dataclass(frozen=True)
class Result:
    findings: list[Finding]
    drift: list[Drift] | list[Moved]  # of these documents, or of all looks
    documents: int
    compared_with: str  # slice of the study
    looks: int = 1
    notes: list[str] = field(default_factory=list)  # what it is conditional on

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
    before = before_release(release, shipped, name)
    check_prompts(release, name, documents)
    now, values = by_group(see(release, contract, shipped, name, documents))
    results = findings(shipped.gain[name], before.bits, now, contract.alpha)
    notes = notes_on_groups(cluster_kind(release, name), documents)
    return Result(results, drifts(before.values, values), len(documents), before.slice, notes=notes)


def judge_series(contract: Contract, target: str, name: str, before: Before, series: Series) -> Result:
    """The contract on everything that was seen so far, by bounds that hold at every look."""
    alpha = contract.alpha
    results = findings_so_far(contract.targets[target].gain[name], before.bits, series, alpha)
    since = [series.values_since(start) for start in series.starts]
    drift = drifts_so_far(before.values, since, alpha, series.tuned)
    return Result(results, drift, len(series.domain), before.slice, len(series.days))


def append_look(
    path: Path, release: Path, contract: Contract, target: str, name: str, documents: list[Document]
) -> Result:
    """Scores new documents, judges all looks so far, and writes the history with one line more."""
    with lock_history(path):
        looks = read_history(path)
        check_history(path, looks, file_sha256(release / MANIFEST), target, name)
        check_new(path, looks, [text_id(document) for document in documents])
        before = before_release(release, contract.targets[target], name)
        check_prompts(release, name, documents)
        seen = see(release, contract, contract.targets[target], name, documents, looks)
        look = new_look(looks, release, contract, target, name, seen)
        result = judge_series(contract, target, name, before, series_of([*looks, look]))
        outcome = {"state": verdict(result.findings), "reason": diagnosis(result.findings)}
        write_history(path, [*looks, look.model_copy(update=outcome)])
    return replace(result, notes=notes_on_groups(cluster_kind(release, name), documents))


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
    against = f"slice {name}" if result.compared_with == name else "test documents"
    title = f"{contract.name} on {target}: {result.documents} documents against the {against}"
    if isinstance(result.drift[0], Moved):
        title += f"; {look_count(result.looks)}, bounds that hold at every one"
    else:
        title += f"; {100 * contract.level:g} % intervals, whose ends are the bounds that decide"
    console.print(contract_table(result, title))
    console.print(drift_table(result, contract.alpha))
    console.print(Text(stamp_line("checked")), soft_wrap=True)
    if shipped.waiver:
        console.print(Text(f"shipped on a waiver until {shipped.waiver.expires}: {shipped.waiver.reason}"))
    for note in result.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
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
    console = new_console()
    show(console, result, contract, target, args.slice)
    if trusted is None:
        console.print(Text(UNVERIFIED, style="yellow"), soft_wrap=True)
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
