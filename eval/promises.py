"""What a release may promise: its contract, drawn from the gate, the records and the manifests of a run."""

from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

from eval.artifacts import read_manifest
from eval.budget import Budget
from eval.budget import Target as Limits
from eval.checks import CONTROL, FALLBACK, STUDENT
from eval.contract import Contract, Cost, Gain, Inputs, Promise, Signature, Target, over_documents
from eval.documents import TRAIN, read_documents
from eval.errors import UserError
from eval.evidence import Contrast, Evidence
from eval.limits import cost_parts, costs
from eval.quality import kept, over_fallback
from eval.records import HELDOUT, PLAIN, read_costs, read_loads
from eval.statement import Predicate
from eval.statistics import linearised
from eval.study import Study
from eval.verdict import Estimate, GateFile, Part, Variant


def costs_of(parts: list[Part]) -> list[Cost]:
    return [
        Cost(
            quantity=part.name.partition(":")[2],
            measured=part.estimate,
            low=part.low,
            high=part.high,
            limit=part.limit,
            unit=part.unit,
            verdict=part.verdict,
            reason=part.reason,
        )
        for part in parts
        if part.name.startswith("cost:")
    ]


def fallback_parts(e: Evidence, target: str, limits: Limits, alpha: float) -> list[Part]:
    """The base of the released seed, held against the limits of a target as a variant would be.

    Raises:
        UserError: its cost was not measured there.
    """
    seed = e.study.seeds[0]

    def ours(record) -> bool:
        return (record.arm, record.recipe, record.seed, record.target) == (FALLBACK, PLAIN, seed, target)

    measured = [record for record in read_costs(e.folder) if ours(record)]
    base = e.artifacts[f"{FALLBACK}/s{seed}/{PLAIN}"]
    if not measured or measured[0].provenance.artifact != base:
        mend = f"run python -m eval.cost --study {e.folder} --target {target}"
        raise UserError(f"fallback of {target}", "its cost was not measured", mend)
    key = (target, FALLBACK)
    loads = [record for record in read_loads(e.folder) if ours(record)]
    seen = replace(e, costs={**e.costs, key: measured}, loads={**e.loads, **({key: loads} if loads else {})})
    found = costs(seen, target, FALLBACK, limits, alpha)
    assert found is not None
    return cost_parts(seen, target, FALLBACK, limits, found)


def gain(e: Evidence, gate: GateFile, budget: Budget, row: Variant, name: str) -> Gain:
    """The promise on one slice, with what the released seed alone keeps of it there."""
    share = budget.f if name == HELDOUT else budget.slices[name]
    teacher = gate.teacher_gain if name == HELDOUT else gate.teacher_gain_slices[name]

    def measured(contrast: Contrast) -> Estimate:
        bits = e.raw(name, contrast)[:1]  # the first seed is the one that is released
        return over_documents(linearised(bits, e.bytes[e.columns[name]])[0])

    return Gain(
        asked_share=share,
        kept_share=row.kept_share if name == HELDOUT else row.slices[name].kept_share,
        teacher_gain=teacher,
        over_control=Promise(floor=share * teacher.point, measured=measured(kept(row.recipe))),
        over_fallback=Promise(floor=lead(e, budget, name), measured=measured(over_fallback(row.recipe))),
    )


def lead(e: Evidence, budget: Budget, name: str) -> float | None:
    """Bits per byte by which the budget asks to beat the fallback: on the held-out documents alone."""
    if name != HELDOUT:
        return None
    if budget.g is None:
        return budget.delta_min
    return budget.g * float(e.gain(name, over_fallback(PLAIN)).mean())


def shipped(
    e: Evidence, gate: GateFile, budget: Budget, row: Variant, said: Predicate, signature: Signature
) -> Target:
    """What one target gets."""
    limits = budget.targets[row.target]
    return Target(
        recipe=row.recipe,
        engine=row.engine,
        device=limits.device,
        artifact=e.artifacts[f"{STUDENT}/s{e.study.seeds[0]}/{row.recipe}"],
        verdict=said.verdict,
        reason=said.reason,
        waiver=said.waiver,
        signature=signature,
        gain={name: gain(e, gate, budget, row, name) for name in [HELDOUT, *budget.slices]},
        cost=costs_of(row.parts),
        fallback_cost=costs_of(fallback_parts(e, row.target, limits, budget.alpha)),
    )


def inputs(run: Path, study: Study, vocabulary: int, boundary: int) -> Inputs:
    domains = Counter(document.domain for document in read_documents(run / "data", TRAIN))
    return Inputs(
        context_tokens=study.data.context,
        scored_bytes=study.data.scored_bytes,
        vocabulary=vocabulary,
        boundary_token=boundary,
        domains=dict(domains.most_common()),
        sources=[f"{source.kind} {source.path}".strip() for source in study.data.documents],
    )


def contract(
    e: Evidence,
    gate: GateFile,
    *,
    targets: dict[str, Target],
    owner: str,
    made: date,
    inputs: Inputs,
    alpha: float,
) -> Contract:
    ends = [target.waiver.expires for target in targets.values() if target.waiver]
    recipes = dict.fromkeys(target.recipe for target in targets.values())
    return Contract(
        name="-".join([gate.study, *recipes]),
        study=gate.study,
        method=gate.method,
        owner=owner,
        made=made,
        expires=min(ends, default=None),
        seed=e.study.seeds[0],
        alpha=alpha,
        data=e.data,
        config=gate.provenance.config,
        fallback=e.artifacts[f"{FALLBACK}/s{e.study.seeds[0]}/{PLAIN}"],
        targets=targets,
        inputs=inputs,
    )


def lineage(run: Path, e: Evidence, recipes: list[str]) -> dict[str, object]:
    """What was made from what: every artifact behind the release with its hash, parents and versions."""
    seed = e.study.seeds[0]
    names = ["data", f"base/s{seed}"]
    names += [f"students/{arm}/s{seed}" for arm in (STUDENT, CONTROL)]
    names += [
        f"variants/{recipe}/{arm}/s{seed}"
        for recipe in recipes
        if recipe != PLAIN
        for arm in (STUDENT, CONTROL)
    ]
    nodes = {}
    for name in names:
        manifest = read_manifest(run / name)
        facts = {key: value for key, value in manifest.facts.items() if key != "loss_curve"}
        nodes[name] = {**manifest.model_dump(include={"kind", "hash", "parents", "versions"}), "facts": facts}
    teachers = {arm: e.artifacts[f"{arm}/s{seed}/{PLAIN}"] for arm in ("T1", "T0")}
    method = e.study.method.model_dump(mode="json")
    return {"study": e.study.name, "method": method, "teachers": teachers, "artifacts": nodes}
