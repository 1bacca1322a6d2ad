"""A rollout: routing, bounds of two arms, decisions over stages, the signed log, and the loader that obeys."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml

from eval.core.errors import UserError
from eval.release.load_release import load_release
from eval.signoff.keys import new_key, private_key, read_trusted
from eval.stats import arms, sequential
from eval.stats.crossed import linearise
from eval.watch import chain, rollout
from eval.watch.decision import Sums, decide, findings, sums_of
from eval.watch.routing import ARMS, Plan, Request, arm_of, place_of
from scripts.simulate_rollout import Truth, simulate
from tests.helpers import run as command
from tests.helpers import table_width

PLAN = {
    "name": "first",
    "requests": 500,
    "stages": [{"share": 0.3}, {"share": 0.5, "domain": ["code"]}],
    "measures": {
        "loss": {"worse_by": 0.1},
        "errors": {"worse_by": 0.1},
        "reward": {"worse_by": 0.2},
        "latency_p95": {"worse_by": 0.3},
    },
}


def requests(plan, stage, n, seed=0, domain="code", **worse):
    """n requests as a router logs them; the release is worse by so much."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(n):
        key = f"{seed}-{number}"
        arm = arm_of(plan, stage, key, domain)
        by = worse if arm == "release" else {}
        size = int(rng.integers(200, 3000))
        rows.append(
            {
                "key": key,
                "stage": stage,
                "arm": arm,
                "time": "2026-01-01T00:00:00Z",
                "domain": domain,
                "error": bool(rng.random() < 0.02 + by.get("errors", 0)),
                "latency_ms": 20 * float(rng.lognormal(0, 0.2)) * (1 + by.get("latency", 0)),
                "bits": size * float(2.5 + rng.normal(0, 0.2) + by.get("loss", 0)),
                "bytes": size,
                "reward": float(rng.random() < 0.8),
                "status": 200,
            }
        )
    return rows


