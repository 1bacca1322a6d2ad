"""What a sign-off rests on, made again from the bytes of a run and held against what was signed.

What is signed is figures and hashes. gate.json and the reports may hold other sentences: they must be the
bytes that were signed, or what comes out when they are made again.
"""

from collections.abc import Iterator
from datetime import date, datetime, timedelta
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

from eval.core.artifacts import MANIFEST, file_sha256, read_manifest, verify_artifact
from eval.core.budget import Budget, Target
from eval.core.checks import (
    CONTROL,
    FALLBACK,
    STUDENT,
    artifact_folder,
    member_folders,
    teacher_folder,
)
from eval.core.errors import UserError, require_one_of
from eval.core.gate_file import GateFile, Variant, read_gate
from eval.core.plan import PLAN, read_plan
from eval.core.records import PLAIN
from eval.core.study import load_study
from eval.gate.caveats import doubt_budget
from eval.gate.decision import evaluate_gate
from eval.gate.evidence import collect_evidence
from eval.gate.pick import is_shippable
from eval.report.__main__ import render_reports
from eval.signoff.figures import COMMANDS, figures_of, first_difference, without_drawn
from eval.signoff.keys import Trusted
from eval.signoff.statement import (
    Policy,
    Predicate,
    Signed,
    Statement,
    expired,
    latest,
    read_bundle,
)
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict

GATE = "gate.json"
REPORTS = ("table.md", "table.csv", "report.html")  # made from gate.json; signed where they are there
# Of gate.json, what is signed beside the row of the variant.
SIGNED = {"verdict", "recommended", "level", "budget", "seeds", "documents", "clusters", "teacher_gain"}
SIGNED |= {"teacher_gain_slices", "scores", "kept_by_student", "rivals", "test_set", "fixed"}


class Rerun:
    """A run as it is now, with its verdict computed again from the records, once for all who ask.

    Raises:
        UserError: the records, artifacts and budget do not fit each other.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._faults: dict[Path, str] = {}

    @cached_property
    def gate(self) -> GateFile:
        return read_gate(self.run)

    @cached_property
    def now(self) -> GateFile:
        budget, study = Budget.of_gate(self.gate.budget), load_study(self.run)
        return evaluate_gate(collect_evidence(self.run, study, budget), budget, self.gate)

    def fault(self, folder: Path) -> str:
        """What is wrong with the files of an artifact, which are read once; empty where nothing is."""
        if folder not in self._faults:
            try:
                verify_artifact(folder)
                self._faults[folder] = ""
            except UserError as error:
                self._faults[folder] = f"{error.thing}: {error.problem}"
        return self._faults[folder]

    def worded_otherwise(self) -> str | None:
        """Where gate.json is not what the gate would write now, sentences included."""
        return first_difference(figures_of(self.gate, COMMANDS), figures_of(self.now, COMMANDS))

    def differs(self) -> str | None:
        """Where a verdict, a figure or a hash of gate.json is not what the records give now."""
        was, is_ = (without_drawn(figures_of(gate)) for gate in (self.gate, self.now))
        return first_difference(was, is_)

    def forged_reports(self, names: list[str]) -> Iterator[str]:
        """Of these reports, each that is not what gate.json gives, with the first line that differs."""
        for name in names:
            there, made = (self.run / name).read_bytes(), self.reports[name].encode()
            if there != made:
                number, odd = _first_odd_line(there, made)
                yield f"{name}: line {number} is not what gate.json gives: {odd!r}"

    @cached_property
    def reports(self) -> dict[str, str]:
        """Every report as gate.json gives it, by its name."""
        return render_reports(self.run, self.gate)


def _first_odd_line(there: bytes, made: bytes) -> tuple[int, str]:
    """Number and text, from the first letter on, of the first line that is not what was made."""
    pairs = zip_longest(there.split(b"\n"), made.split(b"\n"))
    number, (a, b) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
    if a is None or b is None:
        return number, "nothing" if a is None else a.decode(errors="replace")[:60]
    was, is_ = a.decode(errors="replace"), b.decode(errors="replace")
    start = next((i for i, (x, y) in enumerate(zip_longest(was, is_)) if x != y), 0)
    return number, (was[start:] if was[start:].strip() else was)[:60]  # the whole line where it was cut short


def judged_folders(run: Path, gate: GateFile) -> list[Path]:
    """Folders of all artifacts that the gate judged, rivals and others, and of teachers what lies here."""
    folders = []
    for arm, seed, recipe in (name.split("/", 2) for name in gate.provenance.artifacts):
        place = artifact_folder(run, arm, int(seed[1:]), recipe)
        if place is not None:
            folders.append(place)
        elif ((teacher := teacher_folder(run, arm, int(seed[1:]))) / MANIFEST).is_file():
            folders += [teacher, *member_folders(run, read_manifest(teacher))]
    return list(dict.fromkeys(folders))


def signed_figures(gate: GateFile, row: Variant) -> dict[str, Any]:
    """What is signed of gate.json: the row of a variant, and what it rests on."""
    whole = figures_of(gate)
    return {**{name: whole[name] for name in sorted(SIGNED)}, "row": figures_of(row)}


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
    looks = [look for look in history if row.recipe in look.seen]
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

    Of an artifact it is the manifest, which holds the hashes of the files beside it. The other artifacts that
    the gate judged belong to it: the signed figures tell how rivals and other variants did.
    """
    folders = [run / "data", *artifacts(run, gate, recipe).values(), *judged_folders(run, gate)]
    names = [PLAN] if (run / PLAN).is_file() else []
    names += ["study.yaml", GATE, *(name for name in REPORTS if (run / name).is_file())]
    names += [(folder / MANIFEST).relative_to(run).as_posix() for folder in folders]
    names += gate.provenance.records
    return {name: file_sha256(run / name) for name in names}


