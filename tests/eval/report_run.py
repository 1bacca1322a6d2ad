"""A run folder with a gate.json of every kind of field, and records beneath it; no model in it.

Not `run_builder.Run`, because no single run that the gate judges has every verdict, missing value and hostile name
that a page must show: here gate.json is written by hand.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import yaml

from eval.core.artifacts import content_hash
from eval.core.records import Documents, Machine, Provenance, Score, write_record
from eval.core.study import RUN_FORMAT, load_study

HOSTILE = "<script>alert('x')</script> & $x^2$ | `a` ](b) <!-- sign-offs -->"
SLICES = {"validation": 64, "near": 32, "far": 32}

# recipe, engine, bits per byte, kept share, guard share, decode ms, disk MiB, verdict
VARIANTS = [
    ("plain", "torch", 2.593, 0.66, 1.0, 2.31, 2.1, "PASS"),
    ("int8", "openvino", 2.5932, 0.657, 0.998, 0.71, 0.83, "PASS"),
    ("int4", "openvino", 2.598, 0.631, 0.962, 0.64, 0.61, "PASS"),
    ("wanda50", "torch", 2.63, 0.52, 0.7, 2.35, 2.1, "INCONCLUSIVE"),
    ("depth25", "torch", 2.629, 0.475, 0.71, 1.78, 1.7, "INCONCLUSIVE"),
    ("depth25-int8", "openvino", 2.6294, 0.47, 0.705, 0.58, 0.66, "INCONCLUSIVE"),
    ("nf4", "bitsandbytes", 2.61, 0.6, 0.9, 6.8, 1.2, "FAIL"),
    ("int8-bnb", "bitsandbytes", 2.594, 0.655, 0.99, 5.2, 1.4, "FAIL"),
]
BUDGET = yaml.safe_load("""
{name: default, alpha: 0.05, f: 0.5, g: 0.5, slices: {near: 0.5, far: 0.5}, hash: abc, targets: {
  cpu: {device: cpu, required: true, limits: {decode_p50: {at_most: 1.0, of: plain}}},
  gpu: {device: cuda, required: false, limits: {}},
  phone: {device: cpu, required: false, limits: {}}}}
""")
POWER = yaml.safe_load(
    "{clusters: 64, seeds: 3, effect: 0.02, power_now: 0.86, seeds_for_80: 3, clusters_for_80: 51}"
)
PROVENANCE = yaml.safe_load("""
{tool: absorb 9.8.7,
 times: {scores: ["2026-01-01T00:00:00+00:00", "2026-01-01T09:00:00+00:00"],
         cpu: ["2026-01-01T11:00:00+00:00", "2026-01-02T09:00:00+00:00"]},
 data: def, versions: {python: 3.11.2, torch: 2.13.0},
 machines: [{host: laptop, cpu: Some CPU @ 2.0 GHz, isa: AVX512, cores: 2, device: cpu}]}
""")
STUDY = yaml.safe_load("""
{name: demo, seeds: [0, 1, 2], budget: default, data: {documents: [{kind: folder, path: stdlib}]},
 base: {path: somewhere}, method: {name: ensemble}, train: {}}
