"""What a release costs through its own loader: numbers with bounds, held against the absolute limits of the budget."""

import json
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from huggingface_hub import ModelCard

from eval.core.errors import UserError
from eval.core.records import Process
from eval.cost.estimates import percentile_number
from eval.release.__main__ import build_release, verify_signoffs
from eval.release.contract import loader_cost, refuse_lost_limits
from eval.release.contract_file import read_contract
from eval.signoff.keys import private_key, read_trusted
from eval.signoff.statement import Waiver
from tests.eval.test_release import DAY

LIMITS = {
    "decode_p50": {"at_most": 2.0, "unit": "ms"},
    "prefill_p50": {"at_most": 0.02, "unit": "s"},
    "load_time": {"at_most": 1000.0, "unit": "ms"},
    "disk": {"at_most": 1.0, "unit": "B"},  # counted, whoever loads it: no matter of the loader
    "peak_memory": {"at_most": 1.0, "of": "plain"},
}


@pytest.fixture(scope="module")
def case(released_run):
    """What is released, by a budget that limits times absolutely."""
    signed = verify_signoffs(
        released_run.path, ["small"], read_trusted([released_run.folder / "key.pub"]), DAY
    )
    values = signed.budget.model_dump(mode="json")
    values["targets"]["cpu"]["limits"] = LIMITS
    return replace(signed, budget=type(signed.budget).model_validate(values))


def measured(decode_ms: float) -> list[Process]:
    rng = np.random.default_rng(3)
    return [
        Process(
            prefill_ms=rng.normal(5, 0.05, 10).tolist(),
            decode_ms=rng.normal(decode_ms, 0.01 * decode_ms, 90).tolist(),
            load_s=0.9 + 0.2 * (turn % 2),
            peak_memory_bytes=300 * 1024**2,
        )
        for turn in range(3)
    ]


@pytest.mark.parametrize(("decode_ms", "verdict"), [(1.5, "PASS"), (2.0, "INCONCLUSIVE"), (2.5, "FAIL")])
def test_absolute_limits_are_held_by_the_rule_of_the_gate(case, release, decode_ms, verdict):
    processes = measured(decode_ms)
    cost = loader_cost(case.evidence, case.budget, "cpu", "small", processes)
    assert cost.prefill == percentile_number([np.array(p.prefill_ms) for p in processes], 0.5, 0.05)
    assert cost.decode == percentile_number([np.array(p.decode_ms) for p in processes], 0.5, 0.05, each=9)
    assert (cost.processes, cost.requests) == (3, 10)
    held = {limit.quantity: limit for limit in cost.limits}
    assert {name: limit.verdict for name, limit in held.items()} == {
        "decode_p50": verdict,
        "prefill_p50": "PASS",
        "load_time": "INCONCLUSIVE",
    }
    assert held["decode_p50"].low == cost.decode.lower
    assert held["prefill_p50"].high == pytest.approx(cost.prefill.upper / 1e3)
    shipped = read_contract(release).targets["cpu"]
    target = shipped.model_copy(update={"loader_cost": cost})
    waiver = Waiver(reason="a demonstration", expires=date(2126, 7, 1))
    refuse_lost_limits("cpu", target.model_copy(update={"waiver": waiver, "verdict": "FAIL"}))
    if verdict == "FAIL":
        with pytest.raises(UserError, match=r"small on cpu: through the loader, decode_p50 is at least 2\."):
            refuse_lost_limits("cpu", target)
    else:
        refuse_lost_limits("cpu", target)


def test_a_release_says_what_was_measured_through_the_loader_and_what_by_the_engine(released_run, release):
    shipped, study = read_contract(release).targets["cpu"], released_run.study
    cost = shipped.loader_cost
    assert (cost.processes, cost.requests) == (study.cost.processes, study.cost.requests)
    for one in (cost.prefill, cost.decode, cost.load, cost.peak_memory):
        assert 0 <= one.lower <= one.value <= one.upper
    assert [(limit.quantity, limit.limit, limit.unit) for limit in cost.limits] == [
        ("peak_memory", 500, "MiB")
    ]
    told = f"through the loader, {cost.limits[0].reason}: {cost.limits[0].verdict}"
    assert told in (released_run.folder / "output").read_text()
    text = ModelCard.load(release / "README.md").text
    assert (
        "2 fresh processes, 10 requests of 64 tokens\nin each), with one-sided bounds at 0.05: prefill"
        in text
    )
    assert "| cpu | decode_p50 by the engine | " in text
    assert "| cpu | peak_memory through the loader | " in text
    parts = {
        part["bom-ref"]: part for part in json.loads((release / "bom.cdx.json").read_text())["components"]
    }
    metrics = parts["variant:cpu"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    named = {metric["type"]: metric for metric in metrics}
    assert {"decode_p50 by the engine (x plain)", "peak_memory by the engine (MiB)"} <= set(named)
    seen = named["decode_p50 through the loader (ms)"]
    assert float(seen["value"]) == cost.decode.value
    assert float(seen["confidenceInterval"]["upperBound"]) == cost.decode.upper


@pytest.mark.slow
def test_a_release_beyond_a_limit_through_its_loader_is_not_built(case, released_run, tmp_path):
    values = case.budget.model_dump(mode="json")
    values["targets"]["cpu"]["limits"] = {"load_time": {"at_most": 1.0, "unit": "ms"}}
    strict = replace(case, budget=type(case.budget).model_validate(values))
    with pytest.raises(UserError, match="small on cpu: through the loader, load_time is at least"):
        build_release(strict, tmp_path / "out", "Team A", DAY, private_key(released_run.folder / "key"))
    assert not (tmp_path / "out").exists()