def budget_note(gate: GateFile) -> str | None:
    """What to say wherever it ships, unless it was judged by what was fixed before the first figure."""
    return "; ".join(doubt_budget(gate.budget["name"], gate.fixed)) or None


def to_waive(gate: GateFile, verdict: Verdict, reason: str) -> str:
    """What ships on a waiver alone: no PASS, or a budget that was chosen later; empty where neither is."""
    failed = None if verdict == PASS else f"the verdict is {verdict}: {reason}"
    return "; ".join(filter(None, (failed, budget_note(gate))))


def policy(run: Path, gate: GateFile) -> Policy:
    """The budget by its values, and how it stands to the one that was fixed.

    What a waiver needs is the stricter of both: another budget cannot soften it.
    """
    budget, plan = Budget.of_gate(gate.budget), read_plan(run)
    waivers = [budget.waivers, *([plan.budget.waivers] if plan else [])]
    return Policy(
        name=budget.name,
        hash=str(gate.budget["hash"]),
        fixed=budget_note(gate) is None,
        plan=gate.fixed.hash if gate.fixed else "",
        signatures=max(one.signatures for one in waivers),
        days=min(one.days for one in waivers),
    )


def problems(
    path: Path, rerun: Rerun, trusted: Trusted | None, today: date
) -> tuple[list[Signed], list[str]]:
    """The statements of a sign-off that count, and all that speaks against them: none, if it is verified."""
    try:
        signed = latest(read_bundle(path, trusted))
    except UserError as error:
        return [], [f"{error.thing.removeprefix(f'sign-off {path}: ')}: {error.problem}"]
    objections: list[str] = []
    for one in signed:
        texts = [*_files(one.statement, rerun), *_collect_problems(_artifacts(one.predicate, rerun))]
        texts += [*_collect_problems(_gate(one.predicate, rerun)), *_waiver(one.predicate, today)]
        objections += [
            f"line {one.line}: {text}" if len(signed) > 1 else text for text in dict.fromkeys(texts)
        ]
    return signed, objections + too_few_signatures(signed)


def too_few_signatures(signed: list[Signed]) -> list[str]:
    """A waiver needs as many keys as the budget says."""
    waived = [one for one in signed if one.predicate.waiver]
    needed = max((one.predicate.policy.signatures for one in waived), default=0)
    if len(waived) >= needed:
        return []
    return [f"the waiver has {len(waived)} of {needed} signatures that the budget asks"]


