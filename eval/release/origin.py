"""From the paper to the artifacts of a release: what its card and `eval.why` tell."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from eval.core.gate_file import GateFile
from eval.release.contract_file import Contract
from eval.report.format import estimate_cell


class Entry(NamedTuple):
    """One thing that happened, or that something was made from."""

    what: str
    text: str
    hash: str = ""
    file: str = ""  # where it stands, if that is not the release
    figures: dict[str, Any] | None = None  # what was measured, as its file has it


def made_from(contract: Contract, lineage: dict[str, Any], gate: GateFile) -> Iterator[Entry]:
    """The paper, the method with its files, its teachers, and every artifact behind what is shipped.

    Args:
        lineage: what `lineage.json` of the release holds.
    """
    artifacts, seed = lineage["artifacts"], f"s{contract.seed}"
    card = artifacts[f"students/S1/{seed}"]["facts"].get("method") or {}
    if card:
        yield Entry("paper", card["paper"])
        yield Entry("claim", card["claim"])
    settings = json.dumps(lineage["method"].get("settings", {}), ensure_ascii=False)
    yield Entry("method", f"{lineage['method']['name']} {settings}")
    for name, digest in lineage.get("files", {}).items():
        yield Entry("its file", name, digest)
    for name, digest in lineage.get("code", {}).items():
        yield Entry("its code", name, digest)
    gain = estimate_cell(gate.teacher_gain)
    yield Entry(
        "teacher", f"T1 with the method; it gains {gain} {gate.teacher_gain.unit}", lineage["teachers"]["T1"]
    )
    yield Entry("its control", "T0 without the method", lineage["teachers"]["T0"])
    for name, artifact in artifacts.items():
        yield Entry(artifact["kind"], name, artifact["hash"])
