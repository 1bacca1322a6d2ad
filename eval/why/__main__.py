"""Where a release comes from, and what became of it: from the paper to the last look at it.

    python -m eval.why --release FOLDER [--history FILE ...] [--rollout FOLDER ...] [--svg FILE]

Told of the release's own files, which are checked first: the method and its code, teacher, student, variant,
who signed, and when its contract was last checked; and what was tried and did not hold, of its gate and of
the files beside its run: challenges, comparisons, other runs. Histories are those of `eval.watch.recheck
--append` and `eval.watch.monitor`, rollouts those of `eval.watch.rollout`. Exit codes: 0, 3 error.
"""

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import get_args

from rich.text import Text

from eval.core.artifacts import MANIFEST, file_sha256, write_text
from eval.core.commands import NewFile, add_json, new_console, new_parser, write_json
from eval.core.errors import EXIT_PASS, UserError, entry
from eval.core.gate_file import read_gate
from eval.core.records import PLAIN
from eval.release.contract_file import Contract
from eval.release.origin import Entry, made_from
from eval.report.lineage import Node, graph
from eval.signoff.keys import Trusted, read_trusted
from eval.watch.chain import read_steps
from eval.watch.history import read_history
from eval.watch.sequences import State
from eval.watch.verify import checked
from eval.why.tried import BESIDE, TRIED, beside, in_release

DIGITS = 12  # of a hash, in text
MARGIN = 14  # columns of what an entry is
LINEAGE = "lineage.json"


def shipping(release: Path, contract: Contract) -> Iterator[Entry]:
    """Who signed what, and what was built of it."""
    for name, target in contract.targets.items():
        sign = target.signature
        signed = f"{target.recipe} on {name} ({target.verdict}) by {sign.by}, {sign.time}"
        yield Entry("signed", signed, sign.key)
        if target.budget_note:
            yield Entry("budget", target.budget_note)
        if target.waiver:
            yield Entry("waived", f"until {target.waiver.expires}: {target.waiver.reason}")
    text = f"{contract.name} of {contract.released}, answered for by {contract.owner}"
    yield Entry("release", text, file_sha256(release / MANIFEST))


def afterwards(
    release: Path, histories: list[Path], rollouts: list[Path], trusted: Trusted | None
) -> list[Entry]:
    """Its rollouts step by step, and every look at its contract, by their time.

    Raises:
        UserError: a file is damaged, of another release, or signed with a key that is not trusted.
    """
    return sorted(_later(release, histories, rollouts, trusted), key=lambda entry: entry.text.split()[0])


def _later(
    release: Path, histories: list[Path], rollouts: list[Path], trusted: Trusted | None
) -> Iterator[Entry]:
    own = file_sha256(release / MANIFEST)
    for folder in rollouts:
        for step in read_steps(folder, trusted):
            if step.state.release != own:
                raise UserError(f"rollout {folder}", "of another release", "give those of this one")
            text = f"{step.time} {step.decision} in stage {step.stage} by {step.by}: {step.reason}"
            yield Entry("rollout", text)
    for path in histories:
        looks = read_history(path)
        if not looks:
            raise UserError(
                f"history {path}", "missing or empty", "give one that recheck --append or the monitor wrote"
            )
        for look in looks:
            if look.release != own:
                raise UserError(f"history {path}", "of another release", "give those of this one")
            said = f"{look.time} {look.state} on {look.target}, {look.slice}"
            what = "monitor" if look.state in get_args(State) else "recheck"
            yield Entry(what, f"{said}: {look.reason}" if look.reason else said)


def tell(
    release: Path,
    contract: Contract,
    histories: list[Path],
    rollouts: list[Path],
    trusted: Trusted | None,
    tried: list[Path] | None = None,
) -> list[Entry]:
    """Everything, in the order in which it happened.

    Args:
        tried: files of what was tried beside it; None: those that lie beside its run.
    """
    gate = read_gate(release / "evidence")
    lineage = json.loads((release / LINEAGE).read_text(encoding="utf-8"))
    return [
        *made_from(contract, lineage, gate),
        *in_release(contract, gate),
        *beside(release, contract, tried),
        *shipping(release, contract),
        *afterwards(release, histories, rollouts, trusted),
    ]


def last_look(contract: Contract, entries: list[Entry]) -> date:
    """The day of the last look, a monitor's too, as the loader has it; without any that of the release."""
    days = [date.fromisoformat(one.text[:10]) for one in entries if one.what in ("recheck", "monitor")]
    return max([contract.released, *days])


def overdue(contract: Contract, last: date) -> str | None:
    """What to say where the contract was not rechecked for longer than it promises."""
    due = contract.recheck_by(last)
    if due is None or datetime.now(UTC).date() <= due:
        return None
    return f"not rechecked since {last}: its contract promises a recheck every {contract.recheck_days} days"