def last_day(signed_at: datetime, days: int) -> date:
    """The last day that a waiver may name."""
    return signed_at.date() + timedelta(days=days)


def _waiver(predicate: Predicate, today: date) -> Iterator[str]:
    if predicate.waiver is None:
        return
    last = last_day(datetime.fromisoformat(predicate.time), predicate.policy.days)
    if predicate.waiver.expires > last:
        yield f"the waiver ends on {predicate.waiver.expires}, the budget allows {last} at latest"
    if expiry := expired(predicate.waiver, today):
        yield expiry


def _collect_problems(checks: Iterator[str]) -> list[str]:
    """What the checks find, up to and with the first thing that keeps them from going on."""
    problem_texts = []
    try:
        for problem in checks:
            problem_texts.append(problem)
    except UserError as error:
        problem_texts.append(str(error))
    return problem_texts


def _files(statement: Statement, rerun: Rerun) -> Iterator[str]:
    signed = {s.name: s.digest.sha256 for s in statement.subject} | statement.predicate.files
    reports = [name for name in REPORTS if name not in signed and (rerun.run / name).is_file()]
    for name, was in signed.items():
        if not (rerun.run / name).is_file():
            yield f"{name} is missing"
        elif (now := file_sha256(rerun.run / name)) != was and name in REPORTS:
            reports.append(name)
        elif now != was and name != GATE:
            yield f"{name} has sha256 {now[:12]}, signed was {was[:12]}"
    if reports:
        yield from _collect_problems(rerun.forged_reports(reports))


def _artifacts(predicate: Predicate, rerun: Rerun) -> Iterator[str]:
    """What is wrong with the files of the signed artifacts, and of those in the table beside them."""
    signed = [(rerun.run / name).parent for name in predicate.files if Path(name).name == MANIFEST]
    there = [folder for folder in signed if (folder / MANIFEST).is_file()]  # else reported as missing
    yield from filter(None, map(rerun.fault, there))
    yield from filter(
        None, (rerun.fault(folder) for folder in judged_folders(rerun.run, rerun.now) if folder not in there)
    )


def _gate(predicate: Predicate, rerun: Rerun) -> Iterator[str]:
    """Is gate.json what the records give, and are the signed figures those of gate.json?"""
    gate, signed_by = rerun.gate, predicate.policy
    if signed_by.hash != gate.budget["hash"]:
        judged = f"{gate.budget['name']!r} ({gate.budget['hash'][:8]})"
        signed_one = f"{signed_by.name!r} ({signed_by.hash[:8]})"
        yield (
            f"{GATE} is judged by budget {judged} now, what was signed by {signed_one}: "
            "run absorb gate with that budget, or sign again"
        )
        return
    row = row_of(gate, predicate.recipe, predicate.target)
    verdict, reason = signable_verdict(gate, row)
    if verdict != predicate.verdict:
        variant = f"{predicate.recipe} on {predicate.target}"
        yield f"{GATE} says {verdict} of {variant}, signed was {predicate.verdict}"
    if predicate.waiver is None and (why := to_waive(gate, verdict, reason)):
        yield f"{predicate.recipe} on {predicate.target}: {why}; nobody waived that"
    if signed_by != policy(rerun.run, gate):
        yield f"{GATE} was made with another plan than the signed one"
    if gate.runs[predicate.judged.number - 1 : predicate.judged.number] != [predicate.judged]:
        yield f"gate-runs.jsonl does not hold verdict {predicate.judged.number}, which was signed"
    signed, figures = without_drawn(predicate.figures), without_drawn(signed_figures(gate, row))
    if apart := first_difference(signed, figures, words=("was", f"{GATE} has")):
        yield f"{GATE} is not what was signed: {apart}"
    if (apart := rerun.differs()) or (
        file_sha256(rerun.run / GATE) != predicate.files[GATE] and (apart := rerun.worded_otherwise())
    ):
        yield f"{GATE}: {apart}"
