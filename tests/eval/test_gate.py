"""The gate through its command line, on a synthetic run: records and manifests as the other stages write them."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.artifacts import building, file_sha256, read_manifest
from eval.records import Documents, Machine, Measured, Process, Provenance, Score, write_record
from eval.statistics import holm
from eval.study import ROOT, Study
from eval.verdict import GateFile

HOST = Machine(host="box", system="Linux", cpu="some CPU", isa="AVX512", cores=2, device="cpu")
GAINS = {"B": 0.0, "T0": 0.0, "T1": 0.12, "S0": 0.03, "S1": 0.12, "CE": 0.02}  # bits/byte better than B
RECIPES = {"int8": ("openvino", 1.0, 0.6), "half": ("torch", 0.2, 1.0)}  # engine, gain kept, relative decode
DOCUMENTS = {"heldout": 40, "far": 30}
BUDGET = {
    "name": "test",
    "f": 0.5,
    "g": 0.5,
    "slices": {"far": 0.5},
    "targets": {
        "cpu": {
            "device": "cpu",
            "limits": {
                "decode_p50": {"at_most": 1.0, "of": "plain"},
                "peak_memory": {"at_most": 500, "unit": "MiB"},
            },
        },
        "gpu": {"device": "cuda", "required": False},
    },
}


@dataclass
class Run:
    """A run folder in the making; what a test spoils is a field or a file."""

    folder: Path
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    gains: dict[str, float] = field(default_factory=lambda: dict(GAINS))
    budget: dict = field(default_factory=lambda: json.loads(json.dumps(BUDGET)))
    noise: float = 0.002
    far: dict[str, float] = field(default_factory=dict)  # gains that differ on the slice `far`

    @property
    def path(self) -> Path:
        return self.folder / "runs" / "toy"

    @property
    def study(self) -> Study:
        return Study.model_validate(
            {
                "name": "toy",
                "title": "A toy",
                "runs": str(self.folder / "runs"),
                "seeds": self.seeds,
                "data": {"documents": [{"kind": "folder", "path": "stdlib"}]},
                "base": {"path": "somewhere"},
                "method": {"name": "ensemble"},
                "train": {},
                "cost": {"prompt_tokens": 64, "new_tokens": 10, "threads": 1},
                "recipes": [str(self.folder / f"{name}.yaml") for name in RECIPES],
                "budget": str(self.folder / "budget.yaml"),
            }
        )

    def documents(self, arm: str, seed: int, kept: float) -> Documents:
        rng = np.random.default_rng(5)
        names = [name for name, n in DOCUMENTS.items() for _ in range(n)]
        size = rng.integers(200, 4000, len(names))
        hard = rng.normal(2.7, 0.3, len(names))
        luck = np.random.default_rng([seed, *map(ord, arm)])
        gain = np.where(np.array(names) == "far", self.far.get(arm, self.gains[arm]), self.gains[arm])
        value = gain * kept + luck.normal(0, self.noise) + luck.normal(0, self.noise * 4, len(names))
        return Documents(
            id=[f"d{i}" for i in range(len(names))],
            slice=names,
            bytes=size.tolist(),
            tokens=(size // 3).tolist(),
            bits=((hard - value) * size).tolist(),
        )

    def artifact(self, place: str, parents: dict[str, str] | None = None) -> str:
        facts: dict = {}
        with building(
            self.path / place, kind="model", name=place, key=place, parents=parents or {}, facts=facts
        ) as aside:
            (aside / "model.safetensors").write_text(place)
        return read_manifest(self.path / place).hash

    def provenance(self, artifact: str, machine: Machine = HOST) -> Provenance:
        return Provenance(
            artifact=artifact,
            config=self.study.hash(),
            machine=machine,
            versions={"torch": "2.13.0"},
            time="2026-01-01T00:00:00+00:00",
        )

    def score(self, arm: str, seed: int, artifact: str, recipe: str = "plain", kept: float = 1.0) -> Path:
        record = Score(
            arm=arm,
            seed=seed,
            recipe=recipe,
            engine=RECIPES[recipe][0] if recipe in RECIPES else "torch",
            data=read_manifest(self.path / "data").hash,
            documents=self.documents(arm, seed, kept),
            provenance=self.provenance(artifact),
        )
        return write_record(self.path, record)

    def cost(
        self, recipe: str, factor: float, target: str = "cpu", machine: Machine = HOST, disk: float = 2e6
    ) -> Path:
        rng = np.random.default_rng([len(recipe), ord(recipe[0])])
        rounds = 1 + 0.1 * np.random.default_rng(1).random(3)  # slow spells hit every variant of a round
        processes = [
            Process(
                prefill_ms=(5 * slow * rng.normal(1, 0.01, 10)).tolist(),
                decode_ms=(2 * factor * slow * rng.normal(1, 0.01, 100)).tolist(),
                load_s=0.1,
                peak_memory_bytes=int(300e6 * (1 + 0.001 * rng.random())),
            )
            for slow in rounds
        ]
        place = "students/S1/s0" if recipe == "plain" else f"variants/{recipe}/S1/s0"
        record = Measured(
            arm="S1",
            seed=0,
            recipe=recipe,
            engine=RECIPES[recipe][0] if recipe in RECIPES else "torch",
            target=target,
            disk_bytes=int(disk * factor),
            prompt_tokens=64,
            new_tokens=10,
            threads=1,
            processes=processes,
            provenance=self.provenance(read_manifest(self.path / place).hash, machine),
        )
        return write_record(self.path, record)

    def make(self) -> "Run":
        self.path.mkdir(parents=True, exist_ok=True)
        for name in RECIPES:
            (self.folder / f"{name}.yaml").write_text(f"name: {name}\n")
        (self.folder / "budget.yaml").write_text(yaml.safe_dump(self.budget))
        (self.path / "study.yaml").write_text(yaml.safe_dump(self.study.model_dump(mode="json")))
        self.artifact("data")
        for seed in self.seeds:
            for arm in self.gains:
                student = arm in ("S1", "S0", "CE")
                plain = self.artifact(f"students/{arm}/s{seed}") if student else f"teacher {arm} {seed}"
                self.score(arm, seed, plain)
                for recipe, (_, kept, _) in RECIPES.items() if arm in ("S1", "S0") else ():
                    made = self.artifact(f"variants/{recipe}/{arm}/s{seed}", {"student": plain})
                    self.score(arm, seed, made, recipe, kept)
        for recipe, factor in {"plain": 1.0, **{name: of[2] for name, of in RECIPES.items()}}.items():
            self.cost(recipe, factor)
        return self

    def gate(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-W",
                "error::RuntimeWarning",
                "-m",
                "eval.gate",
                "--study",
                str(self.path),
                *words,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def result(self) -> GateFile:
        return GateFile.model_validate_json((self.path / "gate.json").read_text())


@pytest.fixture
def toy(tmp_path: Path) -> Run:
    return Run(tmp_path)


def row(result: GateFile, recipe: str, target: str = "cpu"):
    return next(v for v in result.variants if (v.recipe, v.target) == (recipe, target))


def verdicts(result: GateFile, recipe: str) -> dict[str, str]:
    return {part.name: part.verdict for part in row(result, recipe).parts}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole run; tests that change it take a copy."""
    return Run(tmp_path_factory.mktemp("gate")).make().folder


