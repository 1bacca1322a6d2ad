"""A folder that can be shipped and defends itself: artifacts, fallback, contract, sign-off and a loader.

    python -m eval.release --study runs/X --variant RECIPE --owner NAME --key FILE --public FILE ...

`--variant` takes one recipe for every target on which it is signed, or TARGET=RECIPE ... . Nothing is built
without a sign-off that verifies, and `--key` signs the folder as a whole. docs/release.md describes it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from eval.core.board import Board
from eval.core.budget import Budget
from eval.core.checks import CONTROL, FALLBACK, STUDENT, artifact_folder
from eval.core.commands import add_json, count, new_parser, study_from_command, text_line, write_json
from eval.core.documents import TRAIN, boundary_id, slices_of_test, stream_documents
from eval.core.errors import UserError, entry, require_one_of
from eval.core.gate_file import GateFile, read_gate
from eval.core.records import PLAIN, each_score, read_scores, record_path
from eval.core.study import Study, load_study
from eval.engines import load_engine, load_tokenizer, subject_of
from eval.gate.evidence import Evidence, collect_evidence
from eval.release import load_release
from eval.release.bom import BOM, bill_of_materials
from eval.release.card import card
from eval.release.contract import (
    build_contract,
    floors,
    inputs,
    lineage,
    loader_cost,
    loader_facts,
    refuse_broken_floors,
    refuse_lost_limits,
    shipped,
)
from eval.release.contract_file import CONTRACT, Contract, Signature, Target, contract_text
from eval.release.golden_answers import CANDIDATES, build_golden_answers
from eval.release.model_signature import require_model_signing, sign_model
from eval.release.origin import made_from
from eval.release.reference import reference
from eval.release.rehearsal import is_runnable, rehearse
from eval.report.format import remarks
from eval.signoff.keys import Trusted, from_text, private_key, read_trusted, wrapped
from eval.signoff.statement import FOLDER, TYPE, Predicate, signoff_path
from eval.signoff.verify import GATE, Rerun, problems, row_of
from eval.stats.crossed import FAIL, PASS

if TYPE_CHECKING:
    from securesystemslib.signer import Signer
    from transformers import PreTrainedTokenizerBase

CARD, LINEAGE = "README.md", "lineage.json"
STEPS = {"sign-offs": 1.0, "artifacts": 1.0, "loader": 1.0}  # what takes seconds; taken as equally long
RELEASE: Final = "https://absorb.example/release/v1"  # type of the predicate that signs a folder


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
        signed = signed or [name for name in known if signoff_path(run, recipe, name).is_file()]
        if not signed:
            fix = f"run absorb sign --study {run} --variant {recipe} --by NAME --key FILE"
            raise UserError(f"release of {recipe!r}", "no sign-off in the run", fix)
        for name in signed:
            if name in recipes:
                raise UserError("--variant", f"two recipes for {name}", "name one recipe for a target")
            recipes[name] = recipe
    return recipes


def verify_signoffs(run: Path, words: list[str], trusted: Trusted, today: date) -> ReleaseEvidence:
    """The evidence of a release whose sign-offs all hold.

    Raises:
        UserError: a sign-off is missing or does not hold, or a target that the budget requires has none.
    """
    predicates: dict[str, Predicate] = {}
    rerun = Rerun(run)
    for target, recipe in parse_variants(run, words).items():
        path = signoff_path(run, recipe, target)
        if not path.is_file():
            fix = f"run absorb sign --study {run} --variant {recipe} --target {target} first"
            raise UserError(f"release of {recipe} on {target}", f"no sign-off {path}", fix)
        signed, problem_texts = problems(path, rerun, trusted, today)
        if problem_texts:
            raise UserError(
                f"sign-off {path}",
                problem_texts[0],
                f"put back what was signed, or run absorb sign --variant {recipe} again",
            )
        predicates[target] = signed[0].predicate
        if file_sha256(run / GATE) != predicates[target].files[GATE]:
            fix = f"run absorb sign --variant {recipe} again"
            raise UserError(f"{run / GATE}", "its sentences are not those that were signed", fix)
    study, budget = load_study(run), Budget.of_gate(rerun.gate.budget)
    required = {name for name, target in budget.targets.items() if target.required}
    if missing := sorted(required - set(predicates)):
        fix = f"sign a variant on {missing[0]} and add {missing[0]}=RECIPE"
        raise UserError("release", f"the budget requires the target {missing[0]}", fix)
    return ReleaseEvidence(run, study, budget, rerun.gate, collect_evidence(run, study, budget), predicates)


@dataclass
class ReleaseFolder:
    """The release in the making."""

    sources: ReleaseEvidence
    place: Path
    finish: Callable[[str], None]  # called with each of STEPS once it is done
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
            require_one_of(f"engine of {name}", engine, list(load_release.ENGINES))
            documents = list(islice(stream_documents(self.sources.run / "data", TRAIN), CANDIDATES))
            loaded = load_engine(engine, self.place / name)
            answers = build_golden_answers(loaded, documents, self.sources.study.data.context)
            self.parts[name] = {
                "folder": name,
                "engine": engine,
                "boundary": boundary_id(loaded.tokenizer),  # a variant may have a vocabulary of its own
                "golden_answers": [answer.model_dump() for answer in answers],
            }
        return self.parts[name]

    def fill(self, owner: str, day: date, recheck_days: int | None) -> Contract:
        sources = self.sources
        fallback = self.part(self.add("fallback", sources.folder(FALLBACK)))
        tokenizer = load_tokenizer(self.place / "fallback")
        targets, index = {}, {}
        for target, predicate in sources.predicates.items():
            name = self.add(f"variants/{predicate.recipe}", sources.folder(STUDENT, predicate.recipe))
            self.add(f"evidence/control/{predicate.recipe}", sources.folder(CONTROL, predicate.recipe))
            targets[target] = self.target(target, predicate)
            index[target] = {**self.part(name), **loader_facts(targets[target])}
        refuse_broken_floors(targets)
        self.finish("artifacts")
        contract = build_contract(
            sources.evidence,
            sources.gate,
            targets=targets,
            owner=owner,
            released=day,
            recheck_days=recheck_days,
            inputs=inputs(sources.run, sources.study, len(tokenizer), boundary_id(tokenizer)),
            alpha=sources.budget.alpha,
        )
        self.write_evidence(tokenizer, contract)
        facts = {
            "schema_version": 2,
            "name": contract.name,
            "released": contract.released.isoformat(),
            "context": contract.inputs.context_tokens,
            "recheck_days": recheck_days,
        }
        self.write(load_release.INDEX, _json({**facts, "targets": index, "fallback": fallback}))
        self.write(LINEAGE, _json(lineage(sources.run, sources.evidence, sources.recipes)))
        shutil.copy(load_release.__file__, self.place / "load_release.py")
        contract = self.tried(contract)
        self.finish("loader")
        return contract

    def tried(self, contract: Contract) -> Contract:
        """The contract with what was measured through the loader, where this machine has the device."""
        targets, study = dict(contract.targets), self.sources.study
        for name, target in targets.items():
            if is_runnable(target):
                texts = (document.text for document in stream_documents(self.sources.run / "data", TRAIN))
                processes = rehearse(self.place, name, target, study.cost, texts)
                of = (self.sources.evidence, self.sources.budget, name, target.recipe)
                cost = loader_cost(*of, processes)
                targets[name] = target.model_copy(update={"loader_cost": cost})
                refuse_lost_limits(name, targets[name])
        contract = contract.model_copy(update={"targets": targets})
        base = study.base
        self.write(CONTRACT, contract_text(contract))
        behind = json.loads((self.place / LINEAGE).read_text(encoding="utf-8"))
        self.write(BOM, _json(bill_of_materials(contract, behind)))
        gate = self.sources.gate
        origin = [*made_from(contract, behind, gate)]
        said = [f"{gate.verdict}: {gate.reason}", *remarks(gate)]
        self.write(CARD, card(contract, base.path if base.is_on_hub else None, origin, said))
        return contract

    def target(self, target: str, predicate: Predicate) -> Target:
        sources = self.sources
        name = signoff_path(Path(), predicate.recipe, target).as_posix()
        (self.place / FOLDER).mkdir(exist_ok=True)
        shutil.copy(sources.run / name, self.place / name)
        key = from_text(predicate.public_key).keyid
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
        data = sources.run / "data"
        slices = next(iter(contract.targets.values())).gain
        self.write(
            "evidence/reference.json",
            reference(data, [*slices, *slices_of_test(data)], tokenizer).model_dump_json() + "\n",
        )

    def write(self, name: str, text: str) -> None:
        write_text(self.place / name, text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sign_folder(place: Path, signer: "Signer", owner: str) -> None:
    """Signs every file that lies there, the manifest too: an in-toto statement whose subjects they are."""
    hashes = {name: entry.sha256 for name, entry in hash_files(place).items()}
    hashes[MANIFEST] = file_sha256(place / MANIFEST)
    subjects = [{"name": name, "digest": {"sha256": sha}} for name, sha in hashes.items()]
    about = {"owner": owner, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    statement = {"_type": TYPE, "subject": subjects, "predicateType": RELEASE, "predicate": about}
    write_text(place / load_release.SIGNATURE, wrapped(json.dumps(statement).encode(), signer) + "\n")


def build_release(
    sources: ReleaseEvidence,
    out: Path,
    owner: str,
    released: date,
    signer: "Signer",
    recheck_days: int | None = None,
    finish: Callable[[str], None] = lambda step: None,
) -> Contract:
    """The release at `out`, whole or not at all.

    Args:
        finish: called with each of `STEPS` once it is done.

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
        out,
        kind="release",
        name=name,
        key=Key(digest(parents)),
        parents=parents,
        facts={},
        finish=lambda place: sign_folder(place, signer, owner),
    ) as place:
        contract = ReleaseFolder(sources, place, finish).fill(owner, released, recheck_days)
    return contract


