"""The contract of a release, built from the gate, the records and the manifests of a run."""

import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Literal

from eval.core.artifacts import MANIFEST, read_manifest
from eval.core.budget import Budget
from eval.core.checks import CONTROL, FALLBACK, STUDENT, Artifacts
from eval.core.documents import TRAIN, stream_documents
from eval.core.errors import UserError
from eval.core.gate_file import GateFile, Part, Variant
from eval.core.records import PLAIN, VALIDATION, Process, machine, read_costs, read_loads
from eval.core.study import Study
from eval.cost.estimates import PERCENTILES, estimate_quantity, list_quantities
from eval.engines import subject_of
from eval.gate.evidence import C, Contrast, Evidence, by_target
from eval.gate.limits import cost_parts, variant_costs
from eval.release.contract_file import (
    Bits,
    Contract,
    Cost,
    Gain,
    Inputs,
    LoaderCost,
    Saving,
    SeedChance,
    Signature,
    Target,
    chance_of_one_seed,
    floor_verdict,
    over_documents,
)
from eval.signoff.statement import Predicate
from eval.signoff.verify import budget_note
from eval.stats.crossed import FAIL, PASS

THROUGH_LOADER = (*PERCENTILES, "load_time", "peak_memory")  # quantities that its user sees


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


def fallback_parts(e: Evidence, budget: Budget, target: str) -> list[Part]:
    """The base of the released seed, held against the limits of a target as a variant would be.

    Raises:
        UserError: its cost was not measured there, or its records do not fit the run.
    """
    seed, key, limits = e.study.seeds[0], (target, FALLBACK), budget.targets[target]
    artifacts = Artifacts(e.folder, e.study)
    engines = {PLAIN: subject_of(read_manifest(e.folder / "base" / f"s{seed}")).engine}

    def checked(records: Iterable[C]) -> dict[tuple[str, str], list[C]]:
        ours = (FALLBACK, PLAIN, seed, target)
        of_fallback = [r for r in records if (r.arm, r.recipe, r.seed, r.target) == ours]
        for record in of_fallback:
            artifacts.check(record)
        grouped = by_target(e.folder, e.study, budget, of_fallback, engines)
        return {key: grouped[target, PLAIN]} if of_fallback else {}

    measured = checked(read_costs(e.folder))
    if not measured:
        fix = f"run absorb cost --study {e.folder} --target {target}"
        raise UserError(f"fallback of {target}", "its cost was not measured", fix)
    seen = replace(e, costs=e.costs | measured, loads=e.loads | checked(read_loads(e.folder)))
    costs = variant_costs(seen, target, FALLBACK, limits, budget.alpha)
    assert costs is not None
    return cost_parts(seen, target, FALLBACK, limits, costs, budget.alpha)


def loader_cost(
    e: Evidence, budget: Budget, target: str, recipe: str, processes: list[Process]
) -> LoaderCost:
    """What was measured through the loader, held against the absolute limits of a target as the gate does.

    A relative limit is none of it: the model that it is relative to is not in a release.
    """
    (record, *_), limits = e.costs[target, recipe], budget.targets[target]
    records = [record.model_copy(update={"processes": processes})]
    costs = {
        name: estimate_quantity(records, name, budget.alpha)
        for name in list_quantities(records)
        if name in THROUGH_LOADER
    }
    absolute = {n: limit for n, limit in limits.limits.items() if limit.of is None and n in THROUGH_LOADER}
    seen = replace(e, costs={(target, recipe): records})
    held = limits.model_copy(update={"limits": absolute})
    return LoaderCost(
        prefill=costs["prefill_p50"],
        decode=costs.get("decode_p50"),
        load=costs["load_time"],
        peak_memory=costs["peak_memory"],
        limits=costs_of(cost_parts(seen, target, recipe, held, costs, budget.alpha)),
        processes=len(processes),
        requests=len(processes[0].prefill_ms),
        prompt_tokens=record.prompt_tokens,
        machine=f"{machine().cpu}, Python {platform.python_version()}",
    )


def gain(gate: GateFile, row: Variant, name: str, bits: Bits) -> Gain:
    """What must hold on one slice, with what the released seed alone keeps, from its `bits` by cluster."""
    inside = name == VALIDATION
    share = gate.budget["f"] if inside else gate.budget["slices"][name]
    teacher = gate.teacher_gain if inside else gate.teacher_gain_slices[name]
    alpha, look = gate.budget["alpha"], gate.test_set
    if look is not None and not (look.current and look.recipe == row.recipe):
        look = None

    def saving(of: Literal["control", "fallback"], floor: float | None) -> Saving:
        saved = bits.over(of)
        held = floor_verdict(saved, floor, alpha)
        return Saving(floor=floor, measured=over_documents(saved, alpha), verdict=held)

    return Gain(
        asked_share=share,
        on_test=(look.kept_share if inside else look.slices.get(name)) if look else None,
        kept_share=row.kept_share if inside else row.slices[name].kept_share,
        level=over_documents(bits.level("release"), alpha),
        teacher_gain=teacher,
        over_control=saving("control", share * teacher.point),
        over_fallback=saving("fallback", lead(gate, name)),
    )


def lead(gate: GateFile, name: str) -> float | None:
    """Bits per byte by which the budget asks to beat the fallback: on the validation documents alone."""
    if name != VALIDATION:
        return None
    if gate.budget["g"] is None:
        return gate.budget["delta_min"]
    return gate.budget["g"] * (gate.scores[FALLBACK][name].point - gate.scores[STUDENT][name].point)