@pytest.fixture(scope="module")
def passed(
    made: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, subprocess.CompletedProcess[str]]:
    run = copied(made, tmp_path_factory.mktemp("passed"))
    return run, run.gate()


def copied(made: Path, folder: Path) -> Run:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return Run(folder)


def test_pass(passed):
    run, done = passed
    assert (done.returncode, done.stderr) == (0, "")
    result = run.result()
    assert result.verdict == "PASS"
    assert result.recommended == {"cpu": "int8", "gpu": None}
    assert row(result, "int8").verdict == "PASS"
    assert row(result, "half").verdict == "FAIL"
    found = verdicts(result, "half")
    assert (found["assay"], found["retention"], found["guard"]) == ("PASS", "FAIL", "FAIL")
    assert (found["slice:far"], found["cost:decode_p50"]) == ("FAIL", "PASS")
    assert "int8 * on cpu: PASS" in done.stdout
    assert "PASS: on cpu ship int8: it keeps 0.7" in done.stdout


def test_numbers(passed):
    result = passed[0].result()
    share = result.kept_by_student.over_control
    assert share.point == pytest.approx((0.12 - 0.03) / 0.12, abs=0.05)
    assert share.low < share.point < share.high
    assert share.bootstrap_low == pytest.approx(share.low, abs=0.1)
    assert result.kept_by_student.over_ce.point == pytest.approx(0.10 / 0.12, abs=0.05)
    assert result.kept_by_student.over_base.point == pytest.approx(1.0, abs=0.05)
    assert result.teacher_gain.point == pytest.approx(0.12, abs=0.01)
    plain, int8 = row(result, "plain"), row(result, "int8")
    assert (plain.kept_of_student.point, plain.guard_share.point) == (1.0, 1.0)
    assert int8.cost["decode_p50"].relative.point == pytest.approx(0.6, rel=0.02)
    assert int8.cost["decode_p50"].relative.upper < 0.65  # slow rounds cancel
    assert int8.cost["decode_p50"].upper >= int8.cost["decode_p50"].value
    assert int8.cost["prefill_p99"].value is None
    assert int8.cost["prefill_p99"].needs == 299
    assert result.power.power_now > 0.9
    scored = result.scores["S1"]["heldout"]
    assert scored.low < scored.point < scored.high


