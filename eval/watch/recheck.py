"""Does a release still keep its contract on new documents?

    python -m eval.watch.recheck --release FOLDER --data new.jsonl [--target NAME] [--public FILE] ...

`new.jsonl` has one document per line: {"text": ...}, and an `id` where wanted. The release, its control and
its fallback are scored on them. Exit codes: 0 the contract holds, 1 it is broken, 2 more documents are
needed, 3 error. Costs are repeated with `python -m eval.cost --variant FOLDER/variants/RECIPE --target NAME`.
"""

import argparse
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eval.core.artifacts import MANIFEST, file_sha256, hash_files, read_manifest, verify_artifact
from eval.core.checks import CONTROL, FALLBACK, STUDENT, find_positions
from eval.core.commands import add_json, new_parser, write_json
from eval.core.documents import Document, json_objects, tokens_per_batch
from eval.core.documents.encoding import text_ids
from eval.core.errors import EXITS, UserError, entry, expected_text, require_one_of
from eval.core.gate_file import STYLES
from eval.core.records import PLAIN, VALIDATION, Documents, read_scores
from eval.core.study import load_study
from eval.engines import load_engine, load_tokenizer, subject_of
from eval.release.contract import costs_of, gain
from eval.release.contract_file import Bits, Contract, Signature, Target, read_contract
from eval.release.reference import Reference
from eval.report.format import estimate_cell, fixed, significant
from eval.signoff.keys import from_raw, public_key
from eval.signoff.statement import FOLDER, Predicate, expired, read_statement
from eval.signoff.verify import first_difference, read_gate, row_of
from eval.stats.crossed import FAIL
from eval.stats.drift import NEGLIGIBLE, QUESTIONS, Array, Drift, drifts, surprise
from eval.watch.regression import Finding, diagnosis, findings, verdict

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

WIDTH = 130  # columns of the tables where nobody can tell, e.g. in a log
COMPILED = "__pycache__/load_release."  # Python may keep the loader compiled


