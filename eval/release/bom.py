"""The bill of materials of a release, in a form that other programs read: CycloneDX 1.6, JSON.

The models that it holds, what they were made from, back to the method and its paper, and what was measured of
them: every figure with its slice and its bounds (`modelCard.quantitativeAnalysis`). Hashes of models are
those of manifests, which hold every file.
"""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, time
from importlib import metadata
from typing import Any, Final

from eval.core.artifacts import digest
from eval.core.gate_file import Estimate, KeptShare
from eval.core.records import PLAIN
from eval.release.card import METRICS, own_share
from eval.release.contract_file import Contract, Cost, Target

BOM: Final = "bom.cdx.json"  # the name by which tools know the format
SPEC: Final = "1.6"
MODEL: Final = "machine-learning-model"
BOUNDS = (
    "of quality over documents, two-sided, {:g} %, that of own_share given the measured teacher's gain; "
    "of costs one-sided, each at {:g}"
)
Component = dict[str, Any]


def bill_of_materials(contract: Contract, lineage: dict[str, Any]) -> dict[str, Any]:
    """The BOM of a release: its contract, and `lineage.json` for what its models were made from."""
    variants = {f"variant:{name}": target for name, target in contract.targets.items()}
    models = [_variant(ref, contract, target) for ref, target in variants.items()]
    models.append(_model("fallback", "fallback", contract.fallback, "served where the release must not be"))
    sources, links = _made_from(contract, lineage)
    root = _model("release", contract.name, digest(contract.model_dump(mode="json")), contract.method)
    root |= {"version": contract.released.isoformat(), "publisher": contract.owner}
    if recheck := contract.recheck_by(contract.released):
        promise = {"recheck-days": str(contract.recheck_days), "recheck-by": recheck.isoformat()}
        root["properties"] = _properties(promise)
    ends = {ref: f"students/S1/s{contract.seed}" for ref in variants}
    for ref, target in variants.items():
        place = f"variants/{target.recipe}/S1/s{contract.seed}"
        ends[ref] = place if target.recipe != PLAIN and place in links else ends[ref]
    depends = {
        "release": [*variants, "fallback"],
        **{ref: [end] for ref, end in ends.items() if end in links},
    }
    base = f"base/s{contract.seed}"
    depends["fallback"] = [base] if base in links else []
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, root["hashes"][0]["content"]).urn,
        "version": 1,
        "metadata": {
            "timestamp": datetime.combine(contract.released, time(), UTC).isoformat(),
            "tools": {
                "components": [
                    {"type": "application", "name": "absorb", "version": metadata.version("absorb")}
                ]
            },
            "component": root,
        },
        "components": [*models, *sources],
        "dependencies": [{"ref": ref, "dependsOn": on} for ref, on in (depends | links).items()],
    }


def _model(ref: str, name: str, sha256: str, text: str) -> Component:
    return {
        "type": MODEL,
        "bom-ref": ref,
        "name": name,
        "description": text,
        "hashes": [_sha256(sha256)],
    }


