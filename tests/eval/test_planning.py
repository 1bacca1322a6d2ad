"""Power before a study: what a pilot predicts, and how unsure that is."""

import json
import math
import re

import numpy as np
import pytest
import yaml
from scipy import stats

from eval.stats.crossed import crossed_variance, mean_squares
from eval.stats.power import (
    Components,
    clusters_for,
    components,
    effect_for,
    power,
    sample_components,
    seeds_for,
)
from tests.eval.run_builder import Run
from tests.eval.test_statistics import crossed
from tests.helpers import run, table_width


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("se", [10, 29, 31, 60])
def test_power_is_what_happens_far_from_zero(rng, se):
    """With two seeds the standard error itself is so unsure that even 60 of them are no certainty."""
    parts, c, alpha = Components(1.0, 0.0, 0.0), 4, 0.01
    effect = se * math.sqrt(1 / 2)
    means = effect + rng.standard_normal((200_000, 2))
    t = means.mean(1) / (means.std(1, ddof=1) / math.sqrt(2))
    passed = (t > stats.t.ppf(1 - alpha, 1)).mean()
    assert power(parts, effect, 2, c, alpha) == pytest.approx(passed, abs=0.005)
    seen = effect_for(parts, 2, c, alpha)
    assert power(parts, seen, 2, c, alpha) == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
def test_power_is_a_chance_for_every_effect(alpha):
    """Where two seeds leave one degree of freedom, scipy's noncentral t has holes below zero."""
    effects = np.concatenate([-np.logspace(3, -2, 4000), np.logspace(-2, 3, 4000)])
    for s, c in ((2, 6), (2, 40), (3, 12), (4, 36), (10, 100)):
        for parts in (Components(1.0, 0.0, 0.0), Components(0.3, 1.0, 1.0)):
            chance = power(parts, effects, s, c, alpha)
            assert np.all((chance >= 0) & (chance <= 1)), effects[~((chance >= 0) & (chance <= 1))]
            assert chance[0] < 3e-7


def test_power_is_what_happens(rng):
    parts, s, c = Components(0.04, 0.5, 0.5), 4, 50
    z = crossed(rng, 20_000, s, c, 0.2, np.sqrt(0.5), np.sqrt(0.5), mean=0.4)
    variance, nu = crossed_variance(mean_squares(z), s, c)
    passed = np.mean(z.mean((1, 2)) > stats.t.isf(0.05, nu) * np.sqrt(variance))
    assert power(parts, 0.4, s, c, 0.05) == pytest.approx(passed, abs=0.06)
    assert power(parts, 0.0, s, c, 0.05) == pytest.approx(0.05)
    assert power(parts, 100.0, s, c, 0.05) == 1.0
    assert power(Components(0, 0, 0), 1.0, s, c, 0.05) == 0.0


def test_the_plan_is_by_the_budget_that_was_fixed_in_the_pilot(tmp_path):
    """The file of the budget was changed since; another one is named, or is that of the planned study."""
    pilot = Run(tmp_path).make()
    (pilot.folder / "budget.yaml").write_text(yaml.safe_dump({**pilot.budget, "alpha": 0.2}))
    words, out = ["-m", "eval.gate.power", "--study", pilot.path], tmp_path / "out.json"
    for more, alpha in (([], 0.05), (["--budget", pilot.folder / "budget.yaml"], 0.2)):
        assert run(*words, *more, "--json", out).returncode == 0
        assert json.loads(out.read_text())["alpha"] == alpha


def test_needed_seeds_and_documents_are_the_least():
    parts = Components(0.04, 0.5, 0.5)
    s = seeds_for(parts, 0.3, 50, 0.05)
    assert power(parts, 0.3, s, 50, 0.05) >= 0.8 > power(parts, 0.3, s - 1, 50, 0.05)
    c = clusters_for(parts, 0.4, 5, 0.05)
    assert power(parts, 0.4, 5, c, 0.05) >= 0.8 > power(parts, 0.4, 5, c - 1, 0.05)
    assert seeds_for(parts, -0.1, 50, 0.05) == np.inf
    assert clusters_for(parts, 0.1, 2, 0.05) == np.inf  # seeds differ: documents cannot help


def test_the_first_number_that_is_enough_is_found_where_power_falls_again():
    """With two seeds, more clusters leave what is not known of seeds: power rises, and falls."""
    many = Components(np.array([0.02, 0.005, 0.3]), np.array([1.0, 1.0, 1.0]), np.array([0.5, 0.1, 3.0]))
    clusters, fell = np.arange(2, 4000), False
    for i, effect in enumerate((0.5, 0.9, 2.0)):
        one = Components(*(float(column[i]) for column in (many.seeds, many.documents, many.residual)))
        chances = power(one, effect, 2, clusters, 0.05)
        fell |= bool((np.diff(chances) < -1e-6).any())
        for goal in (0.2, 0.3, 0.5, 0.8):
            enough = clusters[chances >= goal]
            found = clusters_for(one, effect, 2, 0.05, goal)
            assert found == enough[0] if len(enough) else found >= 4000
    assert fell


