"""What was tried beside a release and did not hold, of the files that other commands wrote.

Of the release itself: variants that are not shipped, rivals, every verdict, and looks at the test documents
without a PASS. Beside it: rows of challenges that collapsed or cannot be told, methods of a comparison that
were not absorbed, runs without a PASS, recipes that could not be built.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from eval.challenge.outcome import SURVIVES, ChallengeFile, Outcome
from eval.compare.contrasts import ABSORBED, Compared, ComparisonFile
from eval.core.artifacts import file_sha256
from eval.core.checks import UNBUILT, read_unbuilt
from eval.core.errors import UserError, first_error
from eval.core.gate_file import GateFile
from eval.release.contract_file import Contract
from eval.release.origin import Entry
from eval.report.format import bounds_text, estimate_cell
from eval.stats.crossed import PASS

GATE, CHALLENGE, COMPARISON = "gate.json", "challenge.json", "compare.json"
KINDS: dict[str, type[BaseModel]] = {GATE: GateFile, CHALLENGE: ChallengeFile, COMPARISON: ComparisonFile}
# Kinds of entries: of the release, and beside it.
TRIED = ("not shipped", "rival", "verdict", "test documents")
BESIDE = ("not built", "challenge", "comparison", "other run", "not read")


def in_release(contract: Contract, gate: GateFile) -> Iterator[Entry]:
    """What the study of a release tried and did not ship, and every verdict of its gate."""
    shipped = {(name, target.recipe) for name, target in contract.targets.items()}
    for row in gate.variants:
        if (row.target, row.recipe) not in shipped:
            figures = row.model_dump(mode="json", include={"recipe", "target", "verdict", "kept_share", "p"})
            text = f"{row.recipe} on {row.target}: {row.verdict}: {row.reason}"
            yield Entry("not shipped", text, row.hashes.artifact.get(str(contract.seed), ""), figures=figures)
    for rival in gate.rivals:
        if rival.beats:
            text = f"{rival.what}: better by {estimate_cell(rival.lead)} {rival.lead.unit}"
            yield Entry("rival", text, figures=rival.model_dump(mode="json"))
    for run in gate.runs:
        text = f"{run.time} {run.verdict} by the budget {run.budget} ({run.budget_hash[:8]})"
        yield Entry("verdict", text, run.evidence, figures=run.model_dump(mode="json"))
    for look in gate.test_set.history if gate.test_set else ():
        if look.verdict != PASS:
            text = f"{look.time} {look.recipe}: {look.verdict or 'opened and not judged'}, by {look.by}"
            yield Entry("test documents", text, figures=look.model_dump(mode="json"))


def files_beside(release: Path, contract: Contract) -> list[Path]:
    """The files beside the run in whose folder a release lies; none where it lies elsewhere."""
    run = release.resolve().parent.parent
    if not (run / GATE).is_file() or run.name != contract.study:
        return []
    found = [path for name in KINDS for path in sorted(run.parent.glob(f"*/{name}")) if path.parent != run]
    return [*([run / UNBUILT] if (run / UNBUILT).is_file() else []), *found]


def beside(release: Path, contract: Contract, paths: Sequence[Path] | None) -> Iterator[Entry]:
    """What was tried and did not hold, of the files that are given, or of those that lie beside the run.

    Of those that lie there, runs on other documents and files that do not speak of the study are left out,
    and one that cannot be read is told as such.

    Raises:
        UserError: a file that is given cannot be read.
    """
    if paths is not None:
        for path in paths:
            yield from _entries(path, _read(path))
        return
    for path in files_beside(release, contract):
        try:
            file = _read(path)
        except UserError as error:
            yield Entry("not read", str(error.problem), file_sha256(path), str(path))
            continue
        if _speaks_of(file, contract):
            yield from _entries(path, file)


def _read(path: Path) -> BaseModel | dict[str, str]:
    """A file by its name, or by what it holds.

    Raises:
        UserError: it is none of those that are known.
    """
    if path.name == UNBUILT:
        return read_unbuilt(path.parent)
    fix = "give a gate.json, what eval.challenge or eval.compare --json wrote, or an unbuilt.json"
    if not path.is_file():
        raise UserError(f"--tried {path}", "no such file", fix)
    try:
        raw = json.loads(path.read_bytes())
        return (KINDS.get(path.name) or _kind(raw)).model_validate(raw)
    except ValidationError as error:
        raise first_error(f"--tried {path}", error, "have its command write it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--tried {path}", f"no such file of ours: {error}", fix) from error


def _kind(raw: Any) -> type[BaseModel]:
    names = set(raw) if isinstance(raw, dict) else set()
    for kind in KINDS.values():
        if names and names <= set(kind.model_fields):
            return kind
    raise ValueError(f"it holds {', '.join(sorted(names)) or type(raw).__name__}"[:80])


def _speaks_of(file: BaseModel | dict[str, str], contract: Contract) -> bool:
    """True of a run on the release's documents, and of a challenge or comparison of its study."""
    if isinstance(file, GateFile):
        return file.provenance.data == contract.data
    if isinstance(file, ChallengeFile):
        return file.config == contract.config
    return not isinstance(file, ComparisonFile) or contract.config in [row.config for row in file.rows]


def _entries(path: Path, file: BaseModel | dict[str, str]) -> Iterator[Entry]:
    digest = file_sha256(path)
    for what, text, figures in _fallen(file):
        yield Entry(what, text, digest, str(path), figures)


def _fallen(file: BaseModel | dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of what a file tells all that did not hold: its kind, a sentence, and the figures."""
    if isinstance(file, GateFile):
        if file.verdict != PASS:
            figures = file.model_dump(mode="json", include={"study", "method", "verdict", "teacher_gain"})
            yield "other run", f"{file.study} ({file.method}): {file.verdict}: {file.reason}", figures
    elif isinstance(file, ChallengeFile):
        for row in file.rows:
            if row.verdict != SURVIVES:
                text = f"{file.study}: {row.verdict}: {row.what}: {row.claim}"
                yield "challenge", f"{text}; {_measured(row)}", row.model_dump(mode="json")
    elif isinstance(file, ComparisonFile):
        for one in file.rows:
            if one.result != ABSORBED:
                text = f"{one.study} ({one.method}): {one.result}; {_measured(one)}"
                yield "comparison", text, one.model_dump(mode="json")
    else:
        assert isinstance(file, dict)
        for recipe, why in file.items():
            yield "not built", f"{recipe}: {why}", {"recipe": recipe, "why": why}


def _measured(row: Outcome | Compared) -> str:
    return f"gain {bounds_text(row.gain)}, lead {bounds_text(row.lead)} {row.gain.unit}"
