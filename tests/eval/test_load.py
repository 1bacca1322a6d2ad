"""Open-loop load: the queue against theory, the real-time loop against the recursion, the command, the gate."""

import shutil
import time
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats

from eval.core.artifacts import read_manifest
from eval.core.budget import load_budget
from eval.core.errors import UserError
from eval.core.records import Arrivals, LoadRecord, Server, read_loads, write_record
from eval.core.sections import Load
from eval.core.study import load_study
from eval.cost.estimates import estimate_knees, summarize_load
from eval.cost.load import build_table, choose_rates, rates_from_knee
from eval.cost.orders import OpenLoop, Order
from eval.cost.plan import are_measured, find_variants, plan_from_run
from eval.cost.worker import serve_arrivals, serve_open_loop
from eval.engines import load_engine
from eval.gate.decision import evaluate_gate
from eval.gate.evidence import collect_evidence
from eval.stats.queueing import capacity, finished, knee, longest_queue, outcome, poisson
from tests.eval.run_builder import COST, HOST, Run, fake_run, row, torch_model
from tests.helpers import run

MU = 100.0  # requests per second of the server


def waits(rate, services):
    arrivals = np.random.default_rng(7).exponential(1 / rate, len(services)).cumsum()
    return finished(arrivals, services) - arrivals - services


def test_the_recursion_is_lindleys():
    rng = np.random.default_rng(0)
    arrivals, services = rng.exponential(1, 500).cumsum(), rng.exponential(0.9, 500)
    now, slow = 0.0, []
    for arrival, service in zip(arrivals, services, strict=True):
        now = max(now, arrival) + service
        slow.append(now)
    np.testing.assert_allclose(finished(arrivals, services), slow, rtol=1e-12)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_waits_are_those_of_pollaczek_and_khinchine(load):
    """W = rho s (1 + c^2) / (2 (1 - rho)): c is 1 for exponential service, 0 for constant."""
    n, rate = 400_000, load * MU
    exponential = np.random.default_rng(1).exponential(1 / MU, n)
    assert waits(rate, exponential).mean() == pytest.approx(load / (MU - rate), rel=0.05)
    assert waits(rate, np.full(n, 1 / MU)).mean() == pytest.approx(load / (2 * (MU - rate)), rel=0.05)


def test_latency_of_exponential_service_is_exponential():
    """M/M/1: the time in the system is exponential with rate mu - lambda."""
    services = np.random.default_rng(2).exponential(1 / MU, 400_000)
    latency = waits(60.0, services) + services
    for q in (0.5, 0.95, 0.99):
        assert np.quantile(latency, q) == pytest.approx(-np.log(1 - q) / (MU - 60.0), rel=0.05)


def test_arrivals_are_poisson_seeded_and_only_scaled_by_their_rate():
    times = poisson(50.0, 400.0, (3, 1))
    assert (np.diff(times) > 0).all()
    assert times[-1] < 400.0
    assert stats.kstest(np.diff(times), "expon", args=(0, 1 / 50)).pvalue > 0.01
    counts = np.histogram(times, bins=400)[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.25)
    assert np.array_equal(times, poisson(50.0, 400.0, (3, 1)))
    np.testing.assert_allclose(poisson(25.0, 40.0, (3, 1))[:300], 2 * times[:300])
    assert not np.array_equal(times, poisson(50.0, 400.0, (4, 1)))


@pytest.mark.parametrize("slo", [0.05, 0.1])
def test_the_knee_is_where_theory_puts_it(slo):
    """M/M/1: the p95 is ln 20 / (mu - lambda), so the SLO is held up to mu - ln 20 / slo."""
    services = np.random.default_rng(3).exponential(1 / MU, 20_000)
    assert knee(services, slo) == pytest.approx(capacity(services) - np.log(20) / slo, rel=0.05)


