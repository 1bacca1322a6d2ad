"""Who is to blame when a release does worse: the method, the world, or other documents? For cron.

    python -m eval.watch.monitor --release FOLDER --history history.jsonl --data sample.jsonl
        [--page monitor.html] [--metrics monitor.prom] [--public KEY.pub] [--json FILE]

`sample.jsonl` holds texts from the traffic, {"text": ...} a line, with `domain` and `group` where wanted; no
labels. Release, control and fallback are scored on them; all looks so far are judged by bounds that hold at
every look. Without `--data` the history is judged as it is. Exit codes: 0 fine, 1 the method is fading (or
both), 2 the world got harder or the input changed, 3 error. docs/release.md says what each means.
"""

import argparse
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from eval.core.artifacts import MANIFEST, file_sha256, write_text
from eval.core.commands import NewFile, add_json, new_console, new_parser, stamp_line, write_json
from eval.core.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS, UserError, entry
from eval.core.gate_file import Estimate
from eval.core.records import VALIDATION
from eval.release.contract_file import Contract, Of, over_documents
from eval.report.format import estimate_cell, several, significant
from eval.signoff.keys import read_trusted
from eval.stats.drift import QUESTIONS, Moved, drifts_so_far
from eval.stats.sequential import start_level
from eval.watch.history import (
    Look,
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
    check_prompts,
    cluster_kind,
    new_look,
    notes_on_groups,
    read_new,
    see,
    text_id,
)
from eval.watch.monitor_page import page_of
from eval.watch.sequences import KEPT, PARTS, Blame, State, blame, estimate_so_far
from eval.watch.verify import UNVERIFIED, checked

CODES: dict[State, int] = {
    "fine": EXIT_PASS,
    "the method is fading": EXIT_FAIL,
    "both": EXIT_FAIL,
    "the world got harder": EXIT_INCONCLUSIVE,
    "the input changed": EXIT_INCONCLUSIVE,
}
FAINT = 20  # documents of a domain below which it is not judged by itself
NAMELESS = "(none)"  # of documents without a domain
SAVED: tuple[Of, Of] = ("control", "fallback")


@dataclass(frozen=True)
class Watched:
    """The looks of all documents, or of one domain, and what they say."""

    name: str  # of the domain; empty for all
    documents: int
    blame: Blame
    saved: dict[str, Estimate]  # over the control and the fallback, bounds that hold at every look
    level: Estimate  # bits per byte of the fallback
    drift: list[Moved]


def watched(name: str, before: Before, series: Series, alpha: float) -> Watched:
    """Everything so far, judged at `alpha` over all time."""
    level, tuned = alpha / PARTS, series.tuned
    since = [series.values_since(start) for start in series.starts]
    drift = drifts_so_far(before.values, since, level, tuned)
    of_input = [one for one in drift if one.name != "fallback"]  # that is the question of difficulty
    return Watched(
        name,
        len(series.domain),
        blame(before.bits, series, of_input, alpha),
        {of: estimate_so_far(series.bits.over(of), level, tuned) for of in SAVED},
        estimate_so_far(series.bits.level("fallback"), level, tuned),
        drift,
    )


def domains_of(looks: list[Look]) -> dict[str, int]:
    """Domain -> its documents so far, in the order in which they came; one alone is all of them: none."""
    counts = Counter(domain for look in looks for domain in look.seen.domain)
    return dict(counts) if len(counts) > 1 else {}


def by_domain(before: Before, looks: list[Look], alpha: float) -> list[Watched]:
    """Each domain against the documents of the release: together their alarms have chance alpha, too."""
    parts = []
    for number, (domain, count) in enumerate(domains_of(looks).items(), start=1):
        series = series_of(looks, domain)
        if count >= FAINT and len(set(series.groups)) > 1:
            parts.append(watched(domain or NAMELESS, before, series, start_level(alpha, number)))
    return parts


def notes_on_domains(looks: list[Look]) -> list[str]:
    """Which domains are not judged by themselves: those with few documents, and those of one group each."""
    domains = domains_of(looks)
    faint = [f"{name or NAMELESS} ({count})" for name, count in domains.items() if count < FAINT]
    large = [name for name, count in domains.items() if count >= FAINT]
    whole = sorted(name for name in large if len(set(series_of(looks, name).groups)) == 1)
    notes = []
    if faint:
        few = f"fewer than {FAINT} documents, so judged only with all others"
        notes.append(f"{several(faint)}: {few}")
    if whole:
        notes.append(
            f"{', '.join(whole)}: a domain that is one cluster, as in the study, is not judged by itself"
        )
    return notes


def alarm(contract: Contract, target: str, all_: Watched) -> str:
    """The one line that somebody is woken by."""
    what = all_.blame
    begin = f"{contract.owner}: {contract.name} on {target}: {what.state}"
    return f"{begin} ({'; '.join(what.reasons)})" if what.reasons else begin