def test_scores_and_hashes_are_those_of_the_records(passed):
    run, _ = passed
    result = run.result()
    totals = []
    for seed in run.seeds:
        record = json.loads((run.path / f"records/score/int8/S1-s{seed}.json").read_text())
        documents = record["documents"]
        kept = [i for i, name in enumerate(documents["slice"]) if name == "far"]
        totals.append(sum(documents["bits"][i] for i in kept) / sum(documents["bytes"][i] for i in kept))
        assert row(result, "int8").hashes.artifact[str(seed)] == record["provenance"]["artifact"]
    assert row(result, "int8").scores["far"].point == pytest.approx(np.mean(totals))
    assert result.provenance.config == run.study.hash()
    for path, found in result.provenance.records.items():
        assert file_sha256(run.path / path) == found


def test_same_records_same_bytes(passed):
    run, _ = passed
    first = (run.path / "gate.json").read_bytes()
    run.gate()
    assert (run.path / "gate.json").read_bytes() == first


def test_unmeasured_target_says_how(passed):
    run, done = passed
    found = row(run.result(), "plain", "gpu")
    assert (found.measured, found.verdict) == (False, "INCONCLUSIVE")
    assert found.how == f"python -m eval.cost --study {run.path} --target gpu"
    assert found.how in done.stdout
    assert not [v for v in run.result().variants if (v.recipe, v.target) == ("int8", "gpu")]


def test_required_target_without_costs_is_inconclusive(toy: Run):
    toy.budget["targets"]["gpu"]["required"] = True
    done = toy.make().gate()
    assert done.returncode == 2
    assert "its cost was not measured on gpu" in done.stdout


def test_costs_of_an_accelerator_count(toy: Run):
    toy.make()
    gpu = HOST.model_copy(update={"host": "other", "device": "Some GPU"})
    toy.cost("plain", 1.0, "gpu", gpu)
    toy.cost("half", 0.5, "gpu", gpu)
    toy.gate()
    found = row(toy.result(), "half", "gpu")
    assert found.measured
    assert found.cost["decode_p50"].relative.of == "plain"
    assert toy.result().recommended["gpu"] == "plain"


def test_fail(toy: Run):
    toy.gains |= {"S1": 0.035}
    done = toy.make().gate()
    assert done.returncode == 1
    assert toy.result().verdict == "FAIL"
    assert "less than 0.5 of the teacher's gain is kept on heldout" in done.stdout


