"""A folder that can be shipped and defends itself: artifacts, fallback, contract, sign-off and a loader.

    python -m eval.release --study runs/X --variant RECIPE --owner NAME [--public FILE] [--out FOLDER]

`--variant` takes one recipe for every target on which it is signed, or TARGET=RECIPE ... . Nothing is built
without a sign-off that verifies. docs/release.md describes the folder.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.core.artifacts import (
    MANIFEST,
    Key,
    build_artifact,
    digest,
    file_sha256,
    hash_files,
    read_manifest,
    write_text,
)
from eval.core.budget import Budget, load_budget
from eval.core.checks import CONTROL, FALLBACK, STUDENT, artifact_folder
from eval.core.commands import new_parser, study_from_command
from eval.core.documents import TEST, TRAIN, boundary_id, stream_documents
from eval.core.errors import UserError, entry, require_one_of
from eval.core.gate_file import GateFile
from eval.core.records import PLAIN, each_score, read_scores, record_path
from eval.core.study import Study, load_study
from eval.engines import load_engine, load_tokenizer, subject_of
from eval.gate.evidence import Evidence, collect_evidence
from eval.release.card import card
from eval.release.contract import build_contract, inputs, lineage, shipped
from eval.release.contract_file import CONTRACT, Contract, Signature, Target, contract_text
from eval.release.golden_answers import CANDIDATES, build_golden_answers
from eval.release.reference import reference
from eval.signoff.keys import from_raw, public_key
from eval.signoff.statement import FOLDER, Predicate
from eval.signoff.verify import problems, read_gate, row_of
from eval.stats.crossed import PASS

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey
    from transformers import PreTrainedTokenizerBase

LOADER, INDEX, CARD = "load_release.py", "release.json", "README.md"
TEMPLATES = Path(__file__).parent / "templates"
REHEARSAL = """
import json, sys
sys.dont_write_bytecode = True
sys.path.insert(0, ".")
for name in ("compress", "distill", "eval"):
    sys.modules[name] = None  # a release runs where this project is not installed
