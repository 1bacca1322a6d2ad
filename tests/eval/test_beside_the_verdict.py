"""What stands beside a verdict: pairs of variants, the teacher and the fallback, seeds, what would make it pass."""

from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy.stats import t

from eval.core.artifacts import Key, build_artifact, digest, read_manifest
from eval.core.budget import Limit
from eval.core.checks import Artifacts, measured_bytes, measured_hash
from eval.core.gate_file import Number
from eval.core.plan import read_plan
from eval.core.records import CostRecord, write_record
from eval.core.study import Study, load_study
from eval.cost.plan import find_teacher
from eval.gate.decision import judge
from eval.gate.evidence import weight_shares
from eval.gate.limits import remedy
from eval.gate.quality import mean_part
from eval.report.markdown import render_markdown
from eval.stats.crossed import crossed_mean
from eval.stats.power import components, power
from tests.eval.run_builder import Run, copy_run, edit, row


def put_teacher(run: Run, seed: int = 0) -> None:
    """What `distill` leaves of a teacher of two bases that runs in three times the time of `plain`."""
    bases = {f"base-s{s}": read_manifest(run.path / f"base/s{s}").hash for s in (0, 1)}
    facts = {"arm": "T1", "seed": seed, "recipe": "plain", "engine": "distill.teachers.engine", "room": 256}
    folder = run.path / f"method/T1/s{seed}"
    parents = {**bases, "data": read_manifest(run.path / "data").hash}
    with build_artifact(
        folder, kind="method", name="method", key=Key("m"), parents=parents, facts=facts
    ) as aside:
        (aside / "fitted").write_text("x" * 100)