def test_the_knee_without_an_slo_is_what_the_server_can_do():
    services = np.full(40, 0.02)
    assert knee(services, None) == capacity(services) == pytest.approx(50)
    assert knee(services, 0.019) == 0
    assert knee(services, 0.03) < knee(services, 0.1) < 50
    below, beyond = (poisson(rate, 60.0, (0,)) for rate in (40.0, 55.0))
    times = np.full(40, 0.02)
    assert outcome(below, finished(below, np.full(len(below), 0.02)) - below, times, 40.0).follows
    late = finished(beyond, np.full(len(beyond), 0.02)) - beyond
    result = outcome(beyond, late, times, 55.0)
    assert (result.follows, result.throughput) == (False, pytest.approx(50, rel=0.01))
    slower = finished(below, np.full(len(below), 0.03)) - below
    assert not outcome(below, slower, times, 40.0).follows, "under load it is slower than back to back"
    assert not outcome(below, np.full(len(below) - 30, 0.02), times, 40.0).follows, "some were never served"
    assert outcome(below, [], times, 40.0).throughput == 0


def test_the_longest_queue_is_that_of_theory():
    """M/M/1: an arrival finds n or more in the system with chance rho^n, so with itself they exceed n so often."""
    services = np.random.default_rng(4).exponential(1 / MU, 20_000)
    for load in (0.3, 0.6):
        found = np.mean([longest_queue(services, load * MU, (seed,)) for seed in range(8)])
        assert found == pytest.approx(np.ceil(np.log(1e-3) / np.log(load)), abs=1)
        assert longest_queue(services, load * MU) == pytest.approx(found, abs=2)


def test_arrivals_are_drawn_from_the_named_stream():
    """Philox (Salmon et al. 2011), as every drawn figure, by numpy's own generator."""
    gaps = np.random.Generator(np.random.Philox((3, 1))).standard_exponential(30)
    np.testing.assert_allclose(poisson(50.0, 0.4, (3, 1)), [t for t in gaps.cumsum() / 50 if t < 0.4])


def test_a_healthy_server_at_half_load_is_called_healthy():
    """With ten arrivals it was called unhealthy half of the time."""
    rng, healthy = np.random.default_rng(6), 0
    for turn in range(200):
        services = rng.lognormal(np.log(0.02), 0.2, 40)
        a = np.append(poisson(25.0, 0.4, (turn, 0)), 0.4)
        healthy += outcome(a, finished(a, np.resize(services, len(a))) - a, services, 25.0).follows
    assert healthy >= 197


def test_latency_counts_from_the_intended_arrival():
    """A stall is felt by all who wait behind it, as the recursion says; nothing waits for a late request."""
    arrivals, pauses = [0.0, 0.001, 0.002, 0.3], iter([0.05, 0.01, 0.01, 0.01])
    services = []

    def serve():
        begin = time.perf_counter()
        time.sleep(next(pauses))
        services.append(time.perf_counter() - begin)
        return [begin, begin + services[-1] / 2, begin + services[-1]]

    times = np.asarray(list(serve_arrivals(arrivals, deadline=9.0, serve=serve)))
    due = finished(arrivals, services) - arrivals
    assert times.shape == (4, 2)
    assert (times[:, 1] >= due - 1e-6).all()
    assert (times[:, 1] - times[:, 0] <= np.asarray(services)).all()
    assert times[1, 1] > 0.05 - 0.001 + 0.01 - 1e-6, "its own service took 10 ms, its wait 49"
    served = list(serve_arrivals([0.0, 0.001, 0.002], deadline=0.0, serve=lambda: [time.perf_counter()] * 2))
    assert len(served) < 3, "what is not served by the deadline never is"