def released_bits(e: Evidence, recipe: str, name: str) -> Bits:
    """By cluster, of the first seed, which is the one that is released."""
    models = (STUDENT, recipe), (CONTROL, recipe), (FALLBACK, PLAIN)
    ours, control, base = (e.clusters[name].sums(e.bits[model])[0] for model in models)
    return Bits(ours, control, base, e.clusters[name].sums(e.bytes))


def seed_chance(e: Evidence, recipe: str, name: str, gain: Gain) -> SeedChance:
    """How likely a single student of the study keeps the floors of a slice."""
    control, base = Contrast(STUDENT, CONTROL, recipe, recipe), Contrast(STUDENT, FALLBACK, recipe)
    return SeedChance(
        over_control=chance_of_one_seed(e.gain(name, control).mean(-1), gain.over_control.floor),
        over_fallback=chance_of_one_seed(e.gain(name, base).mean(-1), gain.over_fallback.floor),
    )


def shipped(
    e: Evidence, gate: GateFile, budget: Budget, row: Variant, predicate: Predicate, signature: Signature
) -> Target:
    """What one target gets."""
    limits = budget.targets[row.target]
    gains = {n: gain(gate, row, n, released_bits(e, row.recipe, n)) for n in [VALIDATION, *budget.slices]}
    return Target(
        recipe=row.recipe,
        engine=row.engine,
        device=limits.device,
        artifact=e.artifacts[f"{STUDENT}/s{e.study.seeds[0]}/{row.recipe}"],
        verdict=predicate.verdict,
        reason=predicate.reason,
        waiver=predicate.waiver,
        budget_note=budget_note(gate),
        signature=signature,
        gain=gains,
        cost=costs_of(row.parts),
        fallback_cost=costs_of(fallback_parts(e, budget, row.target)),
        one_seed={name: seed_chance(e, row.recipe, name, one) for name, one in gains.items()},
        loader_cost=None,
    )


def refuse_broken_floors(targets: dict[str, Target]) -> None:
    """What passed as a recipe of all seeds must hold for the artifact that is shipped, by itself.

    Raises:
        UserError: on a slice it is below its own floor beyond doubt, and nobody waived its verdict: a waiver
            of another budget says nothing of that.
    """
    for name, target in ((n, t) for n, t in targets.items() if t.verdict == PASS):
        for of, slice_name, saving in floors(target):
            if saving.verdict == FAIL:
                saved = saving.measured
                span = f"{saved.point:.4f} [{saved.low:.4f}, {saved.high:.4f}]"
                raise UserError(
                    f"release of {target.recipe} on {name}",
                    f"its own artifact saves {span} bits/byte over the {of} on {slice_name}, "
                    f"the floor is {saving.floor:.4f}",
                    "nothing was released; ship another variant, or a study whose first seed keeps them",
                )


def floors(target: Target) -> Iterator[tuple[str, str, Saving]]:
    """What it is held against, the slice and what is saved there, of each floor."""
    for name, gain in target.gain.items():
        yield from (("control", name, gain.over_control), ("fallback", name, gain.over_fallback))


def refuse_lost_limits(name: str, target: Target) -> None:
    """What is within its limits by its engine must be so through the loader, which is how it is used.

    Raises:
        UserError: it is beyond an absolute limit of the budget beyond doubt, and nobody waived its verdict.
    """
    assert target.loader_cost is not None
    lost = [cost for cost in target.loader_cost.limits if cost.verdict == FAIL]
    if lost and target.verdict == PASS:
        raise UserError(
            f"release of {target.recipe} on {name}",
            f"through the loader, {lost[0].reason}",
            "nothing was released; ship another variant, or build it on the machine of the target",
        )


def loader_facts(target: Target) -> dict[str, str | None]:
    """What the loader says of a target."""
    waiver = target.waiver
    return {
        "device": target.device,
        "verdict": target.verdict,
        "budget_note": target.budget_note,
        "waiver": waiver.reason if waiver else None,
        "expires": waiver.expires.isoformat() if waiver else None,
    }


def inputs(run: Path, study: Study, vocabulary: int, boundary: int) -> Inputs:
    domains = Counter(document.domain for document in stream_documents(run / "data", TRAIN))
    return Inputs(
        context_tokens=study.data.context,
        scored_bytes=study.data.scored_bytes,
        vocabulary=vocabulary,
        boundary_token=boundary,
        domains=dict(domains.most_common()),
        sources=[f"{source.kind} {source.path}".strip() for source in study.data.documents],
    )


def build_contract(
    e: Evidence,
    gate: GateFile,
    *,
    targets: dict[str, Target],
    owner: str,
    released: date,
    recheck_days: int | None,
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
        released=released,
        expires=min(ends, default=None),
        recheck_days=recheck_days,
        seed=e.study.seeds[0],
        alpha=alpha,
        level=gate.level,
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
    method_manifest = run / "method" / "T1" / f"s{seed}" / MANIFEST
    made = read_manifest(method_manifest.parent) if method_manifest.is_file() else None
    code = made.code if made else {}
    files = made.facts.get("files", {}) if made else {}  # of versions that wrote none
    teachers = {arm: e.artifacts[f"{arm}/s{seed}/{PLAIN}"] for arm in ("T1", "T0")}
    method = e.study.method.model_dump(mode="json")
    behind: dict[str, object] = {"study": e.study.name, "method": method, "files": files, "code": code}
    return behind | {"teachers": teachers, "artifacts": nodes}