def measure_beside(run: Run, arm: str, factor: float) -> None:
    """A cost record of the teacher or the fallback, in the rounds of the variants."""
    record = CostRecord.model_validate_json((run.path / "records/cost/cpu/plain/S1-s0.json").read_text())
    folder = run.path / ("base/s0" if arm == "B" else "method/T1/s0")
    manifest = read_manifest(folder)
    processes = [
        process.model_copy(update={"decode_ms": [factor * ms for ms in process.decode_ms]})
        for process in record.processes
    ]
    changes = {
        "arm": arm,
        "processes": processes,
        "disk_bytes": measured_bytes(run.path, manifest),
        "provenance": record.provenance.model_copy(update={"artifact": measured_hash(manifest)}),
    }
    write_record(run.path, record.model_copy(update=changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("beside")).make()
    put_teacher(run)
    measure_beside(run, "B", 1.0)
    measure_beside(run, "T1", 3.0)
    return run


@pytest.fixture(scope="module")
def gate(made):
    return judge(made.path)


def test_the_teacher_and_the_fallback_stand_beside_the_variants_with_what_the_pick_saves(made, gate):
    teacher, fallback = gate.references
    assert (teacher.arm, fallback.arm) == ("T1", "B")
    assert teacher.cost["decode_p50"].relative.point == pytest.approx(3.0)
    bytes_of_all = sum(read_manifest(made.path / f"base/s{s}").bytes for s in (0, 1)) + 100
    assert teacher.cost["disk"].value == pytest.approx(bytes_of_all / 2**20)
    assert gate.recommended["cpu"] == "int8"
    pick = row(gate, "int8").cost["decode_p50"].relative
    saved = teacher.pick["decode_p50"]
    assert (saved.point, saved.of) == (pytest.approx(pick.point / 3), "T1")
    assert saved.lower < saved.point < saved.upper
    assert fallback.pick["decode_p50"].point == pytest.approx(pick.point)


def test_a_teacher_of_other_bases_than_those_measured_is_not_measured_yet(made, tmp_path):
    run = copy_run(made.folder, tmp_path)
    edit(run.path / "method/T1/s0/manifest.json", lambda m: m["parents"].update({"base-s0": "0" * 64}))
    teacher, fallback = judge(run.path).references
    assert teacher.cost is None
    assert teacher.how.startswith("absorb cost --study")
    assert fallback.cost is not None
    edit(run.path / "method/T1/s0/manifest.json", lambda m: m["facts"].pop("engine"))
    assert judge(run.path).references[0].how is None, "one that is asked elsewhere has no command"


def test_the_teacher_is_measured_where_it_has_room_for_a_request(made, tmp_path, capsys):
    run = copy_run(made.folder, tmp_path)
    study = load_study(run.path)
    (teacher,) = find_teacher(study)
    assert (teacher.name, teacher.label) == ("teacher", "plain/T1-s0")
    assert teacher.bytes == sum(read_manifest(run.path / f"base/s{s}").bytes for s in (0, 1)) + 100
    edit(run.path / "method/T1/s0/manifest.json", lambda m: m["facts"].update(room=73))
    assert find_teacher(study) == []
    assert "a request has 74 tokens, it has room for 73" in capsys.readouterr().out


def test_variants_are_compared_on_the_same_seeds_documents_and_rounds(made, tmp_path):
    run = copy_run(made.folder, tmp_path)
    for seed in run.seeds:  # without it, no document differs from another by more than the recipe does
        more = 1.001 + 0.0005 * seed
        change = lambda r, more=more: r["documents"].update(bits=[more * b for b in r["documents"]["bits"]])  # noqa: E731
        edit(run.path / f"records/score/half/S1-s{seed}.json", change)
    gate = judge(run.path)
    pairs = {(one.recipe, one.over): one for one in gate.comparisons}
    assert set(pairs) == {("int8", "plain"), ("half", "plain"), ("half", "int8")}
    half = pairs["half", "int8"]
    scores = {name: row(gate, name).scores["validation"] for name in ("half", "int8")}
    assert half.lead.point == pytest.approx(scores["int8"].point - scores["half"].point)
    assert half.lead.high < 0, "it is worse beyond doubt"
    times = {name: row(gate, name).cost["decode_p50"].relative.point for name in ("half", "int8")}
    assert half.decode["cpu"].point == pytest.approx(times["half"] / times["int8"])
    width = half.lead.high - half.lead.low
    assert width < scores["half"].high - scores["half"].low, "what both share cancels"


def test_the_values_of_the_seeds_have_the_mean_that_is_told(gate):
    every = [gate.teacher_gain, *(scores["validation"] for scores in gate.scores.values())]
    every += [v.scores["far"] for v in gate.variants]
    for value in every:
        assert len(value.by_seed) == len(gate.seeds)
        assert np.mean(value.by_seed) == pytest.approx(value.point)
    share = row(gate, "int8").kept_share
    kept = [a - b for a, b in zip(gate.scores["S0"]["validation"].by_seed, [0] * 4, strict=True)]
    assert len(share.by_seed) == len(kept) == 4
    assert min(share.by_seed) <= share.point <= max(share.by_seed)


def test_what_would_make_a_part_pass_is_the_plan_of_its_power():
    rng = np.random.default_rng(5)
    z = 0.02 + 0.02 * rng.normal(size=(3, 1)) + 0.02 * rng.normal(size=(3, 30))
    z += 0.015 - z.mean()
    part = mean_part("retention", z, 0.05, "kept", "not kept")
    assert part.verdict == "INCONCLUSIVE"
    seeds = int(part.remedy.split()[1])
    parts, effect = components(z), crossed_mean(z).point
    assert power(parts, effect, seeds, 30, 0.05) >= 0.8 > power(parts, effect, seeds - 1, 30, 0.05)
    assert "now 3 seeds and 30 clusters" in part.remedy
    assert mean_part("retention", z + 1, 0.05, "kept", "not kept").remedy is None
    worse = mean_part("retention", z - 1, 0.05, "kept", "not kept")
    assert worse.verdict == "FAIL"
    assert "bits/byte more than was seen" in worse.remedy


def test_what_would_bring_a_cost_within_its_limit_is_told(made):
    def remedies(limit: dict) -> str:
        budget = {**made.budget, "targets": {"cpu": {"device": "cpu", "limits": {"decode_p50": limit}}}}
        path = made.folder / "other.yaml"
        path.write_text(yaml.safe_dump(budget))
        part = row(judge(made.path, str(path)), "plain").parts[-1]
        return f"{part.verdict}: {part.remedy}"

    assert remedies({"at_most": 1.0, "unit": "ms"}) == "FAIL: lower by 52 %"
    assert remedies({"at_most": 9.0, "unit": "ms"}) == "PASS: None"
    assert remedies({"at_most": 2.15, "unit": "ms"}).startswith("INCONCLUSIVE: about ")
    assert remedies({"at_most": 2.15, "unit": "ms"}).endswith(" processes, now 3")


def test_processes_are_asked_for_at_the_level_of_the_budget():
    """The least n whose bound, t(1 - alpha, n - 1) / sqrt(n) wide, is within the limit."""
    timed = {"unit": "ms", "requests": 30, "processes": 3}
    number = Number(value=2.0, lower=1.8, upper=2.2, **timed)
    limit = Limit(at_most=2.1, unit="ms")

    def width(n: int, alpha: float) -> float:
        return float(t.ppf(1 - alpha, n - 1)) / n**0.5

    for alpha, wanted in ((0.05, 6), (0.001, 4)):
        assert next(n for n in range(3, 99) if width(n, alpha) <= width(3, alpha) / 2) == wanted
        assert remedy(number, 2.0, 2.2, limit, alpha) == f"about {wanted} processes, now 3"


def test_a_rival_that_its_own_training_made_worse_is_no_rival(tmp_path):
    gains = {"B": 0.0, "T0": 0.0, "T1": 0.12, "S0": 0.03, "S1": 0.12, "CE": -0.05}
    run = Run(tmp_path, gains=gains, recipes={"int8": ("openvino", 1.0, 0.6)})
    run.budget["over_ce"] = 0.1
    run.make()
    result = judge(run.path)
    assert result.rivals[0].spoiled
    assert any("(CE) ended worse than the base" in note and "ce_train" in note for note in result.notes)
    part = next(part for part in row(result, "int8").parts if part.name == "over_ce")
    assert (part.verdict, part.remedy) == ("INCONCLUSIVE", "a CE arm at its own best rate (ce_train)")
    assert result.verdict == "INCONCLUSIVE"


def test_a_rival_that_was_trained_otherwise_is_named_so_wherever_it_is_named(tmp_path):
    class AtItsOwnRate(Run):
        @property
        def study(self):
            raw = super().study.model_dump(mode="json") | {"ce_train": {"optimizer": {"lr": 0.01}}}
            return Study.model_validate(raw)

    gains = {"B": 0.0, "T0": 0.0, "T1": 0.12, "S0": 0.03, "S1": 0.12, "CE": 0.2}
    run = AtItsOwnRate(tmp_path, gains=gains, recipes={"int8": ("openvino", 1.0, 0.6)})
    run.budget["over_ce"] = 0.1
    result = judge(run.make().path)
    how = "optimizer.lr 0.01 in place of 0.001"
    assert f"CE was trained otherwise than S1, as ce_train says: {how}" in result.notes
    assert result.rivals[0].what == f"plain training on the same rows ({how})"
    assert f"({how}) is better by" in result.reason
    part = next(part for part in row(result, "int8").parts if part.name == "over_ce")
    assert how in part.reason
    assert how in render_markdown(result)


def test_a_teacher_that_is_one_plain_model_is_a_rival_where_the_study_names_it(tmp_path):
    """Such as the mean of an ensemble's weights, which can be served as it is."""

    class WithRival(Run):
        @property
        def study(self):
            return super().study.model_copy(update={"rivals": {"T0": "the mean of the weights"}})

    gains = {"B": 0.0, "T0": 0.1, "T1": 0.2, "S0": 0.02, "S1": 0.09, "CE": 0.01}
    far = {"CE": -0.03, "T0": 0.1}
    run = WithRival(tmp_path, gains=gains, recipes={"int8": ("openvino", 1.0, 0.6)}, far=far).make()
    plain = Run(tmp_path / "plain", gains=gains, recipes={"int8": ("openvino", 1.0, 0.6)}).make()
    assert run.study.hash() == plain.study.model_copy(update={"runs": run.study.runs}).hash()
    result = judge(run.path)
    assert [rival.arm for rival in judge(plain.path).rivals] == ["CE"]
    assert [(rival.arm, rival.beats, rival.spoiled) for rival in result.rivals] == [
        ("CE", False, False),
        ("T0", True, False),
    ]
    assert result.rivals[1].lead.point == pytest.approx(0.01, abs=0.005)
    assert {arm: list(slices) for arm, slices in result.below_base.items()} == {"CE": ["far"]}
    harm = result.below_base["CE"]["far"]
    assert harm.point == pytest.approx(0.03, abs=0.005)
    assert 0 < harm.low < harm.point < harm.high
    assert any(
        "CE ended worse than the base by 0.03" in n and "on far: there a lead" in n for n in result.notes
    )
    assert "absorbed, and not worth it: the mean of the weights is better by 0.0" in result.reason


def test_variants_of_another_recipe_than_the_fixed_one_are_told(made, tmp_path):
    run, fixed = copy_run(made.folder, tmp_path), read_plan(made.path)
    assert fixed is not None
    for kind, told in ((fixed.recipes["int8"], False), (fixed.recipes["half"], True)):
        for place in sorted((run.path / "variants/int8").glob("*/*/manifest.json")):
            facts = {"recipe_file": digest(kind.model_dump(mode="json"))}
            edit(place, lambda m, facts=facts: m["facts"].update(facts))
        changes = judge(run.path).fixed.changes
        assert ("the variants int8 were built by another recipe" in changes) == told


def test_a_table_says_when_and_by_what_it_was_judged(gate):
    assert gate.provenance.tool.startswith("absorb")
    assert gate.provenance.times == {name: ["2026-01-01T00:00:00+00:00"] * 2 for name in ("scores", "cpu")}


def test_shares_of_weights_are_read_from_the_reports_of_the_passes(tmp_path):
    def reports(reached):
        size = {"parameters": 100, "nonzeros": 80, "low_bit": 50}
        return [{"named": 60, "reached": reached, "after": size}, {"named": 0, "reached": 0, "after": size}]

    for seed, reached in enumerate((60, 57)):
        folder = tmp_path / "variants" / "chain" / "S1" / f"s{seed}"
        facts = {"reports": reports(reached)}
        with build_artifact(folder, kind="variant", name="v", key=Key("k"), parents={}, facts=facts):
            pass
    artifacts = Artifacts(tmp_path, SimpleNamespace(seeds=[0, 1]))
    shares = weight_shares(artifacts, ["plain", "chain"])["chain"]
    assert shares == pytest.approx({"zeros": 0.2, "low_bit": 0.5, "reached": 0.95}), "the least of all"