def loaded(services, rates=(), slo=None, **changes):
    """A record of servers whose times of service in ms are given; the runs obey the recursion."""
    servers = []
    for turn, ms in enumerate(services):
        runs = []
        for place, rate in enumerate(rates):
            a = poisson(rate, 20.0, (turn, place))
            done = 1e3 * (finished(a, np.resize(ms, len(a)) / 1e3) - a)
            runs.append(
                Arrivals(rate=rate, arrival_s=a.tolist(), first_ms=done.tolist(), done_ms=done.tolist())
            )
        servers.append(Server(service_ms=list(ms), rates=runs))
    facts = {"arm": "S1", "seed": 0, "engine": "torch", "target": "cpu", "seconds": 20.0, "slo_ms": slo}
    sizes = {"prompt_tokens": 64, "new_tokens": 10, "threads": 1, "warmup": 3}
    source = {
        "artifact": "a",
        "config": "c",
        "machine": HOST,
        "versions": {},
        "time": "2026-01-01T00:00:00+00:00",
    }
    return LoadRecord.model_validate(
        {**facts, **sizes, "processes": servers, "provenance": source, **changes}
    )


def test_bounds_are_those_over_processes():
    record = loaded([[20.0] * 50, [25.0] * 50, [22.0] * 50], rates=[20.0, 60.0])
    summary = summarize_load([record], alpha=0.05)
    knees = np.asarray([50.0, 40.0, 1000 / 22])
    half = stats.t.ppf(0.95, 2) * knees.std(ddof=1) / 3**0.5
    assert summary.knee_rps.value == pytest.approx(knees.mean())
    assert (summary.knee_rps.lower, summary.knee_rps.upper) == pytest.approx(
        (knees.mean() - half, knees.mean() + half)
    )
    assert summary.knee_tokens_per_s.value == pytest.approx(10 * knees.mean())
    calm, busy = summary.rates
    assert (calm.rate, calm.follows, busy.follows) == (20.0, 3, 0)
    assert calm.offered_rps.value == pytest.approx(20, rel=0.1)
    own = [np.quantile(server.rates[0].done_ms, 0.95) for server in record.processes]
    assert calm.p95.upper >= np.mean(own) + stats.t.ppf(0.95, 2) * np.std(own, ddof=1) / 3**0.5 - 1e-9
    assert calm.p50.value < calm.p95.value < calm.p99.value
    assert busy.throughput_rps.value == pytest.approx(knees.mean(), rel=0.02)


def test_what_was_never_served_is_no_percentile(tmp_path):
    record = loaded([[20.0] * 50] * 5, rates=[20.0])
    cut = record.processes[0].rates[0]
    short = cut.model_copy(update={"done_ms": cut.done_ms[:-60], "first_ms": cut.first_ms[:-60]})
    server = record.processes[0].model_copy(update={"rates": [short]})
    given = record.model_copy(update={"processes": [server, *record.processes[1:]]})
    rate = summarize_load([given], 0.05).rates[0]
    assert len(cut.done_ms) * 0.1 < 60 < len(cut.done_ms) * 0.4
    assert rate.p50.value is not None
    assert (rate.p95.value, rate.p95.upper) == (None, None)
    assert rate.follows == 4
    study, _ = fake_run(tmp_path, recipes=[])
    plan = plan_from_run(Namespace(study=study, target="cpu", recipe=None), [])
    shown = build_table(replace(plan, variants=plan.variants[:1]), [given])
    cells = {column.header: next(iter(column.cells)) for column in shown.columns}
    assert (cells["variant"], cells["rate/s"], cells["p95 ms"]) == ("plain", "20", "never")
    assert cells["p50 ms"] == f"{rate.p50.value:.4g}\n≤ {rate.p50.upper:.4g}"
    assert (cells["knee/s"], cells["follows"]) == ("50", "4/5")


def test_rates_are_shares_of_the_knee():
    server = Server(service_ms=[20.0] * 30, rates=[])
    assert rates_from_knee("x", server, Load()) == [25.0, 40.0, 47.5, 55.0]
    held = rates_from_knee("x", server, Load(slo_ms=60))
    assert held[3] / held[0] == pytest.approx(2.2, rel=0.01)
    assert held[3] < 55
    with pytest.raises(UserError, match=r"cost\.load\.slo_ms: 10: x takes longer even without a queue"):
        rates_from_knee("x", server, Load(slo_ms=10))