def test_fail_by_cost(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {"decode_p50": {"at_most": 0.5, "unit": "ms"}}
    done = toy.make().gate()
    assert done.returncode == 1
    assert "decode_p50 is at least" in done.stdout


def test_no_teacher_gain_is_inconclusive_whatever_else_fails(toy: Run):
    toy.gains |= {"T1": 0.0, "S1": -0.05}
    done = toy.make().gate()
    assert done.returncode == 2
    assert "cannot see the gain" in done.stdout
    assert verdicts(toy.result(), "int8")["retention"] == "FAIL"


def test_a_slice_without_a_teacher_gain_cannot_pass(toy: Run):
    toy.far = {"T1": 0.0}
    done = toy.make().gate()
    assert done.returncode == 2
    assert "no teacher gain is visible on far" in done.stdout
    assert row(toy.result(), "int8").slices["far"].kept_share.point is None


def test_a_gain_that_rounding_could_make_is_inconclusive(toy: Run):
    toy.noise = 1e-9
    toy.gains = {name: gain * 1e-6 for name, gain in GAINS.items()}
    assert toy.make().gate().returncode == 2
    assert verdicts(toy.result(), "int8")["assay"] == "INCONCLUSIVE"
    assert verdicts(toy.result(), "int8")["retention"] == "PASS"


def test_placebo_without_any_difference_is_inconclusive(toy: Run):
    toy.noise = 0.0
    toy.gains = dict.fromkeys(GAINS, 0.0)
    done = toy.make().gate()
    assert done.returncode == 2
    assert "do not vary at all" in done.stdout
    assert toy.result().kept_by_student.over_control.point is None


def test_one_seed_is_inconclusive(toy: Run):
    toy.seeds = [0]
    done = toy.make().gate()
    assert done.returncode == 2
    assert "one seed says nothing about other seeds" in done.stdout
    assert toy.result().teacher_gain.low is None
    assert toy.result().power is None


def test_a_student_worse_than_its_fallback_never_passes(toy: Run):
    toy.gains |= {"S1": -0.05, "S0": -0.14}
    assert toy.make().gate().returncode == 1
    found = verdicts(toy.result(), "int8")
    assert (found["retention"], found["fallback"]) == ("PASS", "FAIL")


def test_a_variant_slower_than_its_parent_is_not_recommended(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {"disk": {"at_most": 2, "unit": "MiB"}}
    toy.make()
    toy.cost("plain", 0.3, disk=1e8)
    done = toy.gate()
    result = toy.result()
    assert (row(result, "plain").verdict, row(result, "int8").verdict) == ("FAIL", "PASS")
    assert (row(result, "plain").holm_p, row(result, "int8").holm_p) == (None, row(result, "int8").p)
    assert result.recommended["cpu"] is None
    assert "slower than the plain student" in done.stdout


@pytest.mark.parametrize("limit", [1.25, 1.27])
def test_limits_are_held_against_bounds(toy: Run, limit: float):
    """The estimate is just above or below the limit; three processes do not show where the truth is."""
    toy.budget["targets"]["cpu"]["limits"] = {"decode_p50": {"at_most": limit, "unit": "ms"}}
    assert toy.make().gate().returncode == 2
    found = {name: row(toy.result(), name).parts[-1] for name in ("plain", "int8")}
    assert (found["int8"].estimate < limit) == (limit == 1.27)
    assert found["int8"].low < limit < found["int8"].high
    assert (found["int8"].verdict, found["plain"].verdict) == ("INCONCLUSIVE", "FAIL")


def test_too_few_requests_are_no_percentile(toy: Run):
    toy.budget["targets"]["cpu"]["limits"] = {"prefill_p99": {"at_most": 50, "unit": "ms"}}
    done = toy.make().gate()
    assert done.returncode == 2
    assert "30 requests; prefill_p99 needs 299 at least" in done.stdout


def test_documents_in_another_order_are_the_same_documents(passed, made: Path, tmp_path: Path):
    run = copied(made, tmp_path)
    change_score(lambda r: r.update(documents={n: c[::-1] for n, c in r["documents"].items()}))(run)
    run.gate()
    assert row(run.result(), "plain").kept_share == row(passed[0].result(), "plain").kept_share


def test_records_of_recipes_that_the_study_no_longer_names_are_left_alone(passed, made: Path, tmp_path: Path):
    run = copied(made, tmp_path)
    shutil.copytree(run.path / "records/score/half", run.path / "records/score/old")
    for path in (run.path / "records/score/old").iterdir():
        edit(path, lambda r: r.update(recipe="old", data="f" * 64))
    assert run.gate().returncode == 0
    assert run.result().variants[0] == passed[0].result().variants[0]


def test_picking_among_many_is_corrected(toy: Run):
    """Just significant alone, but not as one of three that could have been picked."""
    toy.seeds, toy.noise = [0, 1, 2], 0.006
    toy.gains |= {"S1": 0.14}
    toy.budget |= {"slices": {}}
    toy.budget["targets"]["cpu"]["limits"] = {}
    done = toy.make().gate()
    assert done.returncode == 2
    result = toy.result()
    rows = [v for v in result.variants if v.target == "cpu"]
    assert [v.holm_p for v in rows] == pytest.approx(holm([v.p for v in rows]))
    assert (row(result, "int8").verdict, result.recommended["cpu"]) == ("PASS", None)
    assert "passes alone, but not after the correction" in result.reason


def edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_cost(change):
    return lambda run: edit(run.path / "records/cost/cpu/int8/S1-s0.json", change)


def change_score(change, name: str = "plain/S1-s1"):
    return lambda run: edit(run.path / f"records/score/{name}.json", change)


def change_budget(change):
    def spoil(run: Run) -> None:
        change(run.budget)
        (run.folder / "budget.yaml").write_text(yaml.safe_dump(run.budget))

    return spoil


def copied_student(run: Run) -> None:
    same = read_manifest(run.path / "students/S1/s0")
    (run.path / "students/S1/s1/manifest.json").write_text(same.model_dump_json())
    change_score(lambda r: r["provenance"].update(artifact=same.hash))(run)


def one_more(record: dict) -> None:
    added = {"id": "new", "slice": "far", "bytes": 9, "tokens": 3, "bits": 20.0}
    for name, column in record["documents"].items():
        column.append(added[name])


BAD = {
    "no records": (lambda run: shutil.rmtree(run.path / "records"), ["no score record", "eval.score"]),
    "seed missing": (
        lambda run: (run.path / "records/score/int8/S0-s2.json").unlink(),
        ["S0", "int8", "seeds [2] are missing", "[0, 1, 2, 3]"],
    ),
    "other data": (change_score(lambda r: r.update(data="f" * 64)), ["S1-s1.json", "ffffffffffff", "holds"]),
    "other study": (
        change_score(lambda r: r["provenance"].update(config="e" * 64)),
        ["S1-s1.json", "eeeeeeeeeeee", "this study's is"],
    ),
    "other artifact": (
        change_score(lambda r: r["provenance"].update(artifact="a" * 64), "int8/S0-s1"),
        ["S0-s1.json", "aaaaaaaaaaaa", "holds"],
    ),
    "no artifact": (
        lambda run: (run.path / "variants/int8/S1/s1/manifest.json").unlink(),
        ["variants/int8/S1/s1", "no manifest.json"],
    ),
    "seeds are copies": (copied_student, ["seeds 0 and 1", "same artifact"]),
    "other document": (
        change_score(lambda r: r["documents"]["id"].__setitem__(3, "zzz")),
        ["'d3'", "is missing", "S1-s1.json"],
    ),
    "other bytes": (change_score(lambda r: r["documents"]["bytes"].__setitem__(3, 7)), ["'d3'", "7 bytes"]),
    "one document more": (
        change_score(one_more),
        ["71 documents", "70"],
    ),
    "not a number": (
        change_score(lambda r: r["documents"]["bits"].__setitem__(0, float("nan"))),
        ["'d0'", "nan"],
    ),
    "misplaced record": (
        lambda run: (run.path / "records/score/int8/S0-s2.json").rename(
            run.path / "records/score/half/S0-s9.json"
        ),
        ["half/S0-s9.json", "its path and its content"],
    ),
    "unknown slice": (
        change_budget(lambda b: b.update(slices={"fra": 0.5})),
        ["'fra'", "did you mean 'far'"],
    ),
    "unknown variant": (
        change_budget(lambda b: b["targets"]["cpu"].update(limits={"disk": {"at_most": 1, "of": "int9"}})),
        ["'int9'", "did you mean 'int8'"],
    ),
    "unknown target": (
        change_budget(lambda b: b["targets"].update(cpux=b["targets"].pop("cpu"))),
        ["'cpux'", "did you mean 'cpu'"],
    ),
    "nothing required": (
        change_budget(lambda b: b["targets"]["cpu"].update(required=False)),
        ["no required target"],
    ),
    "unknown key": (change_budget(lambda b: b.update(alhpa=0.1)), ["alhpa", "did you mean 'alpha'"]),
    "other machine": (
        change_cost(lambda r: r["provenance"]["machine"].update(host="elsewhere")),
        ["int8 has host ['elsewhere']", "plain has ['box']"],
    ),
    "other threads": (change_cost(lambda r: r.update(threads=8)), ["'threads': 8", "'threads': 1"]),
    "fewer processes": (change_cost(lambda r: r["processes"].pop()), ["processes [2]", "[3]"]),
    "other rounds": (
        change_cost(lambda r: r["provenance"].update(time="2026-01-02T00:00:00+00:00")),
        ["rounds of ['2026-01-02", "measure both in one run"],
    ),
    "other engine": (change_cost(lambda r: r.update(engine="torch")), ["'torch'", "'openvino'"]),
    "other device": (
        change_cost(lambda r: r["provenance"]["machine"].update(device="Some GPU")),
        ["'Some GPU'", "'cpu'"],
    ),
    "reference not measured": (
        lambda run: (run.path / "records/cost/cpu/plain/S1-s0.json").unlink(),
        ["int8 was measured, plain was not", "eval.cost"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line(made: Path, tmp_path: Path, name: str):
    run = copied(made, tmp_path)
    spoil, words = BAD[name]
    spoil(run)
    done = run.gate("--budget", str(tmp_path / "budget.yaml"))
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (run.path / "gate.json").exists()