def write_log(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def given(*words):
    return rollout.arguments().parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout-keys")
    new_key(folder / "ops")
    new_key(folder / "other")
    return folder


@pytest.fixture
def started(release, released_run, keys, tmp_path):
    """A rollout that has begun."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN, sort_keys=False))
    folder = tmp_path / "rollout"
    words = ["--rollout", folder, "--release", release, "--plan", plan, "--by", "Ada", "--key", keys / "ops"]
    folder.mkdir()
    first = rollout.first_step(given("start", *words, "--public", released_run.folder / "key.pub"))
    rollout.start(folder, *first)
    return folder


def take_step(folder, keys, path, rows, **flags):
    words = ["--rollout", folder, "--log", write_log(path, rows), "--by", "cron", "--key", keys / "ops"]
    return rollout.step(given("step", *words, *(word for pair in flags.items() for word in pair)))


def test_keys_are_spread_evenly_and_stay_with_the_release_while_shares_grow():
    plan = Plan.model_validate(PLAN | {"stages": [{"share": 0.05}, {"share": 0.25}]})
    names = [f"user-{i}" for i in range(4000)]
    places = np.sort([place_of("salt", name) for name in names])
    assert np.abs(places - (np.arange(4000) + 0.5) / 4000).max() < 1.63 / 4000**0.5, "Kolmogorov, 1 %"
    first, second = ({n for n in names if arm_of(plan, s, n) == "release"} for s in (1, 2))
    assert first < second
    other = {n for n in names if arm_of(plan.model_copy(update={"salt": "b"}), 2, n) == "release"}
    assert 0.15 < len(second & other) / len(second) < 0.35, "another salt deals anew"


def test_a_stage_is_about_its_domains_tenants_and_lengths_alone():
    stage = {"share": 0.5, "domain": ["code"], "tenant": ["a"], "max_prompt_bytes": 100}
    plan = Plan.model_validate(PLAN | {"stages": [stage]})
    assert arm_of(plan, 1, "k", "code", "a", 100) != "outside"
    for other in (("prose", "a", 100), ("code", "b", 100), ("code", "a", 101), ("code", "a", None)):
        assert arm_of(plan, 1, "k", *other) == "outside"
    with pytest.raises(ValueError, match="let shares grow"):
        Plan.model_validate(PLAN | {"stages": [{"share": 0.3}, {"share": 0.2}]})


def test_bounds_of_an_arm_are_those_of_its_values():
    rng = np.random.default_rng(0)
    size = rng.integers(100, 4000, 600).astype(float)
    bits = size * rng.normal(2.5, 0.3, 600)
    ours = arms.ratio_bounds(arms.ratio_sums(bits, size), 0.025, 500)
    theirs = sequential.mean_bounds(linearise(bits[None], size)[0], 0.025, 500)
    assert [float(x) for x in ours] == pytest.approx(theirs, abs=1e-3), "but for the jackknife's correction"
    ms = rng.lognormal(3, 0.4, 600)
    counts = np.bincount(arms.latency_bins(ms), minlength=arms.BINS).astype(float)
    ours = arms.quantile_bounds(counts, 0.9, 0.025, 500)
    theirs = sequential.quantile_bounds(ms, 0.9, 0.025, 500)
    assert theirs[0] * np.exp(-arms.BIN) <= ours.low <= theirs[0]
    assert theirs[1] <= ours.high <= theirs[1] * np.exp(arms.BIN)
    assert arms.quantile_bounds(counts[None] * 0, 0.9, 0.025, 500).high == np.inf
    assert np.isnan(arms.quantile(counts * 0, 0.5))


def test_the_fewest_successes_that_refuse_a_chance_are_those_of_a_search():
    n, weight = np.array([1, 5, 40, 400]), sequential.mixture_weight(100, 0.05)
    for rate in (0.05, 0.9):
        found = sequential.refused_counts(n, rate, 0.05, 100)
        for count, least in zip(n, found, strict=True):
            evidence = sequential.log_rate_evidence(np.arange(count + 1), count, rate, weight)
            refused = np.flatnonzero(evidence >= -np.log(0.05))
            assert least == (refused[0] if len(refused) else count + 1)


def test_sums_of_looks_decide_as_the_requests_would_together():
    plan = Plan.model_validate(PLAN)
    rows = [Request.model_validate(row) for row in requests(plan, 1, 1200)]
    parts = [rows[:500], rows[500:]]
    looks = {arm: [sums_of(r for r in part if r.arm == arm) for part in parts] for arm in ARMS}
    whole = {arm: [sums_of(r for r in rows if r.arm == arm)] for arm in ARMS}
    both = findings(plan, 1, looks), findings(plan, 1, whole)
    for one, other in zip(*both, strict=True):
        assert (one.release, one.low, one.high) == pytest.approx((other.release, other.low, other.high))
    loss = both[0][0]
    ours = [r for r in rows if r.arm == "release"]
    assert loss.release == pytest.approx(sum(r.bits for r in ours) / sum(r.bytes for r in ours))


def test_nothing_is_decided_without_values():
    plan = Plan.model_validate(PLAN)
    decision, reason = decide(findings(plan, 1, {arm: [Sums(requests=50)] for arm in ARMS}))
    assert (decision, reason) == ("HOLD", "loss: 0 and 0 values say nothing yet")


def test_simulated_rollouts_err_seldom_and_find_faults_soon():
    """`scripts.simulate_rollout` has the whole: docs/statistics.md."""
    good, at_limit, slow = (
        simulate(truth, streams, looks=looks)
        for truth, streams, looks in (
            (Truth("good"), 20, 6),
            (Truth("loss at its limit", loss=0.02), 50, 12),
            (Truth("slow", latency=1.0), 20, 3),
        )
    )
    assert good.back.mean() <= 0.05
    assert at_limit.promoted.mean() <= 0.05
    assert at_limit.back.mean() <= 0.05
    assert at_limit.naive.mean() > 0.05, "a plain test at each look errs"
    assert (slow.back == 1).all()
    assert np.median(slow.faulty) <= 2


def test_a_rollout_goes_from_stage_to_stage_and_its_log_tells_why(started, release, keys, tmp_path):
    plan = Plan.model_validate(PLAN)
    first = take_step(started, keys, tmp_path / "1.jsonl", requests(plan, 1, 300))
    assert (first.decision, first.state.stage) == ("HOLD", 1)
    rows = requests(plan, 1, 2500, seed=1)
    second = take_step(started, keys, tmp_path / "2.jsonl", rows)
    assert (second.decision, second.state.stage) == ("PROMOTE", 2), second.reason
    late = [*rows[:5], *requests(plan, 2, 20, seed=2, domain="prose"), *requests(plan, 2, 2500, seed=3)]
    done = command(
        "-m", "eval.watch.rollout", "step", "--rollout", started, "--log", write_log(tmp_path / "3.jsonl", late),
        "--by", "cron", "--key", keys / "ops", "--public", keys / "ops.pub", "--json", tmp_path / "3.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"PROMOTE: loss is worse by [-.\d]+ bits per byte at most; .*; latency_p95 is worse by [.\d]+ % at most"
    assert re.search(said, done.stdout)
    assert re.search(r"latency_p95, ms .* │ \+30 %", done.stdout), "worse by, bounds and limit are in percent"
    assert "(Team A) on cpu, complete: the release answers all requests" in done.stdout
    assert re.search(r"seen on \d{4}-\d\d-\d\d by absorb", done.stdout)
    assert table_width(done.stdout) <= 120
    assert json.loads((tmp_path / "3.json").read_text())["ignored"] == {
        "of an earlier stage": 5,
        "outside the stage": 20,
    }
    shown = command("-m", "eval.watch.rollout", "state", "--rollout", started, "--public", keys / "ops.pub")
    assert shown.returncode == 0, shown.stderr
    assert "1. " in shown.stdout
    assert re.search(r"Ada \(key [0-9a-f]{12}\): START in stage 1: a new release", shown.stdout)
    assert not any(row["key"] in (started / "log.jsonl").read_text() for row in rows[:3]), "no key is kept"
    _, info = load_release(release, "cpu", rollout=started, rollout_key=keys / "ops.pub")
    assert not info.fallback


def test_a_fault_is_rolled_back_and_the_loader_serves_the_fallback(started, release, keys, tmp_path, caplog):
    plan = Plan.model_validate(PLAN)
    step = take_step(started, keys, tmp_path / "1.jsonl", requests(plan, 1, 1500, errors=0.5))
    assert (step.decision, step.state.status) == ("ROLL BACK", "rolled back")
    assert step.reason.startswith("errors is worse by")
    shown = command("-m", "eval.watch.rollout", "state", "--rollout", started)
    assert shown.returncode == 1
    assert "rolled back in stage 1 of 2: the fallback answers all requests" in shown.stdout
    _, info = load_release(release, "cpu", rollout=started, rollout_key=keys / "ops.pub")
    assert info.fallback
    assert "the rollout was rolled back on" in info.reason
    assert "errors is worse by" in caplog.text
    with pytest.raises(UserError, match=r"rolled back: errors is worse.*start a new one"):
        take_step(started, keys, tmp_path / "2.jsonl", requests(plan, 1, 200, seed=1))


def test_a_mistyped_folder_is_named_and_leaves_nothing(tmp_path, keys):
    signed = ["--by", "Ada", "--key", keys / "ops"]
    done = command(
        "-m", "eval.watch.rollout", "step", "--rollout", tmp_path / "ro2", "--roll-back", "x", *signed
    )
    assert done.returncode == 3
    assert "no log.jsonl; name a folder that" in done.stderr
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "plan.yaml"
    file.write_text("{}")
    for folder in (file, file / "below"):
        with pytest.raises(UserError, match=r"plan\.yaml.*a file is in its place; name a new folder"):
            rollout.make_folder(folder)


def test_a_plan_that_is_no_plan_leaves_no_folder(release, keys, tmp_path):
    (tmp_path / "plan.yaml").write_text("stages: []\n")
    words = ["--release", release, "--plan", tmp_path / "plan.yaml", "--by", "Ada", "--key", keys / "ops"]
    done = command("-m", "eval.watch.rollout", "start", "--rollout", tmp_path / "rollout", *words)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "plan.yaml" in done.stderr
    assert not (tmp_path / "rollout").exists()


def test_anybody_with_a_key_may_go_back_by_hand(started, keys):
    step = rollout.step(
        given("step", "--rollout", started, "--roll-back", "a user", "--by", "Bo", "--key", keys / "ops")
    )
    assert (step.decision, step.by, step.by_hand, step.reason) == ("ROLL BACK", "Bo", True, "a user")
    rollout.check_decisions(started, chain.read_steps(started, read_trusted([keys / "ops.pub"])))


def test_requests_that_were_not_dealt_by_the_hash_or_counted_before_are_no_evidence(started, keys, tmp_path):
    plan = Plan.model_validate(PLAN)
    rows = requests(plan, 1, 200)
    bad = [dict(row, arm={"release": "fallback", "fallback": "release"}[row["arm"]]) for row in rows]
    with pytest.raises(UserError, match=r"line 1: answered by .*, the key belongs to"):
        take_step(started, keys, tmp_path / "bad.jsonl", bad)
    with pytest.raises(UserError, match="of stage 2, the rollout is in stage 1"):
        take_step(started, keys, tmp_path / "bad.jsonl", requests(plan, 2, 10))
    with pytest.raises(UserError, match=r"line 1: reward: 2.0; expected at most 1"):
        take_step(started, keys, tmp_path / "bad.jsonl", [dict(rows[0], reward=2.0)])
    assert take_step(started, keys, tmp_path / "1.jsonl", rows).ignored == {}
    with pytest.raises(UserError, match=r"no request that counts .200 of a key that was counted"):
        take_step(started, keys, tmp_path / "2.jsonl", rows)
    chain.keys_path(started, 2).write_text("")
    with pytest.raises(UserError, match="not those of step 2"):
        take_step(started, keys, tmp_path / "3.jsonl", requests(plan, 1, 10, seed=5))


def test_a_reward_that_comes_later_counts_with_its_request(started, keys, tmp_path):
    plan = Plan.model_validate(PLAN)
    whole = [dict(row, id=f"id{place}") for place, row in enumerate(requests(plan, 1, 200))]
    bare = [{name: value for name, value in row.items() if name != "reward"} for row in whole]
    later = [{"reward_of": row["id"], "reward": row["reward"], "time": row["time"]} for row in whole]
    strange = [dict(later[0], reward_of="nobody"), dict(later[1], reward=1 - later[1]["reward"])]
    with pytest.raises(UserError, match=r"line 201: reward: 3; expected at most 1"):
        take_step(started, keys, tmp_path / "bad.jsonl", [*bare, dict(later[0], reward=3)])
    step = take_step(started, keys, tmp_path / "1.jsonl", [*bare[:50], *later, *bare[50:], *strange])
    assert step.ignored == {"rewards of no request in this log": 1, "second rewards of a request": 1}
    for arm in ("release", "fallback"):
        given_to = [row["reward"] for row in whole if row["arm"] == arm]
        assert (step.sums[arm].rewards, step.sums[arm].reward) == (len(given_to), sum(given_to))


def test_a_log_that_was_changed_is_refused_and_a_state_that_was_falls_back(started, release, keys, tmp_path):
    plan, ops = Plan.model_validate(PLAN), read_trusted([keys / "ops.pub"])
    take_step(started, keys, tmp_path / "1.jsonl", requests(plan, 1, 200))
    with pytest.raises(UserError, match="signed with the unknown key"):
        chain.read_steps(started, read_trusted([keys / "other.pub"]))
    lines = (started / "log.jsonl").read_text().splitlines(keepends=True)
    copy = shutil.copytree(started, tmp_path / "copy")
    (copy / "log.jsonl").write_text(lines[1])
    with pytest.raises(UserError, match="line 1: is not linked"):
        chain.read_steps(copy, ops)
    (copy / "log.jsonl").write_text(lines[0].replace("payload", "payLoad", 1) + lines[1])
    with pytest.raises(UserError, match="no DSSE envelope"):
        chain.read_steps(copy, ops)
    (copy / "log.jsonl").write_text("".join(lines))
    state = json.loads((copy / "rollout.json").read_text())
    (copy / "rollout.json").write_text(json.dumps(state | {"stage": 2}))
    _, info = load_release(release, "cpu", rollout=copy, rollout_key=keys / "ops.pub")
    assert "is not what the last line of log.jsonl says" in info.reason
    (copy / "rollout.json").write_text("{")
    assert "cannot be read" in load_release(release, "cpu", rollout=copy)[1].reason
    (copy / "rollout.json").write_text(json.dumps(state | {"release": "0" * 64}))
    assert "of another release or target" in load_release(release, "cpu", rollout=copy)[1].reason
    with pytest.raises(UserError, match="is there already"):
        rollout.first_step(given(
            "start", "--rollout", started, "--release", release, "--plan", "x", "--by", "a", "--key", "b"
        ))  # fmt: skip


def test_a_promotion_that_the_figures_do_not_give_is_found_although_it_is_signed(started, keys, tmp_path):
    plan = Plan.model_validate(PLAN)
    held = take_step(started, keys, tmp_path / "1.jsonl", requests(plan, 1, 200))
    state = held.state.model_copy(update={"stage": 2, "step": 3, "reason": "go on"})
    previous = chain.last_hash(started)
    forged = held.model_copy(
        update={"number": 3, "previous": previous, "decision": "PROMOTE", "reason": "go on", "state": state}
    )
    chain.append_step(started, forged, private_key(keys / "ops"))
    steps = chain.read_steps(started, read_trusted([keys / "ops.pub"]))
    with pytest.raises(UserError, match="line 3: says PROMOTE, its figures say HOLD"):
        rollout.check_decisions(started, steps)