def promise(contract: Contract, last: date) -> Entry:
    """Until when a recheck is promised."""
    due = contract.recheck_by(last)
    if due is None:
        return Entry("next recheck", "none is promised")
    return Entry("next recheck", f"promised until {due}, every {contract.recheck_days} days")


def picture(contract: Contract, entries: list[Entry]) -> str:
    """From the paper to the last look, as boxes with arrows."""
    by_kind: dict[str, list[Entry]] = {}
    for one in entries:
        by_kind.setdefault(one.what, []).append(one)
    seed, hashes = f"s{contract.seed}", {one.text: one.hash for one in entries}

    def box(name: str, title: str, text: str, digest: str, parents: tuple[str, ...], column: int) -> Node:
        return Node(name, title, text, {"": digest} if digest else {}, parents, column)

    paper = by_kind.get("paper", [Entry("", "")])[0].text
    nodes = [
        box("method", contract.method, paper, "", (), 0),
        box("data", "documents", "training, validation, shifted", hashes["data"], (), 0),
        box("B", "base", "and fallback", hashes[f"base/{seed}"], ("data",), 1),
        box("T1", "teacher", "with the method", by_kind["teacher"][0].hash, ("method", "B"), 2),
        box("S1", "student", "", hashes[f"students/S1/{seed}"], ("B", "T1"), 3),
    ]
    for name, target in contract.targets.items():
        above = "S1"
        if target.recipe != PLAIN:
            above = f"variant on {name}"
            nodes.append(
                box(above, target.recipe, f"{target.verdict} on {name}", target.artifact, ("S1",), 4)
            )
        who = f"{target.signature.by}, {target.signature.time[:10]}"
        nodes.append(box(f"signed on {name}", f"signed for {name}", who, "", (above,), 5))
    signed = tuple(f"signed on {name}" for name in contract.targets)
    release = by_kind["release"][0]
    nodes.append(box("release", "release", f"{contract.owner}, {contract.released}", release.hash, signed, 6))
    tried = ", ".join(f"{len(by_kind[kind])} x {kind}" for kind in (*TRIED, *BESIDE) if kind in by_kind)
    if tried:
        nodes.append(box("tried", "tried beside it", tried, "", ("S1",), 4))
    for what in ("rollout", "recheck", "monitor"):
        if some := by_kind.get(what):
            nodes.append(box(what, f"{len(some)} x {what}", some[-1].text, "", ("release",), 7))
    return str(graph(nodes))


@entry
def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--release", required=True, type=Path, help="a folder that `eval.release` made")
    about = "files that `eval.watch.recheck --append` and `eval.watch.monitor` wrote"
    parser.add_argument("--history", nargs="+", type=Path, default=[], metavar="FILE", help=about)
    about = "folders of `eval.watch.rollout`"
    parser.add_argument("--rollout", nargs="+", type=Path, default=[], metavar="FOLDER", help=about)
    about = (
        "what was tried beside it: gate.json of other runs, and files of eval.challenge and eval.compare "
        "(default: those beside the run, where the release lies in its run folder)"
    )
    parser.add_argument("--tried", nargs="+", type=Path, metavar="FILE", help=about)
    about = (
        "public keys, or files of allowed signers, of sign-offs and rollouts: these are trusted and no others"
    )
    parser.add_argument("--public", nargs="+", metavar="FILE", help=about)
    parser.add_argument("--svg", type=Path, action=NewFile, metavar="FILE", help="a picture of it")
    add_json(parser)
    args = parser.parse_args()
    trusted = read_trusted(args.public) if args.public else None
    contract, _ = checked(args.release, trusted, None)
    entries = tell(args.release, contract, args.history, args.rollout, trusted, args.tried)
    last = last_look(contract, entries)
    entries.append(promise(contract, last))
    console = new_console()
    for one in entries:
        digest = "  ".join(part for part in ("", one.hash[:DIGITS], one.file) if part)
        text = Text.assemble(
            (f"{one.what:>{MARGIN}}  ", "bold"), one.text, (f"  {digest}" if digest else "", "dim")
        )
        console.print(text, soft_wrap=True)
    late = overdue(contract, last)
    if late:
        console.print(Text(late, style="yellow"), soft_wrap=True)
    if trusted is None:
        console.print(Text("no key is trusted: give --public to check who signed"), soft_wrap=True)
    if args.svg:
        write_text(args.svg, picture(contract, entries))
    write_json(args.json, {"entries": [one._asdict() for one in entries], "overdue": late})
    return EXIT_PASS


if __name__ == "__main__":
    main()