def metrics_text(contract: Contract, target: str, parts: list[Watched], looks: list[Look]) -> str:
    """The figures in the text format of Prometheus, which OpenTelemetry's collector reads too."""
    lines: list[str] = []

    def labels(**more: str) -> str:
        named = {"contract": contract.name, "owner": contract.owner, "target": target, **more}
        escaped = {
            k: v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for k, v in named.items()
        }
        return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"

    def gauge(name: str, about: str, rows: list[tuple[str, float | None]]) -> None:
        lines.extend([f"# HELP {name} {about}", f"# TYPE {name} gauge"])
        lines.extend(f"{name}{label} {value:.10g}" for label, value in rows if value is not None)

    gauge(
        "absorb_state",
        "1 for what is said of the release, by domain; all together has none",
        [
            (labels(domain=part.name, state=state), float(part.blame.state == state))
            for part in parts
            for state in CODES
        ],
    )
    for kind in ("point", "low", "high"):
        gauge(
            f"absorb_saved_bits_per_byte_{kind}",
            f"saved by the release, {kind}; bounds hold at every look",
            [
                (labels(domain=part.name, over=of), getattr(part.saved[of], kind))
                for part in parts
                for of in SAVED
            ],
        )
        gauge(
            f"absorb_fallback_bits_per_byte_{kind}",
            f"how hard the texts are for the fallback, {kind}",
            [(labels(domain=part.name), getattr(part.level, kind)) for part in parts],
        )
    gauge(
        "absorb_drift_delta",
        "Cliff's delta of the input against the release's documents",
        [(labels(domain=part.name, question=one.name), one.effect) for part in parts for one in part.drift],
    )
    gauge("absorb_documents", "documents so far", [(labels(domain=p.name), p.documents) for p in parts])
    gauge("absorb_looks", "looks so far", [(labels(), len(looks))])
    return "\n".join(lines) + "\n"


def tables(before: Before, parts: list[Watched], alpha: float) -> list[Table]:
    main = Table(
        "", "documents", "saved over the control, bits/byte", "saved over the fallback, bits/byte",
        "fallback, bits/byte", "", title="bounds of what came since hold at every look",
    )  # fmt: skip
    usual = [*(before.bits.over(of) for of in SAVED), before.bits.level("fallback")]
    then = [str(estimate_cell(over_documents(values, alpha))) for values in usual]
    main.add_row("when released", f"{before.documents:,}", *then, "")
    for part in parts:
        cells = [str(estimate_cell(part.saved[of])) for of in SAVED]
        style = {EXIT_PASS: "green", EXIT_FAIL: "red"}.get(CODES[part.blame.state], "yellow")
        main.add_row(
            part.name or "now", f"{part.documents:,}", *cells, str(estimate_cell(part.level)),
            Text(part.blame.state, style=style),
        )  # fmt: skip
    drift = Table("the input", "median when released", "median now", "Cliff's delta", "since look")
    for part in parts:
        for one in part.drift:
            since = "" if one.since is None else str(one.since)
            question = QUESTIONS[one.name]
            name = f"{part.name}: {question}" if part.name else question
            bounds = f"{one.effect:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
            drift.add_row(name, significant(one.before), significant(one.now), bounds, since)
    return [main, drift]


def arguments() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--release", required=True, help="a folder that `eval.release` made")
    parser.add_argument(
        "--history", required=True, type=Path, help="every look so far; a line is added to it"
    )
    parser.add_argument("--data", type=Path, help="new texts from the traffic, JSONL")
    parser.add_argument("--target", help="of which the artifact is watched (default: the first)")
    parser.add_argument("--slice", default=VALIDATION, help="what it is compared with (default: validation)")
    about = "public keys, or files of allowed signers: these are trusted and no others"
    parser.add_argument("--public", nargs="+", metavar="FILE", help=about)
    parser.add_argument(
        "--page", type=Path, action=NewFile, metavar="HTML", help="also write a page that opens offline"
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        action=NewFile,
        metavar="PROM",
        help="also write the text format of Prometheus",
    )
    add_json(parser)
    return parser


@entry
def main() -> int:
    args = arguments().parse_args()
    release = Path(args.release)
    contract, target = checked(release, read_trusted(args.public) if args.public else None, args.target)
    before = before_release(release, contract.targets[target], args.slice)
    notes: list[str] = []
    with lock_history(args.history) if args.data else nullcontext():
        looks = read_history(args.history)
        check_history(args.history, looks, file_sha256(release / MANIFEST), target, args.slice)
        if args.data:
            documents = read_new(args.data, contract.inputs.scored_bytes)
            check_prompts(release, args.slice, documents)
            check_new(args.history, looks, [text_id(document) for document in documents])
            notes = notes_on_groups(cluster_kind(release, args.slice), documents)
            seen = see(release, contract, contract.targets[target], args.slice, documents, looks)
            looks = [*looks, new_look(looks, release, contract, target, args.slice, seen)]
        if not looks:
            raise UserError(f"history {args.history}", "no look yet", "give texts with --data")
        everything = watched("", before, series_of(looks), contract.alpha)
        parts = [everything, *by_domain(before, looks, contract.alpha)]
        notes += notes_on_domains(looks)
        state, reasons = everything.blame
        if args.data:
            outcome = {"state": state, "reason": "; ".join(reasons)}
            looks = [*looks[:-1], looks[-1].model_copy(update=outcome)]
            write_history(args.history, looks)
    console = new_console()
    for table in tables(before, parts, contract.alpha):
        console.print(table)
    console.print(Text(stamp_line("seen")), soft_wrap=True)
    for note in notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)
    console.print(Text(alarm(contract, target, everything)), soft_wrap=True)
    if not args.public:
        console.print(Text(UNVERIFIED, style="yellow"), soft_wrap=True)
    if args.page:
        write_text(
            args.page, page_of(contract, target, before.bits, looks, parts, KEPT, notes_on_domains(looks))
        )
    if args.metrics:
        write_text(args.metrics, metrics_text(contract, target, parts, looks))
    owner = {"contract": contract.name, "owner": contract.owner, "target": target}
    result = {"state": state, "reasons": reasons, **owner, "looks": len(looks), "notes": notes}
    listed = [
        asdict(p) | {"drift": [d._asdict() for d in p.drift], "blame": p.blame._asdict()} for p in parts
    ]
    write_json(args.json, {**result, "parts": listed})
    return CODES[state]


if __name__ == "__main__":
    main()
