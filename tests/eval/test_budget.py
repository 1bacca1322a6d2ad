"""Budgets: what is accepted, and one clear line for what is not."""

from pathlib import Path

import pytest
import yaml

from eval.core.budget import Budget, Limit, load_budget
from eval.core.config import ROOT
from eval.core.errors import UserError
from eval.core.sections import Cost, Load
from eval.core.study import Study

GOOD = {"name": "mine", "f": 0.5, "g": 0.5, "targets": {"cpu": {"device": "cpu"}}}


def study(budget: str) -> Study:
    return Study.model_validate(
        {
            "name": "toy",
            "seeds": [0],
            "data": {"documents": [{"kind": "pydoc"}]},
            "base": {"path": "somewhere"},
            "method": {"name": "placebo"},
            "train": {},
            "budget": budget,
        }
    )


def load(tmp_path: Path, **changes: object) -> Budget:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return load_budget(study(str(path)))


def test_every_budget_of_the_project_loads():
    names = sorted(path.stem for path in (ROOT / "configs" / "budgets").glob("*.yaml"))
    assert {"default", "tiny"} <= set(names)
    for name in names:
        assert load_budget(study(name)).name == name


def test_the_default_asks_what_the_documentation_says():
    budget = load_budget(study("default"))
    assert (budget.f, budget.g, budget.alpha, budget.slices) == (0.5, 0.5, 0.05, {"near": 0.5, "far": 0.5})
    cpu, gpu = budget.targets["cpu"], budget.targets["gpu"]
    assert (cpu.required, gpu.required, gpu.device) == (True, False, "cuda")
    assert cpu.limits["disk"] == Limit(at_most=0.5, of="plain")
    assert all(limit.of == "plain" for target in (cpu, gpu) for limit in target.limits.values())


def test_another_budget_than_the_studys():
    assert load_budget(study("default"), "tiny").name == "tiny"