@pytest.mark.slow
def test_a_folder_measured_elsewhere_comes_home(tmp_path):
    """Both commands: a queue of requests to nothing but a model folder, then its record in the run folder."""
    load = {"rates": [500.0], "seconds": 0.4, "slo_ms": 1000.0}
    study, folder = fake_run(tmp_path, recipes=[], cost={**COST, "load": load})
    alone, record, words = tmp_path / "model", tmp_path / "load.jsonl", []
    shutil.copytree(folder / "students/S1/s0", alone)
    for name, value in {**COST, **{f"load.{name}": value for name, value in load.items()}}.items():
        words += [f"--cost.{name}", str(value)]
    done = run("-m", "eval.cost.load", "--target", "cpu", "--variant", alone, "--record", record, *words)
    assert done.returncode == 0, done.stderr
    assert "latency from the intended arrival" in done.stdout
    assert f"1 record(s) in {record}; join: absorb merge" in done.stdout
    merged = run("-m", "eval.cost.merge", "--study", folder, record)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert "records/load/cpu/plain/S1-s0.json (random tokens, seed 0)" in merged.stdout
    (load_record,) = read_loads(folder)
    assert load_record.provenance.artifact == read_manifest(folder / "students/S1/s0").hash
    check_what_was_served(load_record)
    settled = load_study(study)
    wanted = find_variants(settled)[:1]
    assert are_measured(read_loads(settled.folder), settled, "cpu", wanted)
    assert not are_measured(read_loads(settled.folder), settled, "gpu", wanted)
    for words in (["--cost.load.seconds", "3"], ["--cost.load.rates", "[4.0]"], ["--cost.threads", "2"]):
        assert not are_measured(
            read_loads(load_study(study, words).folder), load_study(study, words), "cpu", wanted
        )


def check_what_was_served(record):
    """Every process met its own arrivals, in real time, after requests back to back."""
    assert len(record.processes) == COST["processes"]
    for turn, server in enumerate(record.processes):
        (served,) = server.rates
        assert len(server.service_ms) >= 10
        assert served.arrival_s == poisson(500.0, 0.4, (turn, 0)).tolist()
        assert 0 < len(served.done_ms) <= len(served.arrival_s)
        assert all(0 < first < last for first, last in zip(served.first_ms, served.done_ms, strict=True))


def test_too_few_arrivals_are_refused_before_anything_runs(tmp_path):
    study, _ = fake_run(tmp_path, recipes=[], cost={**COST, "load": {"rates": [400.0, 20.0], "seconds": 1.0}})
    plan = plan_from_run(Namespace(study=study, target="cpu", recipe=None), [])
    with pytest.raises(UserError, match=r"20 requests/s of .*set cost\.load\.seconds to 10 or more"):
        choose_rates(plan)


LIMIT = {"throughput": {"at_least": 400, "unit": "tokens/s"}, "knee": {"at_least": 1.0, "of": "plain"}}


@pytest.fixture
def busy(tmp_path):
    """A run whose budget has limits under load."""
    toy = Run(tmp_path, load={"seconds": 20.0, "rates": [20.0]})
    toy.budget["targets"]["cpu"]["limits"] = LIMIT
    toy.make()
    (toy.folder / "budget.yaml").write_text(yaml.safe_dump(toy.budget))
    return toy


def put_load(toy, recipe, services, **changes):
    place = "students/S1/s0" if recipe == "plain" else f"variants/{recipe}/S1/s0"
    source = toy.provenance(read_manifest(toy.path / place).hash)
    engine = "openvino" if recipe == "int8" else "torch"
    facts = {"recipe": recipe, "engine": engine, "provenance": source, **changes}
    write_record(
        toy.path, loaded([np.tile(ms, int(2e4 / sum(ms)) + 1) for ms in services], rates=[20.0], **facts)
    )