""")
SCORES = {"B": 2.715, "T0": 2.71, "T1": 2.584, "CE": 2.69, "S0": 2.679, "S1": 2.593}


def span(point: float, half: float) -> dict:
    by_seed = [round(point + part * half, 6) for part in (-0.5, 0.1, 0.4)]
    return {"point": point, "low": round(point - half, 6), "high": round(point + half, 6), "by_seed": by_seed}


def share_span(point: float, half: float = 0.11) -> dict:
    return {**span(point, half), "bootstrap_low": point - 0.1, "bootstrap_high": point + 0.13}


def cost(decode: float, disk: float, recipe: str) -> dict:
    def latency(value: float, spread: float, plain: float) -> dict:
        ratio = {"point": value / plain, "lower": value / plain * 0.97, "upper": value / plain * 1.04}
        relative = None if recipe == "plain" else {**ratio, "of": "plain"}
        return {**timed, "value": value, "lower": value * 0.98, "upper": value * spread, "relative": relative}

    timed = {"unit": "ms", "requests": 60, "processes": 3}
    none = {**timed, "value": None, "lower": None, "upper": None, "needs": 459}
    size = {"unit": "MiB", "requests": 3, "processes": 3}
    return {
        "prefill_p50": latency(decode * 6.1, 1.04, 14.1),
        "prefill_p95": latency(decode * 6.9, 1.12, 15.9),
        "prefill_p99": none,
        "decode_p50": latency(decode, 1.03, 2.31),
        "decode_p95": latency(decode * 1.31, 1.1, 3.02),
        "decode_p99": none,
        "peak_memory": {"value": 187.25, "lower": 186.0, "upper": 188.5, **size},
        "disk": {"value": disk, "lower": disk, "upper": disk, **size},
    }


def load(knee: float) -> dict:
    """What a server that takes `knee` requests a second shows at three rates."""

    def number(value: float, unit: str = "ms") -> dict:
        return {
            "value": value,
            "lower": value * 0.9,
            "upper": value * 1.1,
            "unit": unit,
            "requests": 3,
            "processes": 3,
        }

    def rate(share: float) -> dict:
        wait = 32 / knee / max(0.1, 1.2 - share) * 40
        done = {
            "offered_rps": number(share * knee, "requests/s"),
            "throughput_rps": number(share * knee, "requests/s"),
        }
        done["throughput_tokens_per_s"] = number(share * knee * 32, "tokens/s")
        times = {
            "ttft_p95": number(wait),
            "p50": number(wait * 2),
            "p95": number(wait * 4),
            "p99": number(wait * 5),
        }
        return {"rate": round(share * knee, 2), **done, **times, "follows": 3}

    capacity = {"knee_rps": number(knee, "requests/s"), "knee_tokens_per_s": number(32 * knee, "tokens/s")}
    return {
        **capacity,
        "slo_ms": 200.0,
        "seconds": 10.0,
        "rates": [rate(share) for share in (0.5, 0.8, 0.95)],
    }


def quality(bits: float) -> dict:
    return {
        "accuracy": {name: {**span(1.1 / bits, 0.01), "unit": "share"} for name in SLICES},
        "calibration_error": {name: {**span(0.03, 0.01), "unit": "share"} for name in SLICES},
        "worst_slice": "far",
        "flips": {"value": 0.0213, "low": 0.0184, "high": 0.0242, "floor": 0.0017, "unit": "share of tokens"},
        "kl": {"value": 0.00412, "low": 0.0037, "high": 0.0046, "floor": 0.00021, "unit": "bits/token"},
        "tasks": {"sums": {arm: {**span(0.41, 0.07), "unit": "mark"} for arm in ("S1", "S0")}},
    }


def half_measured() -> dict:
    """A variant that nobody held against its student, and whose control saw no task."""
    how = {"flips and KL": "absorb agreement --study runs/x"}
    how["tasks"] = "absorb score --study runs/x"
    tasks = {"sums": {"S1": {**span(0.37, 0.07), "unit": "mark"}, "S0": None}}
    return {**quality(2.61), "flips": None, "kl": None, "tasks": tasks, "how": how}


TEST = yaml.safe_load("""
{openings: 1, time: "2026-01-03T10:00:00+00:00", by: Ada, recipe: int8, target: cpu, current: true, documents: 64,
 verdict: PASS, parts: [], teacher_gain: null, guard_share: null, kept_share: {point: 0.61, low: 0.52, high: 0.7},
 history: [{number: 1, time: "2026-01-03T10:00:00+00:00", by: Ada, reason: null, recipe: int8, verdict: PASS}]}