from load_release import load_release
print(json.dumps([load_release(".", target)[1].reason for target in sys.argv[1:]]))
"""


@dataclass(frozen=True)
class ReleaseEvidence:
    """What is released: for each target the sign-off, with the evidence behind it."""

    run: Path
    study: Study
    budget: Budget
    gate: GateFile
    evidence: Evidence
    predicates: dict[str, Predicate]  # target -> sign-off

    @property
    def seed(self) -> int:
        return self.study.seeds[0]

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(predicate.recipe for predicate in self.predicates.values()))

    def folder(self, arm: str, recipe: str = PLAIN) -> Path:
        folder = artifact_folder(self.run, arm, self.seed, recipe)
        assert folder is not None
        return folder


def parse_variants(run: Path, words: list[str]) -> dict[str, str]:
    """Target -> recipe, of RECIPE (each target on which it is signed) or TARGET=RECIPE."""
    recipes: dict[str, str] = {}
    known = read_gate(run).budget["targets"]
    for word in words:
        target, equals, recipe = word.rpartition("=")
        signed = [require_one_of("--variant: target", target, list(known))] if equals else []
        signed = signed or [name for name in known if (run / FOLDER / f"{recipe}-{name}.json").is_file()]
        if not signed:
            fix = f"run python -m eval.signoff --study {run} --variant {recipe} --by NAME --key FILE"
            raise UserError(f"release of {recipe!r}", "no sign-off in the run", fix)
        for name in signed:
            if name in recipes:
                raise UserError("--variant", f"two recipes for {name}", "name one recipe for a target")
            recipes[name] = recipe
    return recipes


def verify_signoffs(run: Path, words: list[str], trusted: "SSlibKey | None", today: date) -> ReleaseEvidence:
    """The evidence of a release whose sign-offs all hold.

    Raises:
        UserError: a sign-off is missing or does not hold, or a target that the budget requires has none.
    """
    predicates: dict[str, Predicate] = {}
    for target, recipe in parse_variants(run, words).items():
        path = run / FOLDER / f"{recipe}-{target}.json"
        if not path.is_file():
            fix = f"run python -m eval.signoff --study {run} --variant {recipe} --target {target} first"
            raise UserError(f"release of {recipe} on {target}", f"no sign-off {path}", fix)
        statement, problem_texts = problems(path, run, trusted, today)
        if problem_texts or statement is None:
            raise UserError(
                f"sign-off {path}",
                problem_texts[0],
                f"put back what was signed, or run python -m eval.signoff --variant {recipe} again",
            )
        predicates[target] = statement.predicate
        if (predicates[target].recipe, predicates[target].target) != (recipe, target):
            problem_texts = [f"speaks of {predicates[target].recipe} on {predicates[target].target}"]
            raise UserError(f"sign-off {path}", problem_texts[0], "rename one of them, and sign again")
    study, policies = load_study(run), {one.policy.name for one in predicates.values()}
    if len(policies) > 1:
        raise UserError("release", f"signed for the budgets {sorted(policies)}", "sign all for one budget")
    budget = load_budget(study, policies.pop())
    required = {name for name, target in budget.targets.items() if target.required}
    if missing := sorted(required - set(predicates)):
        fix = f"sign a variant on {missing[0]} and add {missing[0]}=RECIPE"
        raise UserError("release", f"the budget requires the target {missing[0]}", fix)
    return ReleaseEvidence(
        run, study, budget, read_gate(run), collect_evidence(run, study, budget), predicates
    )


@dataclass
class ReleaseFolder:
    """The release in the making."""

    sources: ReleaseEvidence
    place: Path
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the loader knows of each artifact

    def add(self, name: str, source: Path) -> str:
        """Copies an artifact to `name`, once."""
        if not (self.place / name).exists():
            shutil.copytree(source, self.place / name)
        return name

    def part(self, name: str) -> dict[str, Any]:
        """What the loader must know of an artifact: where it lies, its engine, and how to try it out."""
        if name not in self.parts:
            engine = subject_of(read_manifest(self.place / name)).engine
            documents = list(islice(stream_documents(self.sources.run / "data", TRAIN), CANDIDATES))
            loaded = load_engine(engine, self.place / name)
            answers = build_golden_answers(loaded, documents, self.sources.study.data.context)
            self.parts[name] = {
                "folder": name,
                "engine": engine,
                "golden_answers": [answer.model_dump() for answer in answers],
            }
        return self.parts[name]

    def fill(self, owner: str, day: date) -> Contract:
        sources = self.sources
        fallback = self.part(self.add("fallback", sources.folder(FALLBACK)))
        tokenizer = load_tokenizer(self.place / "fallback")
        targets, index = {}, {}
        for target, predicate in sources.predicates.items():
            name = self.add(f"variants/{predicate.recipe}", sources.folder(STUDENT, predicate.recipe))
            self.add(f"evidence/control/{predicate.recipe}", sources.folder(CONTROL, predicate.recipe))
            targets[target] = self.target(target, predicate)
            index[target] = {**self.part(name), **_facts(targets[target])}
        contract = build_contract(
            sources.evidence,
            sources.gate,
            targets=targets,
            owner=owner,
            released=day,
            inputs=inputs(sources.run, sources.study, len(tokenizer), boundary_id(tokenizer)),
            alpha=sources.budget.alpha,
        )
        self.write_evidence(tokenizer, contract)
        facts = {
            "schema_version": 1,
            "name": contract.name,
            "boundary": contract.inputs.boundary_token,
            "context": contract.inputs.context_tokens,
        }
        self.write(INDEX, _json({**facts, "targets": index, "fallback": fallback}))
        self.write(CONTRACT, contract_text(contract))
        base = sources.study.base
        self.write(CARD, card(contract, sources.gate, base.path if base.is_on_hub else None))
        self.write("lineage.json", _json(lineage(sources.run, sources.evidence, sources.recipes)))
        shutil.copy(TEMPLATES / LOADER, self.place / LOADER)
        return contract

    def target(self, target: str, predicate: Predicate) -> Target:
        sources, name = self.sources, f"{FOLDER}/{predicate.recipe}-{target}.json"
        (self.place / FOLDER).mkdir(exist_ok=True)
        shutil.copy(sources.run / name, self.place / name)
        key = from_raw(predicate.public_key).keyid
        signature = Signature(by=predicate.by, time=predicate.time, key=key, file=name)
        row = row_of(sources.gate, predicate.recipe, target)
        return shipped(sources.evidence, sources.gate, sources.budget, row, predicate, signature)

    def write_evidence(self, tokenizer: "PreTrainedTokenizerBase", contract: Contract) -> None:
        """What a recheck compares with: the signed scores, and how the documents of the study looked."""
        sources = self.sources
        models = {(FALLBACK, PLAIN), *((arm, r) for arm in (STUDENT, CONTROL) for r in sources.recipes)}
        for record in [*read_scores(sources.run), *each_score(sources.run, "test")]:
            if record.seed == sources.seed and (record.arm, record.recipe) in models:
                source = record_path(sources.run, record)
                place = self.place / "evidence" / source.relative_to(sources.run)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
        for name in ("gate.json", "study.yaml"):
            shutil.copy(sources.run / name, self.place / "evidence" / name)
        slices = next(iter(contract.targets.values())).gain
        self.write(
            "evidence/reference.json",
            reference(sources.run / "data", [*slices, TEST], tokenizer).model_dump_json() + "\n",
        )

    def write(self, name: str, text: str) -> None:
        write_text(self.place / name, text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _facts(target: Target) -> dict[str, Any]:
    waiver = target.waiver
    return {
        "device": target.device,
        "verdict": target.verdict,
        "waiver": waiver.reason if waiver else None,
        "expires": waiver.expires.isoformat() if waiver else None,
    }


def is_runnable(target: Target) -> bool:
    """Can the target's artifact be run on this machine?"""
    import torch

    return target.device == "cpu" or torch.cuda.is_available()