def summary_lines(contract: Contract, out: Path) -> Iterator[str]:
    yield f"{out} holds {contract.name}"
    for name, target in contract.targets.items():
        by = target.signature.by
        yield f"  {name}: {target.recipe} ({target.engine}), {target.verdict}, signed by {by}"
        if not is_runnable(target):
            yield "    not tried out: no CUDA device here; load it on such a machine before you ship it"
        if target.budget_note:
            yield f"    {target.budget_note}"
        if target.waiver:
            yield f"    WAIVED until {target.waiver.expires}: {target.waiver.reason}"
        for of, slice_name, saving in floors(target):
            chance = getattr(target.one_seed[slice_name], f"over_{of}")
            likely = f"{100 * chance:.0f} % of single seeds keep it" if chance is not None else "one seed"
            if saving.verdict is not None:
                yield f"    floor over the {of} on {slice_name}: {saving.verdict}; {likely}"
        for cost in target.loader_cost.limits if target.loader_cost else ():
            yield f"    through the loader, {cost.reason}: {cost.verdict}"
        for cost in target.fallback_cost:
            if cost.verdict != PASS:
                within = "is not" if cost.verdict == FAIL else "is not shown to be"
                yield f"    the fallback {within} within the budget: {cost.reason}"
    yield f"sha256 of its {MANIFEST}, to be kept elsewhere: {file_sha256(out / MANIFEST)}"