""")


def parts(share: float, guard: float, verdict: str) -> list[dict]:
    def part(name: str, value: float, limit: float, unit: str, reason: str) -> dict:
        held = {"estimate": value, "low": value * 0.8, "high": value * 1.3, "limit": limit, "unit": unit}
        word = "PASS" if value > 0.01 else verdict
        remedy = None if word == "PASS" else "about 5 seeds or 90 clusters if what was seen is true"
        return {"name": name, "verdict": word, **held, "reason": reason, "remedy": remedy}

    slow = "FAIL" if verdict == "FAIL" else "PASS"
    return [
        part("assay", 0.126, 0.0, "bits/byte", "the method improves the teacher on validation"),
        part("retention", (share - 0.5) * 0.126, 0.0, "bits/byte", "at least 0.5 of the gain is kept"),
        part("guard", (guard - 0.5) * 0.122, 0.0, "bits/byte", "at least 0.5 of the student's gain is kept"),
        part("fallback", 0.122, 0.0, "bits/byte", "it beats the base"),
        part("assay:near", 0.131, 0.0, "bits/byte", "the method improves the teacher on near"),
        part("retention:near", 0.0123456, 0.0, "bits/byte", "at least 0.5 of the gain is kept on near"),
        part("assay:far", 0.098, 0.0, "bits/byte", "the method improves the teacher on far"),
        part("retention:far", 0.0098765, 0.0, "bits/byte", "at least 0.5 of the gain is kept on far"),
        {**part("cost:decode_p50", 0.31, 1.0, "x plain", "held against the upper bound"), "verdict": slow},
    ]


def variant(row: tuple, target: str = "cpu", measured: bool = True) -> dict:
    recipe, engine, bits, share, guard, decode, disk, verdict = row
    loaded = load(1000 / (32 * decode)) if measured and recipe in ("plain", "int8") else None
    under = {"knee": loaded["knee_rps"], "throughput": loaded["knee_tokens_per_s"]} if loaded else {}
    reason = {
        "PASS": "keeps the gain and stays within every limit",
        "FAIL": "decode is slower than the uncompressed student",
        "INCONCLUSIVE": "it cannot be told whether at least 0.5 of the teacher's gain is kept on validation",
    }[verdict]
    here = "PASS" if verdict == "FAIL" else verdict
    return {
        **{"recipe": recipe, "target": target, "engine": engine, "p": 0.01, "measured": measured},
        "verdict": verdict if measured else "INCONCLUSIVE",
        "reason": reason if measured else f"its cost was not measured on {target}",
        "parts": parts(share, guard, verdict),
        "holm_p": 0.03 if measured else None,
        "kept_share": share_span(share, 0.12),
        "kept_of_student": share_span(share / 0.66, 0.05),
        "chain": [
            {"step": "distil", "over": "teacher", "share": share_span(0.66)},
            *(
                [{"step": recipe, "over": "plain", "share": share_span(share / 0.66)}]
                if recipe != "plain"
                else []
            ),
        ],
        "load": loaded,
        "guard_share": share_span(guard, 0.06),
        "slices": {
            name: {"kept_share": share_span(share - 0.02), "verdict": here} for name in ("near", "far")
        },
        "scores": {name: span(bits + 0.2 * i, 0.03) for i, name in enumerate(SLICES)},
        **({} if recipe == "plain" else {"zeros": 0.0123, "low_bit": 0.9876 if "int" in recipe else 0.0}),
        **({} if recipe == "plain" else {"reached": 0.934 if recipe == "int8" else 1.0}),
        "cost": cost(decode, disk, recipe) | under if measured else None,
        "how": None if measured else f"absorb cost --study runs/x --target {target}",
        "hashes": {"artifact": {"0": "a" * 64}, "control": {"0": "f" * 64}, "records": {}},
        "recommended": recipe == "int8" and measured,
    }


def unmeasured(target: str) -> list[dict]:
    """Rows of a target on which nothing was measured, and of which all is told by those of another."""
    return [variant(row, target, measured=False) for row in VARIANTS[:5]]


def reference(arm: str, decode: float) -> dict:
    """The teacher or the fallback, which the pick is held against."""
    saved = {"point": 0.71 / decode, "lower": 0.7 / decode, "upper": 0.73 / decode, "of": arm}
    pick = {"decode_p50": saved, "disk": {"point": 0.13, "lower": 0.13, "upper": 0.13, "of": arm}}
    return {"arm": arm, "target": "cpu", "cost": cost(decode, 6.3, arm), "pick": pick, "how": None}


def comparisons() -> list[dict]:
    """Each variant over `plain`."""
    plain, *others = VARIANTS
    return [
        {
            "recipe": row[0],
            "over": "plain",
            "lead": span(round(plain[2] - row[2], 6), 0.0123),
            "decode": {"cpu": {"point": row[5] / 2.31, "lower": 0.2, "upper": 1.4, "of": "plain"}},
        }
        for row in others
    ]


RUN = yaml.safe_load("""
{number: 1, time: "2026-01-02T10:00:00+00:00", plan: "", budget: default, budget_hash: "0", evidence: "0",
 openings: 0, opening: null, verdict: PASS, previous: null}
