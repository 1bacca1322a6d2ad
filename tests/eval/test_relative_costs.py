"""Costs as shares of another variant's: of the figures that are told, with bounds that hold for them."""

from pathlib import Path

import numpy as np
import pytest

from eval.core.records import read_costs
from eval.cost.estimates import estimate_ratio, largest_ratio
from eval.stats.ratios import ratio_bounds
from tests.eval.run_builder import Run, row


@pytest.fixture
def toy(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_ratio_of_sizes_is_bounded_for_the_largest_of_processes_anew():
    """Against the ratio of mean logarithms, which lies below the expected largest 62 % of the time."""
    rng = np.random.default_rng(7)
    beyond = {"largest": 0, "means": 0}
    log_ours, log_theirs = rng.normal(0, 0.1, (400, 5)), rng.normal(0, 0.01, (400, 5))
    largest = 0.1 * rng.normal(size=(9999, 5)).max(1).mean() - 0.01 * rng.normal(size=(9999, 5)).max(1).mean()
    for ours, theirs in zip(np.exp(log_ours), np.exp(log_theirs), strict=True):
        share = largest_ratio(ours, theirs, 0.05)
        assert share.low < share.point == ours.max() / theirs.max() < share.high
        beyond["largest"] += np.log(share.high) < largest
        beyond["means"] += np.log(ratio_bounds(ours, theirs, 0.05).high) < largest
    assert beyond["largest"] / 400 <= 0.05
    assert beyond["means"] / 400 > 0.5
    assert largest_ratio(np.ones(1), np.ones(1), 0.05) is None
    alike = largest_ratio(np.exp(rng.normal(0, 0.003, 5)), np.exp(rng.normal(0, 0.003, 5)), 0.05)
    assert alike.high < 1.04, "a few per mille apart, the bound is a few per cent above"


def test_ratios_are_of_the_figures_that_are_told_and_what_is_counted_is_no_test(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {
        "disk": {"at_most": 0.6, "of": "plain"},
        "peak_memory": {"at_most": 1.1, "of": "plain"},
    }
    toy.make().gate()
    disk, memory = row(toy.result(), "int8").parts[-2:]
    assert (disk.name, disk.low, disk.high, disk.p_fail) == ("cost:disk", disk.estimate, disk.estimate, None)
    cost = {name: row(toy.result(), name).cost for name in ("plain", "int8")}
    told, other = (cost[name]["peak_memory"].value for name in ("int8", "plain"))
    assert memory.estimate == pytest.approx(told / other)
    assert memory.high > cost["int8"]["peak_memory"].upper / cost["plain"]["peak_memory"].upper
    assert (memory.verdict, memory.p_fail) == ("PASS", 0.5)
    itself = row(toy.result(), "plain").parts[-1]
    assert (itself.name, itself.low, itself.high, itself.verdict) == ("cost:peak_memory", 1.0, 1.0, "PASS")
    assert cost["int8"]["decode_p50"].relative is not None
    assert cost["int8"]["decode_p95"].relative is None, "no bound of that ratio is known"


def test_bytes_on_disk_of_two_seeds_are_counted(toy: Run):
    toy.make()
    first = {record.recipe: record for record in read_costs(toy.path) if record.arm == "S1"}
    pairs = {
        name: [one, one.model_copy(update={"disk_bytes": one.disk_bytes + 12})] for name, one in first.items()
    }
    share = estimate_ratio(pairs["int8"], pairs["plain"], "disk", 0.05)
    assert share.low == share.point == share.high
    assert share.point == (first["int8"].disk_bytes + 12) / (first["plain"].disk_bytes + 12)