def limits(**values: object) -> dict[str, object]:
    return {"targets": {"cpu": {"device": "cpu", "limits": values}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alhpa": 0.05}, ["alhpa", "did you mean 'alpha'"]),
        ({"f": 1.5}, ["f", "1.5", "expected at most 1"]),
        ({"g": 0}, ["g", "0", "expected more than 0"]),
        ({"delta_min": 0.01}, ["exactly one of `g`", "`delta_min`"]),
        ({"g": None}, ["exactly one of `g`", "`delta_min`"]),
        ({"g": None, "delta_min": -0.1}, ["delta_min", "-0.1", "expected more than 0"]),
        ({"alpha": 0.5}, ["alpha", "0.5", "less than 0.5"]),
        ({"slices": {"far": 2.0}}, ["slices.far", "2.0"]),
        ({"targets": {}}, ["targets", "at least 1"]),
        ({"targets": {"tpu": {"device": "tpu"}}}, ["targets.tpu.device", "'tpu'", "'cuda'"]),
        (limits(decode_p51={"at_most": 1, "of": "plain"}), ["decode_p51", "decode_p50"]),
        (limits(disk={"at_most": 1}), ["limits.disk", "exactly one of `unit`"]),
        (limits(disk={"at_most": 1, "unit": "MiB", "of": "plain"}), ["limits.disk", "exactly one of `unit`"]),
        (limits(disk={"at_most": 1, "unit": "ms"}), ["disk cannot be in ms", "MiB"]),
        (limits(decode_p50={"at_most": 1, "unit": "GiB"}), ["decode_p50 cannot be in GiB", "ms"]),
        (
            limits(decode_p95={"at_most": 1, "of": "plain"}),
            ["decode_p95: no bound for that ratio; give an absolute limit"],
        ),
        (limits(ttft_p99={"at_most": 1, "of": "plain"}), ["prefill_p99: no bound for that ratio"]),
        (limits(disk={"at_most": -1, "unit": "MiB"}), ["limits.disk.at_most", "-1"]),
        (limits(disk={"at_mots": 1, "unit": "MiB"}), ["at_mots", "did you mean 'at_most'"]),
        (limits(disk={"at_most": 1, "unit": "MB"}), ["limits.disk.unit", "'MB'", "'MiB'"]),
        (limits(disk={"unit": "MiB"}), ["limits.disk", "exactly one of `at_most` and `at_least`"]),
        (limits(disk={"at_least": 1, "unit": "MiB"}), ["disk takes `at_most`"]),
        (limits(throughput={"at_most": 1, "unit": "tokens/s"}), ["throughput takes `at_least`"]),
        (limits(throughput={"at_least": 1, "unit": "ms"}), ["throughput cannot be in ms", "tokens/s"]),
        (limits(knee={"at_least": 1, "unit": "tokens/s"}), ["knee cannot be in tokens/s", "requests/s"]),
        (limits(energy={"at_most": 1, "unit": "ms"}), ["energy cannot be in ms", "J/token"]),
        (
            limits(ttft_p95={"at_most": 1, "unit": "ms"}, prefill_p95={"at_most": 2, "unit": "ms"}),
            ["prefill_p95 and ttft_p95 are the same quantity: give one of them"],
        ),
        (limits(tpot_p50={"at_most": 1, "unit": "GiB"}), ["decode_p50 cannot be in GiB"]),
        (limits(ttft_p90={"at_most": 1, "unit": "ms"}), ["ttft_p90"]),
    ],
)
def test_bad_budgets_are_refused(tmp_path: Path, changes: dict[str, object], words: list[str]):
    with pytest.raises(UserError) as caught:
        load(tmp_path, **changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("load_time", {"at_most": 2, "unit": "s"}),
        ("energy", {"at_most": 0.9, "of": "plain"}),
        ("device_memory", {"at_most": 3, "unit": "GiB"}),
        ("knee", {"at_least": 2.5, "unit": "requests/s"}),
        ("throughput", {"at_least": 1.5, "of": "plain"}),
    ],
)
def test_every_kind_of_limit(tmp_path: Path, name: str, limit: dict[str, object]):
    loaded = load(tmp_path, **limits(**{name: limit})).targets["cpu"].limits[name]
    assert loaded.model_dump(exclude_none=True) == limit
    assert loaded.value in limit.values()


def test_latencies_may_have_their_names_of_serving(tmp_path: Path):
    limit = {"at_most": 2, "unit": "ms"}
    for given, name in (("ttft_p95", "prefill_p95"), ("tpot_p50", "decode_p50"), ("tpot_p99", "decode_p99")):
        budgets = [load(tmp_path, **limits(**{key: limit})) for key in (given, name)]
        assert budgets[0] == budgets[1]
        assert list(budgets[0].targets["cpu"].limits) == [name]


def test_the_guard_may_be_absolute(tmp_path: Path):
    budget = load(tmp_path, g=None, delta_min=0.01)
    assert (budget.g, budget.delta_min) == (None, 0.01)


def test_the_budget_of_the_documentation_is_one(tmp_path: Path):
    blocks = (ROOT / "docs" / "cost.md").read_text().split("```yaml\n")[1:]
    sections = [yaml.safe_load(block.split("```")[0]) for block in blocks]
    (budget,) = [raw for raw in sections if "targets" in raw]
    (load_section,) = [raw["cost"] for raw in sections if "cost" in raw]
    assert load(tmp_path, **{"g": None, **budget}).targets["cpu"].limits["throughput"].at_least == 40
    assert Cost.model_validate(load_section).load == Load(rates=[2, 4, 8], seconds=30, slo_ms=500)


@pytest.mark.parametrize("sizes", [[8], [1, 1], [8, 1], [0, 1], []])
def test_batch_sizes_start_with_one_and_ascend(sizes: list[int]):
    assert Cost(batch_sizes=[1, 8]).batch_sizes == [1, 8]
    with pytest.raises(ValueError, match="batch_sizes must start with 1 and ascend"):
        Cost(batch_sizes=sizes)


def test_unknown_name():
    with pytest.raises(UserError, match=r"known by name: .*default.*tiny"):
        load_budget(study("nothing"))