def rehearse(place: Path, targets: list[str]) -> None:
    """Loads every target in a fresh process that cannot see this project.

    Raises:
        UserError: the release would serve its fallback from the first day, or nothing at all.
    """
    write_text(place / MANIFEST, _json({"files": {n: e.model_dump() for n, e in hash_files(place).items()}}))
    process = subprocess.run(
        [sys.executable, "-I", "-c", REHEARSAL, *targets],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        exit_text = f"its loader ended with {process.returncode} ({last})"
        raise UserError(
            "release",
            exit_text,
            "nothing was released; load_release.py must load it: mend the artifact or its engine",
        )
    for target, reason in zip(targets, json.loads(process.stdout.splitlines()[-1]), strict=True):
        if reason:
            raise UserError(
                f"release for {target}",
                reason,
                "nothing was released; the loader must take the variant: mend its artifact",
            )


def build_release(sources: ReleaseEvidence, out: Path, owner: str, released: date) -> Contract:
    """The release at `out`, whole or not at all.

    Raises:
        UserError: `out` is there already, or what was built cannot be loaded.
    """
    if out.exists():
        raise UserError(f"release {out}", "is there already", "delete it, or give another place with --out")
    parents = {
        f"{target}: {predicate.recipe}": digest(predicate.files)
        for target, predicate in sources.predicates.items()
    }
    name = f"release of {sources.study.name}"
    with build_artifact(
        out, kind="release", name=name, key=Key(digest(parents)), parents=parents, facts={}
    ) as place:
        contract = ReleaseFolder(sources, place).fill(owner, released)
        rehearse(place, [name for name, target in contract.targets.items() if is_runnable(target)])
    return contract


def summary_lines(contract: Contract, out: Path) -> Iterator[str]:
    yield f"{out} holds {contract.name}"
    for name, target in contract.targets.items():
        by = target.signature.by
        yield f"  {name}: {target.recipe} ({target.engine}), {target.verdict}, signed by {by}"
        if not is_runnable(target):
            yield "    not tried out: no CUDA device here; load it on such a machine before you ship it"
        if target.waiver:
            yield f"    WAIVED until {target.waiver.expires}: {target.waiver.reason}"
        for cost in target.fallback_cost:
            if cost.verdict != PASS:
                yield f"    the fallback is not within the budget: {cost.reason}"
    yield f"sha256 of its {MANIFEST}, to be kept elsewhere: {file_sha256(out / MANIFEST)}"


@entry
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--variant", nargs="+", required=True, metavar="[TARGET=]RECIPE", help="what to ship")
    parser.add_argument("--owner", required=True, help="who answers for the release")
    parser.add_argument("--public", help="the signer's public key: only this one is trusted")
    parser.add_argument("--out", help="the folder to build (default: RUN/release/NAME)")
    study, args = study_from_command(parser)
    run, now = study.folder, datetime.now(UTC).date()
    sources = verify_signoffs(run, args.variant, public_key(Path(args.public)) if args.public else None, now)
    out = Path(args.out) if args.out else run / "release" / "-".join(sources.recipes)
    contract = build_release(sources, out, args.owner, now)
    print("\n".join(summary_lines(contract, out)))


if __name__ == "__main__":
    main()