def test_components_are_recovered(rng):
    estimates = [components(z) for z in crossed(rng, 2000, 5, 30, 0.5, 1.0, 0.7)]
    mean = np.mean([[f.seeds, f.documents, f.residual] for f in estimates], axis=0)
    assert mean == pytest.approx([0.25, 1.0, 0.49], rel=0.05)
    assert components(np.zeros((3, 5))) == Components(0.0, 0.0, 0.0)


def test_many_pilots_at_once_are_each_of_them():
    many = Components(np.array([0.04, 0.1, 0.0]), np.array([0.5, 0.5, 0.1]), np.array([0.5, 0.2, 0.1]))
    ones = [Components(*of) for of in zip(many.seeds, many.documents, many.residual, strict=True)]
    for figure in (
        lambda p: power(p, 0.3, 4, 50, 0.05),
        lambda p: seeds_for(p, 0.3, 50, 0.05),
        lambda p: clusters_for(p, 0.3, 5, 0.05),
        lambda p: effect_for(p, 4, 50, 0.05),
    ):
        np.testing.assert_array_equal(figure(many), [figure(one) for one in ones])


def test_the_smallest_effect_that_is_seen_is_seen():
    parts = Components(0.04, 0.5, 0.5)
    assert power(parts, effect_for(parts, 4, 50, 0.05), 4, 50, 0.05) == pytest.approx(0.8)


def test_what_a_pilot_leaves_open_holds_the_truth(rng):
    """The 80 % interval of the power covers the true power in 80 % of pilots, and not in all of them."""
    truth, s, c = Components(0.04, 0.5, 0.5), 4, 50
    true, held = power(truth, 0.4, s, c, 0.05), 0
    for i in range(300):
        z = crossed(rng, 1, s, c, 0.2, np.sqrt(0.5), np.sqrt(0.5), mean=0.4)[0]
        low, high = np.quantile(power(sample_components(z, 400, i), 0.4, s, c, 0.05), [0.1, 0.9])
        held += low <= true <= high
    assert 0.72 <= held / 300 <= 0.9


# The command


@pytest.fixture(scope="module")
def pilot(tmp_path_factory) -> Run:
    run = Run(tmp_path_factory.mktemp("pilot"), seeds=[0, 1], noise=0.01)
    run.gains |= {"S1": 0.11}
    run.make()
    for path in (run.path / "records/cost").rglob("*.json"):
        path.unlink()  # a pilot has neither costs nor variants
    for name in ("int8", "half"):
        for path in (run.path / "records/score" / name).iterdir():
            path.unlink()
    return run


def command(pilot: Run, *words: str):
    return run("-m", "eval.gate.power", "--study", str(pilot.path), *words)


def test_the_command_plans_from_a_pilot(pilot, tmp_path):
    done = command(pilot, "--json", str(tmp_path / "power.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "retention on far" in done.stdout
    assert re.search(r"planned on \d{4}-\d\d-\d\d by absorb", done.stdout)
    assert table_width(done.stdout) <= 120
    power = json.loads((tmp_path / "power.json").read_text())
    tests = {row["test"]: row for row in power["tests"]}
    assert set(tests) == {
        f"{part} on {name}" for part in ("assay", "retention") for name in ("validation", "far")
    }
    row = tests["retention on validation"]
    assert (row["seeds"], row["clusters"], row["asked_share"]) == (2, 40, 0.5)
    assert row["effect"] == pytest.approx((row["share"] - 0.5) * row["gain"])
    low, high = row["power"]["interval"]
    assert low <= row["power"]["value"] <= high
    assert high > 2 * low  # two seeds tell little of the variance of seeds


def test_a_larger_plan_and_another_truth(pilot, tmp_path):
    plan = tmp_path / "plan.yaml"
    text = (pilot.path / "study.yaml").read_text().replace("- 0\n- 1\n", "- 0\n- 1\n- 2\n- 3\n- 4\n- 5\n")
    plan.write_text(text.replace("validation: 64", "validation: 500"))
    words = ("--plan", str(plan), "--gain", "0.05", "--share", "0.7", "--json", str(tmp_path / "power.json"))
    assert command(pilot, *words).returncode == 0
    rows = json.loads((tmp_path / "power.json").read_text())["tests"]
    planned = {row["test"]: (row["seeds"], row["clusters"]) for row in rows}
    assert (planned["retention on validation"], planned["retention on far"]) == ((6, 500), (6, 30))
    assert rows[1]["effect"] == pytest.approx(0.2 * 0.05)


def test_a_share_that_is_not_above_the_asked_one_is_never_seen(pilot):
    done = command(pilot, "--share", "0.4")
    assert "no number of seeds up to 200 sees retention on validation, retention on far" in done.stdout


def test_a_pilot_of_one_seed_is_refused(tmp_path):
    done = command(Run(tmp_path, seeds=[0]).make())
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "one seed says nothing about other seeds" in done.stderr
