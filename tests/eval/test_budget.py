"""Budgets: what is accepted, and one clear line for what is not."""

from pathlib import Path

import pytest
import yaml

from eval.budget import Budget, Limit, load_budget
from eval.errors import UserError
from eval.study import ROOT, Study

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


def limits(**found: object) -> dict[str, object]:
    return {"targets": {"cpu": {"device": "cpu", "limits": found}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alhpa": 0.05}, ["alhpa", "did you mean 'alpha'"]),
        ({"f": 1.5}, ["f", "1.5", "less than or equal to 1"]),
        ({"g": 0}, ["g", "0", "greater than 0"]),
        ({"alpha": 0.5}, ["alpha", "0.5", "less than 0.5"]),
        ({"slices": {"far": 2.0}}, ["slices.far", "2.0"]),
        ({"targets": {}}, ["targets", "at least 1"]),
        ({"targets": {"tpu": {"device": "tpu"}}}, ["targets.tpu.device", "'tpu'", "'cuda'"]),
        (limits(decode_p51={"at_most": 1, "of": "plain"}), ["decode_p51", "decode_p50"]),
        (limits(disk={"at_most": 1}), ["limits.disk", "exactly one of `unit`"]),
        (limits(disk={"at_most": 1, "unit": "MiB", "of": "plain"}), ["limits.disk", "exactly one of `unit`"]),
        (limits(disk={"at_most": 1, "unit": "ms"}), ["disk cannot be in ms", "MiB"]),
        (limits(decode_p50={"at_most": 1, "unit": "GiB"}), ["decode_p50 cannot be in GiB", "ms"]),
        (limits(disk={"at_most": -1, "unit": "MiB"}), ["limits.disk.at_most", "-1"]),
    ],
)
def test_bad_budgets_are_refused(tmp_path: Path, changes: dict[str, object], words: list[str]):
    with pytest.raises(UserError) as caught:
        load(tmp_path, **changes)
    for word in words:
        assert word in str(caught.value)


def test_unknown_name():
    with pytest.raises(UserError, match=r"known by name: .*default.*tiny"):
        load_budget(study("nothing"))