def _sha256(content: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": content}


def _properties(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": f"absorb:{name}", "value": value} for name, value in values.items()]


def _variant(ref: str, contract: Contract, target: Target) -> Component:
    about = f"a plain student of the method {contract.method}, after the recipe {target.recipe}"
    use = f"texts of up to {contract.inputs.context_tokens} tokens"
    return _model(ref, f"{contract.name}: {target.recipe}", target.artifact, about) | {
        "modelCard": {
            "modelParameters": {"task": "text-generation", "datasets": [{"ref": "data"}]},
            "quantitativeAnalysis": {"performanceMetrics": [*_metrics(target)]},
            "considerations": {"useCases": [use]},
            "properties": _properties(
                {
                    "verdict": target.verdict,
                    "engine": target.engine,
                    "signed-by": target.signature.by,
                    "bounds": BOUNDS.format(100 * contract.level, contract.alpha),
                    **({"budget": target.budget_note} if target.budget_note else {}),
                    **_waiver(target),
                }
            ),
        }
    }


def _waiver(target: Target) -> dict[str, str]:
    if target.waiver is None:
        return {}
    return {"waiver": target.waiver.reason, "waived-until": target.waiver.expires.isoformat()}


def _metrics(target: Target) -> Iterator[dict[str, Any]]:
    for name, gain in target.gain.items():
        share, *savings = METRICS
        yield _metric("bits_per_byte", gain.level.point, name, gain.level)
        if (own := own_share(gain)) is not None and own.point is not None:
            yield _metric(share, own.point, name, own)
        for metric, saving in zip(savings, (gain.over_control, gain.over_fallback), strict=True):
            yield _metric(metric, saving.measured.point, name, saving.measured)
    for cost in target.cost:
        if cost.measured is not None:
            yield _metric(f"{cost.quantity} by the engine ({cost.unit})", cost.measured, span=cost)
    if (seen := target.loader_cost) is not None:
        numbers = {"prefill_p50": seen.prefill, "decode_p50": seen.decode}
        numbers |= {"load_time": seen.load, "peak_memory": seen.peak_memory}
        for quantity, number in numbers.items():
            if number is not None and number.value is not None:
                span = Estimate(point=number.value, low=number.lower, high=number.upper)
                yield _metric(f"{quantity} through the loader ({number.unit})", span.point, span=span)


def _metric(
    kind: str, value: float, name: str | None = None, span: Estimate | KeptShare | Cost | None = None
) -> dict[str, Any]:
    metric: dict[str, Any] = {"type": kind, "value": repr(value)}
    if name is not None:
        metric["slice"] = name
    if span is not None and span.low is not None and span.high is not None:
        metric["confidenceInterval"] = {"lowerBound": repr(span.low), "upperBound": repr(span.high)}
    return metric


def _made_from(contract: Contract, lineage: dict[str, Any]) -> tuple[list[Component], dict[str, list[str]]]:
    """Every artifact, teacher and file of the method behind the release, and what each was made from."""
    artifacts = lineage["artifacts"]
    by_hash = {node["hash"]: name for name, node in artifacts.items()}
    by_hash |= {sha: arm for arm, sha in lineage["teachers"].items()}
    components: list[Component] = []
    links: dict[str, list[str]] = {}
    for name, node in artifacts.items():
        component = _model(
            name, name, node["hash"], f"{node['kind']} artifact of the study {lineage['study']}"
        )
        components.append(component | {"type": "data"} if node["kind"] == "data" else component)
        parents = [by_hash[sha] for sha in node["parents"].values() if sha in by_hash]
        links[name] = sorted(set(parents) - {name})
    for arm, sha in lineage["teachers"].items():
        components.append(_model(arm, f"teacher {arm}", sha, f"of the study {lineage['study']}"))
        links[arm] = ["data"] if "data" in artifacts else []
    method, files = _method(contract, lineage)
    refs = [file["bom-ref"] for file in files]
    return [*components, method, *files], links | {
        "method": refs,
        **{ref: [] for ref in refs},
        "T1": [*links["T1"], "method"],
    }


def _method(contract: Contract, lineage: dict[str, Any]) -> tuple[Component, list[Component]]:
    """The method with its paper, and its files: a teacher T1 is made from it."""
    student = lineage["artifacts"].get(f"students/S1/s{contract.seed}", {}).get("facts", {})
    card = student.get("method") or {}
    about = {name: card[name] for name in ("paper", "claim", "limits") if name in card}
    about["settings"] = json.dumps(lineage["method"].get("settings", {}), ensure_ascii=False)
    about |= {f"code:{name}": value for name, value in lineage["code"].items()}
    name = card.get("title", lineage["method"]["name"])
    component = {"type": "library", "bom-ref": "method", "name": name, "properties": _properties(about)}
    files = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name, "hashes": [_sha256(digest)]}
        for name, digest in lineage["files"].items()
    ]
    return component, files
