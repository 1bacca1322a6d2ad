"""Is a release what was signed? Its bytes, its contract drawn again from the signed records, its keys."""

from pathlib import Path
from typing import Any

from eval.core.artifacts import MANIFEST, FileEntry, file_sha256, hash_files, read_manifest, verify_artifact
from eval.core.checks import CONTROL, FALLBACK, STUDENT
from eval.core.errors import UserError, require_one_of
from eval.core.gate_file import read_gate
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import load_study
from eval.release.contract import costs_of, gain
from eval.release.contract_file import Contract, Signature, Target, read_contract
from eval.release.load_release import SIGNATURE, ReleaseError, check_signature
from eval.signoff.figures import first_difference
from eval.signoff.keys import Trusted, from_text, pems
from eval.signoff.statement import Predicate, read_statement, signoff_path
from eval.signoff.verify import budget_note, row_of
from eval.watch.measure import released_by_cluster

UNVERIFIED = (
    "not verified against a key: who can write the folder can write its hashes; give --public KEY.pub"
)


def checked(release: Path, trusted: Trusted | None, target: str | None) -> tuple[Contract, str]:
    """The contract of a release whose bytes are those that were released and signed, and the target.

    Raises:
        UserError: a file is missing, new or changed, or is not what the sign-off speaks of.
    """
    require_release(release)
    fix = "get the release again"
    recorded = read_manifest(release).files
    current = hash_files(release)
    for name in sorted({*recorded, *current} - {SIGNATURE}):
        if current.get(name) != recorded.get(name):
            where = "not part of it" if name not in recorded else f"changed, or its line in {MANIFEST} is"
            how = where if name in current else "missing"
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


def require_release(folder: Path) -> None:
    """Raises UserError where a folder is no release, such as the run that it was made of."""
    if not (folder / MANIFEST).is_file():
        released = sorted(path.parent for path in folder.glob(f"release/*/{MANIFEST}"))
        where = f", such as {released[0]}" if released else ""
        problem = f"no {MANIFEST}: this is no release"
        raise UserError(f"release {folder}", problem, f"name a folder that absorb release made{where}")


def check_folder(release: Path, files: dict[str, FileEntry], trusted: Trusted) -> None:
    """The folder as a whole was signed by a key that is trusted.

    Raises:
        UserError: it was not, or something was changed since.
    """
    listed = {name: entry.model_dump() for name, entry in files.items()}
    try:
        check_signature(release, listed, pems(trusted))
    except ReleaseError as error:
        fix = "get the release again, or the key of who signed it"
        raise UserError(f"release {release}", str(error), fix) from error


def restated(release: Path, contract: Contract, target: str, predicate: Predicate) -> dict[str, Any]:
    """The contract with what it says of a target built again from the signed evidence."""
    gate, study = read_gate(release / "evidence"), load_study(release / "evidence" / "study.yaml")
    signed_target, row = contract.targets[target], row_of(gate, predicate.recipe, predicate.target)
    current = signed_target.model_copy(
        update={
            **predicate.model_dump(include={"recipe", "verdict", "reason"}),
            "waiver": predicate.waiver,
            "budget_note": budget_note(gate),
            "signature": Signature(
                by=predicate.by,
                time=predicate.time,
                key=from_text(predicate.public_key).keyid,
                file=signoff_path(Path(), predicate.recipe, predicate.target).as_posix(),
            ),
            "gain": {
                name: gain(gate, row, name, released_by_cluster(release, signed_target, name))
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
            "level": gate.level,
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