def checked(release: Path, trusted: "SSlibKey | None", target: str | None) -> tuple[Contract, str]:
    """The contract of a release whose bytes are those that were released and signed, and the target.

    Raises:
        UserError: a file is missing, new or changed, or is not what the sign-off speaks of.
    """
    fix = "get the release again"
    recorded = read_manifest(release).files
    current = {name: file for name, file in hash_files(release).items() if not name.startswith(COMPILED)}
    for name in sorted({*recorded, *current}):
        if current.get(name) != recorded.get(name):
            how = "missing" if name not in current else "changed" if name in recorded else "not part of it"
            raise UserError(f"release {release}", f"{name} is {how}", fix)
    contract = read_contract(release)
    name = target or next(iter(contract.targets))
    shipped = contract.targets[require_one_of("--target", name, list(contract.targets))]
    statement, _ = read_statement(release / FOLDER / f"{shipped.recipe}-{name}.json", trusted)
    predicate = statement.predicate
    for place, signed in signed_places(contract, shipped).items():
        if file_sha256(release / place) != predicate.files.get(signed):
            raise UserError(f"release {release}", f"{place} is not the {signed} that was signed", fix)
    for folder in (f"variants/{shipped.recipe}", f"evidence/control/{shipped.recipe}", "fallback"):
        verify_artifact(release / folder)  # their manifests were signed: the files must be theirs
    if changed := first_difference(
        contract.model_dump(mode="json"), restated(release, contract, name, predicate)
    ):
        raise UserError(f"release {release}", f"its contract is not what was signed: {changed}", fix)
    return contract, name


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
                key=from_raw(predicate.public_key).keyid,
                file=f"{FOLDER}/{predicate.recipe}-{predicate.target}.json",
            ),
            "gain": {
                name: gain(gate, row, name, released(release, contract, signed_target, name)[0])
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


def signed_places(contract: Contract, shipped: Target) -> dict[str, str]:
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
    return places


def read_new(path: Path, limit: int) -> list[Document]:
    """The documents of a JSONL file, each cut to `limit` bytes as those of the study were.

    Raises:
        UserError: a line is no document, an id appears twice, or there is none at all.
    """
    rows = json_objects(path, "--data", 'give a JSONL of documents, {"text": "..."} a line')
    documents = [_document(where, row, number, limit) for where, number, row in rows]
    name, times = Counter(document.id for document in documents).most_common(1)[0]
    if times > 1:
        raise UserError(f"--data {path}", f"id {name!r} appears {times} times", "give each document its own")
    same, times = Counter(document.text for document in documents).most_common(1)[0]
    if times > 1:
        problem = f"{same[:40]!r}... is {times} documents, as far as they are read"
        raise UserError(f"--data {path}", problem, "give each text once: copies are no evidence")
    return documents


def _document(where: str, row: dict[str, Any], number: int, limit: int) -> Document:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UserError(where, repr(text)[:60], "give each line a `text` that is not empty")
    text = text.encode(errors="replace")[:limit].decode(errors="ignore")  # half of a surrogate pair is a "?"
    return Document(str(row.get("id", number)), str(row.get("domain", "")), text)


@dataclass(frozen=True)
class Scored:
    """What one model says of the new documents."""

    bits: Array
    tokens: Array


def scored(folder: Path, documents: list[Document], context: int) -> Scored:
    from eval.metrics.likelihood import BATCH_TOKENS, document_bits  # torch: not for --help

    engine = load_engine(subject_of(read_manifest(folder)).engine, folder)
    size = min(BATCH_TOKENS, tokens_per_batch(engine.vocabulary))
    bits, tokens = document_bits(engine.logits, documents, engine.tokenizer, context, size)
    return Scored(np.asarray(bits), np.asarray(tokens, float))


def of_slice(documents: Documents, name: str, first: Documents) -> tuple[Array, Array, Array]:
    """Bits, tokens and bytes of one slice of a score record, [C] each, in the order of the `first` one."""
    indices = [i for i in find_positions(first, documents) if documents.slice[i] == name]
    columns = (documents.bits, documents.tokens, documents.bytes)
    bits, tokens, size = (np.asarray([column[i] for i in indices], float) for column in columns)
    return bits, tokens, size


def released(release: Path, contract: Contract, shipped: Target, name: str) -> tuple[Bits, Array]:
    """Bits of the three models on the study's documents of a slice, and the fallback's tokens."""
    records = {(r.arm, r.recipe): r.documents for r in read_scores(release / "evidence")}
    models = [(STUDENT, shipped.recipe), (CONTROL, shipped.recipe), (FALLBACK, PLAIN)]
    first = records[models[0]]
    (ours, _, size), (control, *_), (base, tokens, _) = (of_slice(records[m], name, first) for m in models)
    return Bits(ours, control, base, size), tokens


def reference_of(release: Path) -> Reference:
    path = release / "evidence" / "reference.json"
    try:
        return Reference.model_validate_json(path.read_text())
    except ValidationError as error:
        raise UserError(
            f"reference {path}", expected_text(error.errors()[0]), "make the release again"
        ) from error


def drift_values(bits: Bits, tokens: Array, unigram: list[float]) -> dict[str, Array]:
    """One value per document for every question of `eval.stats.drift`."""
    values = [bits.bytes, bits.bytes / tokens, np.asarray(unigram), bits.fallback / bits.bytes]
    return dict(zip(QUESTIONS, values, strict=True))


@dataclass(frozen=True)
class Result:
    findings: list[Finding]
    drift: list[Drift]
    documents: int


def recheck(release: Path, contract: Contract, target: str, name: str, documents: list[Document]) -> Result:
    """The contract of one target and slice, on new documents."""
    shipped, reference = contract.targets[target], reference_of(release)
    require_one_of("--slice", name, sorted(set(shipped.gain) & set(reference.unigram)))
    folders = [f"variants/{shipped.recipe}", f"evidence/control/{shipped.recipe}", "fallback"]
    context = contract.inputs.context_tokens
    ours, control, base = (scored(release / folder, documents, context) for folder in folders)
    size = np.asarray([document.bytes for document in documents], float)
    now = Bits(ours.bits, control.bits, base.bits, size)
    before, tokens = released(release, contract, shipped, name)
    tokenizer = load_tokenizer(release / "fallback")
    unigram = [
        surprise(reference.counts, reference.vocabulary, text_ids(tokenizer, d.text)) for d in documents
    ]
    drift = drifts(
        drift_values(before, tokens, reference.unigram[name]), drift_values(now, base.tokens, unigram)
    )
    return Result(findings(shipped.gain[name], before, now, contract.alpha), drift, len(documents))


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
    table = Table("the input", "median when released", "median now", "distance", "effect", "p (Holm)", "")
    for d in result.drift:
        large = "drifted" if abs(d.effect) >= NEGLIGIBLE else "drifted a little"
        figures = [significant(d.before), significant(d.now), f"{d.distance:.2f}", f"{d.effect:+.2f}"]
        moved = large if d.holm_p <= alpha else ""
        table.add_row(QUESTIONS[d.name], *figures, f"{d.holm_p:.3g}", moved)
    return table


def show(console: Console, result: Result, contract: Contract, target: str, name: str) -> None:
    shipped = contract.targets[target]
    title = f"{contract.name} on {target}: {result.documents} documents against the slice {name}"
    console.print(contract_table(result, title))
    console.print(drift_table(result, contract.alpha))
    if shipped.waiver:
        console.print(Text(f"shipped on a waiver until {shipped.waiver.expires}: {shipped.waiver.reason}"))
    if any(d.holm_p <= contract.alpha for d in result.drift):
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
    parser.add_argument("--public", help="the signer's public key: only this one is trusted")
    add_json(parser)
    return parser


@entry
def main() -> int:
    args = arguments().parse_args()
    release, today = Path(args.release), datetime.now(UTC).date()
    trusted = public_key(Path(args.public)) if args.public else None
    contract, target = checked(release, trusted, args.target)
    documents = read_new(Path(args.data), contract.inputs.scored_bytes)
    result = recheck(release, contract, target, args.slice, documents)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    show(console, result, contract, target, args.slice)
    decided, reason = verdict(result.findings), diagnosis(result.findings)
    if expiry := expired(contract.targets[target].waiver, today):
        console.print(Text(f"broken: {expiry}", style=STYLES[FAIL]))
        decided, reason = FAIL, expiry
    write_json(args.json, {"verdict": decided, "reason": reason, **asdict(result)})
    return EXITS[decided]


if __name__ == "__main__":
    main()
