"""Meters of energy, read from a folder that looks like the kernel's; without one there is no number."""

from pathlib import Path

import pytest
import torch

from eval.core.budget import load_budget
from eval.core.errors import UserError
from eval.cost.meters import BELOW, NONE, Counter, device_memory, nvml, open_meter, rapl
from eval.gate.decision import evaluate_gate, judge
from eval.gate.evidence import collect_evidence
from eval.report.budget_table import build_budget_table
from tests.eval.run_builder import Run, edit, row

RANGE = 262_143_328_850  # microjoules, of a real package


def zone(top: Path, folder: str, name: str, count: int, wraps: int = RANGE) -> Path:
    place = top / folder
    place.mkdir(parents=True)
    for file, value in {"name": name, "energy_uj": count, "max_energy_range_uj": wraps}.items():
        (place / file).write_text(f"{value}\n")
    return place / "energy_uj"


def test_packages_and_their_memory_are_summed_and_what_they_contain_is_not(tmp_path):
    zone(tmp_path, "intel-rapl:2", "psys", 5)
    counts = {
        "package-0": zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000),
        "core": zone(tmp_path, "intel-rapl:0:0", "core", 400_000),
        "dram": zone(tmp_path, "intel-rapl:0:1", "dram", 7),
        "package-1": zone(tmp_path, "intel-rapl:1", "package-1", 0),
    }
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)  # the same package by another way
    (tmp_path / "intel-rapl").mkdir()
    meter = rapl(tmp_path)
    assert meter.name == "RAPL: package-0, dram, package-1"
    before = meter.total
    for name, path in counts.items():
        path.write_text(str(int(path.read_text()) + {"package-0": 2_500_000, "dram": 500_000}.get(name, 0)))
    counts["package-1"].write_text("4000000")
    meter.update()
    energy = meter.spent(before, tokens=10)
    assert (energy.joules, energy.tokens, energy.meter) == (pytest.approx(7.0), 10, meter.name)


def test_a_counter_that_wrapped_goes_on(tmp_path):
    path = zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 999_999)
    meter = rapl(tmp_path)
    for count in (RANGE, 1_000_000, 500_000):  # 0.999999 J, then past the end, then all the way round
        path.write_text(str(count))
        meter.update()
    assert meter.total == pytest.approx((999_999 + 1_000_001 + RANGE + 1 - 500_000) / 1e6)


def test_a_counter_without_a_range_must_not_go_back():
    values = iter([10, 4])
    counter = Counter("NVML", lambda: next(values), 1e3)
    with pytest.raises(UserError, match="meter NVML: went back by 6"):
        counter.update()


def test_without_a_meter_there_is_a_reason_and_no_number(tmp_path):
    meter = rapl(tmp_path)
    meter.update()
    energy = meter.spent(meter.total, tokens=3)
    assert (energy.joules, energy.meter) == (None, f"{NONE}: no RAPL package below {tmp_path}")
    zone(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    assert "energy_uj cannot be read (No such file" in rapl(tmp_path).name


@pytest.mark.parametrize(
    ("joules", "meter", "verdict", "words"),
    [
        (None, "no meter: no RAPL", "INCONCLUSIVE", "energy was not measured on cpu (no meter: no RAPL)"),
        (
            None,
            f"RAPL: package-0: {BELOW}",
            "INCONCLUSIVE",
            f"energy was not measured on cpu (RAPL: package-0: {BELOW})",
        ),
        (40.0, "RAPL: package-0", "PASS", "energy is at most 0.4 J/token, the limit is 0.5"),
        (60.0, "RAPL: package-0", "FAIL", "energy is at least 0.6 J/token, the limit is 0.5"),
    ],
)
def test_the_gate_holds_energy_where_there_is_a_meter(tmp_path, joules, meter, verdict, words):
    toy = Run(tmp_path)
    toy.budget["targets"]["cpu"]["limits"] = {"energy": {"at_most": 0.5, "unit": "J/token"}}
    toy.make()
    energy = {"joules": joules, "tokens": 100, "meter": meter}
    for path in (toy.path / "records/cost/cpu").rglob("*.json"):
        edit(path, lambda record: [process.update(energy=energy) for process in record["processes"]])
    budget = load_budget(toy.study)
    part = row(evaluate_gate(collect_evidence(toy.path, toy.study, budget), budget), "int8").parts[-1]
    assert (part.name, part.verdict, part.reason) == ("cost:energy", verdict, words)


def test_a_meter_that_did_not_tick_has_no_number_and_the_table_says_why(tmp_path):
    zone(tmp_path / "rapl", "intel-rapl:0", "package-0", 5)
    meter = rapl(tmp_path / "rapl")
    before = meter.total
    meter.update()
    energy = meter.spent(before, tokens=3)
    assert (energy.joules, energy.meter) == (None, f"RAPL: package-0: {BELOW}")
    toy = Run(tmp_path).make()
    for recipe in ("plain", "half", "int8"):
        told = energy.model_dump() | {"tokens": 100}
        told |= {} if recipe == "int8" else {"joules": 40.0, "meter": "RAPL: package-0"}
        change = lambda record, told=told: [process.update(energy=told) for process in record["processes"]]  # noqa: E731
        edit(toy.path / f"records/cost/cpu/{recipe}/S1-s0.json", change)
    table = build_budget_table(judge(toy.path))
    place = [column.name for column in table.costs].index("energy")
    shown = {row.variant.recipe: row.costs[place].main for row in table.rows if row.costs}
    assert shown == {"plain": "0.400", "half": "0.400", "int8": BELOW}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_nvml_measures_nothing():
    assert nvml().total is None
    assert nvml().name.startswith(NONE)
    assert open_meter("cpu").total is None or open_meter("cpu").name.startswith("RAPL")
    assert device_memory("cpu") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reports_its_energy_and_memory():
    held = torch.ones(2**26, device="cuda")
    meter = open_meter("cuda")
    if meter.total is None:
        pytest.skip(meter.name)
    for _ in range(2000):
        held *= 1.0
    torch.cuda.synchronize()
    meter.update()
    assert meter.total > 0
    assert (memory := device_memory("cuda")) is None or memory >= 2**28
