"""What a sign-off rests on, made again from the bytes of a run and held against what was signed."""

import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from eval.core.artifacts import MANIFEST, verify_artifact
from eval.core.budget import Budget, Target, load_budget
from eval.core.checks import CONTROL, FALLBACK, STUDENT, artifact_folder
from eval.core.config import find_config
from eval.core.errors import UserError, expected_text, require_one_of
from eval.core.gate_file import GateFile, Variant
from eval.core.records import PLAIN
from eval.core.study import Study, load_study
from eval.gate.decision import evaluate_gate
from eval.gate.evidence import collect_evidence
from eval.gate.pick import is_shippable
from eval.signoff.statement import Policy, Predicate, Statement, expired, read_statement, signed_digest
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

ALIKE = 1e-9  # relative: a processor with other vector units may round the last digits of a figure otherwise
REPORTS = ("table.md", "table.csv", "report.html")  # made from gate.json; signed where they are there


def read_gate(run: Path) -> GateFile:
    path, fix = run / "gate.json", f"run `python -m eval.gate --study {run}`"
    if not path.is_file():
        raise UserError("gate.json", f"missing in {run}", fix)
    try:
        return GateFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UserError(f"{path}: {place}", expected_text(first), fix) from error


def first_difference(a: Any, b: Any, place: str = "") -> str | None:
    """The first place where two JSON values differ; figures within `ALIKE` are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if key == "how":  # a command for whoever reads it: it names the folder as it was called then
                continue
            below = f"{place}.{key}" if place else key
            if (key in a) != (key in b):
                return f"{below} is {'missing' if key in b else 'new'}"
            if inner := first_difference(a[key], b[key], below):
                return inner
        return None
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return next((f for i, (x, y) in pairs if (f := first_difference(x, y, f"{place}.{i}"))), None)
    if isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=ALIKE, abs_tol=1e-12):
        return None
    return None if a == b else f"{place} is {_short(a)}, the records give {_short(b)}"


def _short(value: Any) -> str:
    return repr(value)[:60]


def difference_from_records(run: Path, study: Study, budget: Budget, gate: GateFile) -> str | None:
    """Where gate.json differs from what the records, artifacts and budget give now.

    Raises:
        UserError: the records, artifacts and budget do not fit each other.
    """
    now = evaluate_gate(collect_evidence(run, study, budget), budget, gate)
    return first_difference(gate.model_dump(mode="json"), now.model_dump(mode="json"))


def row_of(gate: GateFile, recipe: str, target: str) -> Variant:
    """The row of gate.json; UserError with the nearest name where there is none."""
    require_one_of("--target", target, sorted({row.target for row in gate.variants}))
    rows = {row.recipe: row for row in gate.variants if row.target == target}
    return rows[require_one_of(f"variant on {target}", recipe, list(rows))]


def unmeasured(gate: GateFile, row: Variant) -> str | None:
    """What keeps anybody from signing: the target, or a required one, that nobody has measured."""
    if not row.measured:
        return f"{row.recipe} was not measured on {row.target}: run {row.how}"
    for name, values in gate.budget["targets"].items():
        rows = [other for other in gate.variants if other.target == name]
        if Target.model_validate(values).required and not any(other.measured for other in rows):
            return f"nothing was measured on {name}, which the budget requires: run {rows[0].how}"
    return None


def signable_verdict(gate: GateFile, row: Variant) -> tuple[Verdict, str]:
    """What is signed: the verdict of the row, as a pick among several and on the test documents too."""
    if row.verdict == PASS and not is_shippable(row, gate.budget["alpha"]):
        return INCONCLUSIVE, row.reason
    history = gate.test_set.history if gate.test_set else []
    looks = [look for look in history if look.same and look.recipe == row.recipe]
    # Whatever the budget of a look was: what did not pass is not made good by a second one. One that was cut
    # short, and not repeated, is no PASS either.
    verdicts = [look.verdict or INCONCLUSIVE for look in looks if look.verdict or look is looks[-1]]
    seen: Verdict = next((v for v in (FAIL, INCONCLUSIVE) if v in verdicts), PASS)
    if row.verdict == PASS and seen != PASS:
        return seen, f"{row.reason}; on the test documents it is {seen}"
    return row.verdict, row.reason


def artifacts(run: Path, gate: GateFile, recipe: str) -> dict[str, Path]:
    """arm/s<seed>/recipe -> folder: what is signed, its control, their parents and the fallback."""
    wanted = [(STUDENT, recipe), (CONTROL, recipe), (STUDENT, PLAIN), (CONTROL, PLAIN), (FALLBACK, PLAIN)]
    places = {}
    for arm, recipe_name in dict.fromkeys(wanted):
        for seed in gate.seeds:
            folder = artifact_folder(run, arm, seed, recipe_name)
            assert folder is not None
            places[f"{arm}/s{seed}/{recipe_name}"] = folder
    return places


def signed_files(run: Path, gate: GateFile, recipe: str) -> dict[str, str]:
    """Path below the run folder -> digest of every file that the sign-off rests on.

    Of an artifact it is the manifest, which holds the hashes of the files beside it.
    """
    folders = [run / "data", *artifacts(run, gate, recipe).values()]
    names = ["study.yaml", "gate.json", *(name for name in REPORTS if (run / name).is_file())]
    names += [(folder / MANIFEST).relative_to(run).as_posix() for folder in folders]
    names += gate.provenance.records
    return {name: signed_digest(run / name) for name in names}


def policy(study: Study, budget: Budget, name: str | None, gate: GateFile) -> Policy:
    """The budget by its bytes and values."""
    chosen = name or study.budget
    return Policy(
        name=chosen, sha256=signed_digest(find_config("budgets", chosen)), hash=str(gate.budget["hash"])
    )


def problems(
    path: Path, run: Path, trusted: "SSlibKey | None", today: date
) -> tuple[Statement | None, list[str]]:
    """The sign-off at `path` and all that speaks against it: an empty list means that it is verified."""
    try:
        statement, _ = read_statement(path, trusted)
    except UserError as error:
        return None, [str(error.problem)]
    predicate = statement.predicate
    problem_texts = [*_files(statement, run), *_artifacts(predicate, run)]
    problem_texts += [*_collect_problems(_policy(predicate)), *_collect_problems(_gate(predicate, run))]
    if expiry := expired(predicate.waiver, today):
        problem_texts.append(expiry)
    if path.name != f"{predicate.recipe}-{predicate.target}.json":
        problem_texts.append(f"it speaks of {predicate.recipe} on {predicate.target}, its name of another")
    return statement, problem_texts


def _collect_problems(checks: Iterator[str]) -> list[str]:
    """What the checks find, up to and with the first thing that keeps them from going on."""
    problem_texts = []
    try:
        for problem in checks:
            problem_texts.append(problem)
    except UserError as error:
        problem_texts.append(str(error))
    return problem_texts


def _files(statement: Statement, run: Path) -> Iterator[str]:
    signed = {s.name: s.digest.sha256 for s in statement.subject} | statement.predicate.files
    for name, was in signed.items():
        if not (run / name).is_file():
            yield f"{name} is missing"
            continue
        try:
            now = signed_digest(run / name)
        except UserError as error:
            yield str(error)
            continue
        if now != was:
            yield f"{name} has sha256 {now[:12]}, signed was {was[:12]}"


def _artifacts(predicate: Predicate, run: Path) -> Iterator[str]:
    for folder in [(run / name).parent for name in predicate.files if Path(name).name == MANIFEST]:
        if not (folder / MANIFEST).is_file():
            continue  # reported as a missing file
        try:
            verify_artifact(folder)
        except UserError as error:
            yield f"{error.thing}: {error.problem}"


def _policy(predicate: Predicate) -> Iterator[str]:
    path = find_config("budgets", predicate.policy.name)
    if (now := signed_digest(path)) != predicate.policy.sha256:
        yield f"budget {path} has sha256 {now[:12]}, signed was {predicate.policy.sha256[:12]}"


def _gate(predicate: Predicate, run: Path) -> Iterator[str]:
    """Is gate.json what the records give, and the signed verdict what gate.json says?"""
    study, gate = load_study(run), read_gate(run)
    row = row_of(gate, predicate.recipe, predicate.target)
    verdict, _ = signable_verdict(gate, row)
    if gate.budget["hash"] != predicate.policy.hash:
        yield "gate.json was made with another budget than the signed one"
    if verdict != predicate.verdict:
        variant = f"{predicate.recipe} on {predicate.target}"
        yield f"gate.json says {verdict} of {variant}, signed was {predicate.verdict}"
    if verdict != PASS and predicate.waiver is None:
        yield f"{predicate.recipe} on {predicate.target} is {verdict} and nobody waived that"
    budget = load_budget(study, predicate.policy.name)
    if apart := difference_from_records(run, study, budget, gate):
        yield f"gate.json: {apart}"