@entry
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--variant", nargs="+", required=True, metavar="[TARGET=]RECIPE", help="what to ship")
    parser.add_argument("--owner", type=text_line, required=True, help="who answers for the release")
    parser.add_argument("--key", required=True, help="the private key that signs the folder as a whole")
    about = "public keys, or files of allowed signers: these are trusted and no others"
    parser.add_argument("--public", nargs="+", required=True, metavar="FILE", help=about)
    about = "the owner promises a recheck at least so often; the loader warns where none came"
    parser.add_argument("--recheck-days", type=count, metavar="DAYS", help=about)
    parser.add_argument("--out", help="the folder to build (default: RUN/release/NAME)")
    about = "sign it once more as OpenSSF's model signing does, into a file beside it (OUT.sig)"
    parser.add_argument("--openssf", action="store_true", help=about)
    add_json(parser)
    study, args = study_from_command(parser)
    if study.task != "causal_lm":
        fix = "ship the variant's folder with its sign-off: transformers or OpenVINO load it"
        raise UserError("eval.release", f"task {study.task}: its loader and its contract are of text", fix)
    run, now = study.folder, datetime.now(UTC).date()
    board = Board("release", STEPS)
    with board.bar:
        sources = verify_signoffs(run, args.variant, read_trusted(args.public), now)
        out = Path(args.out) if args.out else run / "release" / "-".join(sources.recipes)
        signer = private_key(args.key, Path(args.public[0]))
        if args.openssf:
            require_model_signing(args.key, signer, out)
        board.finish("sign-offs")
        contract = build_release(sources, out, args.owner, now, signer, args.recheck_days, board.finish)
    print("\n".join(summary_lines(contract, out)))
    write_json(args.json, contract)
    if args.openssf:
        print(f"OpenSSF model signature: {sign_model(out, args.key)}")


if __name__ == "__main__":
    main()