def verdict_of(toy):
    budget = load_budget(toy.study)
    return evaluate_gate(collect_evidence(toy.path, toy.study, budget), budget)


def test_throughput_is_held_from_below(busy):
    rounds = [[20.0] * 30, [20.2] * 30, [20.4] * 30]
    put_load(busy, "plain", rounds)
    put_load(busy, "int8", [[ms / 2 for ms in one] for one in rounds])
    put_load(busy, "half", [[ms * 3 for ms in one] for one in rounds])
    gate = verdict_of(busy)
    parts = {v.recipe: {p.name: p for p in v.parts} for v in gate.variants if v.target == "cpu"}
    assert parts["int8"]["cost:throughput"].verdict == "PASS"
    assert parts["int8"]["cost:throughput"].estimate == pytest.approx(990, rel=0.01)
    assert parts["half"]["cost:throughput"].verdict == "FAIL"
    assert "throughput is at most 167.8 tokens/s, the limit is 400" in parts["half"]["cost:throughput"].reason
    assert parts["int8"]["cost:knee"].estimate == pytest.approx(2)
    assert parts["half"]["cost:knee"].verdict == "FAIL"
    variant = row(gate, "int8")
    assert variant.load.rates[0].p95.unit == "ms"
    assert variant.cost["knee"].relative.of == "plain"
    assert any(path.startswith("records/load/cpu/int8") for path in variant.hashes.records)


def test_a_limit_under_load_that_was_not_measured_decides_nothing(busy):
    put_load(busy, "int8", [[20.0] * 30, [20.2] * 30, [20.4] * 30])
    gate = verdict_of(busy)
    how = f"absorb load --study {busy.path} --target cpu"
    plain, int8 = row(gate, "plain"), row(gate, "int8")
    assert (plain.verdict, plain.how, plain.load) == ("INCONCLUSIVE", how, None)
    assert "throughput was not measured on cpu" in plain.reason
    assert (int8.verdict, int8.how) == ("INCONCLUSIVE", how)
    assert "int8 was measured under load on cpu, plain was not" in int8.reason
    for change in ({"slo_ms": 50.0}, {"seconds": 9.0}):  # a longer limit of latency holds more requests
        put_load(busy, "plain", [[20.0] * 30] * 3, **change)
        ((name, value),) = change.items()
        with pytest.raises(UserError, match=f"{name} is {value}, the study asks"):
            verdict_of(busy)
    put_load(busy, "plain", [[20.0] * 30] * 3, engine="openvino")
    with pytest.raises(UserError, match="measured with engine 'openvino', scored with 'torch'"):
        verdict_of(busy)


def test_a_bound_of_the_knee_holds_the_chance_of_its_arrivals():
    """Rounds have arrivals of their own, which all variants of a round share."""
    same = [np.full(30, 20.0)] * 3
    knees = [estimate_knees([loaded(same, rates=[20.0], slo_ms=60.0)]) for _ in range(2)]
    assert len(set(knees[0])) == 3
    assert knees[0].tolist() == knees[1].tolist()
    assert knees[0].std() / knees[0].mean() < 0.05


def test_a_record_of_load_says_in_which_number_format_was_computed(tmp_path):
    torch_model()(tmp_path)
    engine = load_engine("torch", tmp_path)
    engine.computed_in = "float32"  # as of one that is stored in bfloat16, where that is slower
    order = Order(
        **{"engine": "torch", "folder": str(tmp_path), "device": "cpu", "threads": 1, "prompts": [[1, 2, 3]]},
        **{"warmup": 1, "new_tokens": 2, "batch_sizes": [1]},
        load=OpenLoop(rates=[], seconds=0.01, seed=0),
    )
    assert serve_open_loop(engine, order, lambda: None).computed_in == "float32"