""")


def gate_of(run: Path, title: str, variants: list[dict]) -> dict:
    paths = sorted((run / "records").rglob("*.json"))
    records = {p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    return {
        **{
            "schema_version": 3,
            "study": run.name,
            "title": title,
            "folder": run.as_posix(),
            "method": "ensemble",
            "verdict": "PASS",
        },
        **{
            "seeds": [0, 1, 2],
            "documents": SLICES,
            "clusters": SLICES,
            "budget": BUDGET,
            "power": POWER,
            "variants": variants,
            "references": [reference("T1", 6.9), reference("B", 2.4)],
            "comparisons": comparisons(),
            "runs": [RUN],
        },
        "reason": "int8 keeps the method's gain on cpu, beats the fallback and stays within every limit.",
        "recommended": {"cpu": "int8", "gpu": None, "phone": None},
        "as_good": {"cpu": ["int4"], "gpu": [], "phone": []},
        "level": 0.9,
        "rivals": [],
        "below_base": {"CE": {"far": span(0.0216, 0.0085)}},
        "fixed": None,
        "extent": {"seeds": 3, "documents": SLICES, "variants": 9, "records": len(records)},
        "notes": ["all 3 seeds share one teacher T1 (0123456789ab)"],
        "test_set": TEST,
        "quality": {row[0]: quality(row[2]) for row in VARIANTS} | {"nf4": half_measured()},
        "teacher_gain": span(0.126, 0.021),
        "teacher_gain_slices": {"near": span(0.131, 0.03), "far": span(0.098, 0.035)},
        "scores": {
            arm: {name: span(bits + 0.2 * i, 0.03) for i, name in enumerate(SLICES)}
            for arm, bits in SCORES.items()
        },
        "kept_by_student": {
            "over_control": share_span(0.66),
            "over_ce": share_span(0.75),
            "over_base": share_span(0.93),
        },
        "provenance": {
            **PROVENANCE,
            "artifacts": artifacts(),
            "config": load_study(run).hash(),
            "records": records,
        },
    }


def write_manifest(folder: Path, arm: str, seed: int, start: float) -> None:
    curve = [
        [step, start * (0.4 + 0.6 / (1 + step / 40)) + 0.03 * ((step * 7 + seed) % 5)]
        for step in range(0, 300, 3)
    ]
    card = {
        "title": "Deep ensemble",
        "paper": "A. Uthor 2017, arXiv:1612.01474",
        "claim": "a mean is better",
        "limits": "K times",
    }
    facts = {
        "method": card,
        "arm": arm,
        "seed": seed,
        "recipe": "plain",
        "engine": "torch",
        "loss_curve": curve,
    }
    names = {"kind": "model", "name": folder.name, "key": "k", "hash": content_hash({})}
    manifest = {**names, "files": {}, "parents": {}, "versions": {}, "facts": facts}
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_score(run: Path, arm: str, seed: int, recipe: str) -> None:
    """The documents of one model; the worst one of all has a hostile name."""
    rng = np.random.default_rng([seed, *map(ord, arm)])
    ids = [HOSTILE, *(f"d{i}" for i in range(1, sum(SLICES.values())))]
    size = np.random.default_rng(7).integers(300, 3000, len(ids))
    hard = np.random.default_rng(8).normal(2.7, 0.3, len(ids))
    gain = {"T1": 0.126, "S1": 0.083}.get(arm, 0.0) * np.random.default_rng(9).gamma(4, 0.25, len(ids))
    gain[0] = -0.2 if arm == "S1" else 0.0
    bits = (hard - gain + rng.normal(0, 0.01, len(ids))) * size
    documents = Documents(
        id=ids,
        slice=[name for name, n in SLICES.items() for _ in range(n)],
        bytes=size.tolist(),
        tokens=(size // 3).tolist(),
        bits=bits.tolist(),
    )
    host = Machine(host="box", system="Linux", cpu="some CPU", isa="AVX512", cores=2, device="cpu")
    provenance = Provenance(
        artifact="a" * 64,
        config=load_study(run).hash(),
        machine=host,
        versions={},
        time="2026-01-01T00:00:00+00:00",
    )
    score = Score(
        arm=arm,
        seed=seed,
        recipe=recipe,
        engine="torch",
        data="def",
        documents=documents,
        provenance=provenance,
    )
    write_record(run, score)


def artifacts() -> dict[str, str]:
    arms = [*SCORES, "S1/int8", "S0/int8"]
    places = [
        f"{arm.partition('/')[0]}/s{seed}/{arm.partition('/')[2] or 'plain'}"
        for arm in arms
        for seed in range(3)
    ]
    return {place: hashlib.sha256(place.encode()).hexdigest() for place in places}


def run_folder(
    place: Path, title: str = "A three-member ensemble, distilled", variants: list[dict] | None = None
) -> Path:
    """A run folder as the earlier stages leave it: study, records, manifests and gate.json."""
    run = place / "demo"
    study = {"run_format": RUN_FORMAT, **STUDY, "title": title, "runs": str(place)}
    run.mkdir(parents=True)
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    for seed in range(3):
        for arm, recipe in [*((arm, "plain") for arm in SCORES), ("S1", "int8"), ("S0", "int8")]:
            write_score(run, arm, seed, recipe)
    for seed in range(3):
        write_manifest(run / "base" / f"s{seed}", "B", seed, 6.0)
        for arm, start in (("S1", 3.0), ("S0", 2.8), ("CE", 3.4)):
            write_manifest(run / "students" / arm / f"s{seed}", arm, seed, start)
    default = [*map(variant, VARIANTS), *unmeasured("gpu")]
    (run / "gate.json").write_text(json.dumps(gate_of(run, title, default if variants is None else variants)))
    return run
