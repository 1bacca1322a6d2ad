"""The test documents: opened once for one variant, counted, and shown ever after."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from eval.core.artifacts import Key, build_artifact, read_manifest
from eval.core.budget import load_budget
from eval.core.errors import UserError
from eval.core.gate_file import Opening
from eval.core.records import Documents, Score, each_score, read_scores, write_record
from eval.core.study import Study
from eval.gate.decision import evaluate_gate
from eval.gate.evidence import Evidence, collect_evidence
from eval.gate.history import opening_path, read_openings, summarize_openings, write_opening
from eval.gate.test_set import check_teachers, choose_variant, judge_test_set, next_opening
from eval.report import format as report_format
from tests.eval.run_builder import GAINS, Run, copy_run, edit, teacher_hash, tokenizer, torch_model
from tests.helpers import run, text

TEXTS = {f"test-{i}": text("code", 50 + i, words=20 + 5 * (i % 3)) for i in range(12)}
FAR = {f"far-{i}": text("prose", 70 + i, words=20) for i in range(11)}


class OpenedRun(Run):
    """As `Run`, with test documents, teachers that were scored on them, and models that can be loaded."""

    parts: ClassVar = {"test": TEXTS}  # slice of the test documents -> its texts

    @property
    def study(self) -> Study:
        study = super().study
        return study.model_copy(
            update={"data": study.data.model_copy(update={"context": 32}), "workers": 1, "recipes": []}
        )

    def artifact(self, place: str, parents: dict[str, str] | None = None, content: str = "") -> str:
        top, *rest = place.split("/")
        arm, seed = {"base": ["B", *rest], "students": rest}.get(top, ["", "s0"])
        facts = {"arm": arm, "seed": int(seed[1:]), "recipe": "plain", "engine": "torch"} if arm else {}
        given = {"kind": "model", "name": place, "key": Key(place), "parents": parents or {}, "facts": facts}
        with build_artifact(self.path / place, **given) as aside:
            if arm in ("B", "S1", "S0"):
                torch_model(["B", "S1", "S0"].index(arm) + 3 * int(seed[1:]))(aside)
            for part, texts in self.parts.items() if place == "data" else ():
                rows = [{"id": name, "domain": "code", "text": t} for name, t in texts.items()]
                (aside / part).parent.mkdir(exist_ok=True)
                (aside / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (aside / "place").write_text(place)
        return read_manifest(self.path / place).hash

    def test_score(self, arm: str, seed: int, artifact: str) -> None:
        """Bits that need no model: the gains of `GAINS`, with a little noise."""
        texts = {name: t for part in self.parts.values() for name, t in part.items()}
        size = np.array([len(t.encode()) for t in texts.values()])
        noise_rng = np.random.default_rng([seed, *map(ord, arm)])
        value = 3 - self.gains[arm] + noise_rng.normal(0, 0.002) + noise_rng.normal(0, 0.01, len(size))
        documents = Documents(
            id=list(texts),
            slice=[part for part, of in self.parts.items() for _ in of],
            bytes=size.tolist(),
            tokens=[len(tokenizer()(t, add_special_tokens=False)["input_ids"]) for t in texts.values()],
            bits=(value * size).tolist(),
        )
        data = read_manifest(self.path / "data").hash
        given = {"arm": arm, "seed": seed, "engine": "torch", "data": data, "documents": documents}
        write_record(self.path, Score(kind="test", **given, provenance=self.provenance(artifact)))

    def seen(self) -> tuple[Evidence, object]:
        budget = load_budget(self.study)
        return collect_evidence(self.path, self.study, budget), budget


@pytest.fixture(scope="module")
def opened_folder(tmp_path_factory) -> Path:
    run = OpenedRun(tmp_path_factory.mktemp("test"), seeds=[0, 1, 2])
    run.make()
    score_teachers(run)
    return run.folder


@pytest.fixture
def toy(opened_folder, tmp_path) -> OpenedRun:
    return OpenedRun(copy_run(opened_folder, tmp_path).folder, seeds=[0, 1, 2])


def score_teachers(toy: OpenedRun) -> None:
    for arm in ("T0", "T1"):
        for seed in toy.seeds:
            toy.test_score(arm, seed, teacher_hash(arm, seed))


def score_all(toy: OpenedRun) -> None:
    write_opening(toy.path, an_opening(toy))
    for arm, place in {"B": "base", "S1": "students/S1", "S0": "students/S0"}.items():
        for seed in toy.seeds:
            toy.test_score(arm, seed, read_manifest(toy.path / place / f"s{seed}").hash)


def an_opening(toy: OpenedRun, recipe: str = "plain", **given) -> Opening:
    e, budget = toy.seen()
    return next_opening(e, budget, recipe, "cpu", "Ada", given.get("reason"))


def test_the_command_opens_once_and_the_gate_shows_it(toy):
    words = ("-m", "eval.gate.test_set", "--study", str(toy.path), "--by", "Ada Lovelace")
    done = run(*words)
    assert done.returncode in (1, 2), done.stderr  # random models keep nothing
    assert "plain on 12 test documents, opening 1" in done.stdout
    assert {(r.arm, r.seed) for r in each_score(toy.path, "test")} == {
        (arm, seed) for arm in ("B", "T0", "T1", "S1", "S0") for seed in toy.seeds
    }
    assert not [r for r in read_scores(toy.path) if "test" in r.documents.slice]
    again = run(*words)
    assert (again.returncode, again.stderr.count("\n")) == (3, 1)
    assert "opened 1 time(s), last for plain by Ada Lovelace" in again.stderr
    gate = toy.gate()
    assert "test documents, opening 1 by Ada Lovelace for plain: " in gate.stdout
    shown = toy.result().test_set
    assert (shown.openings, shown.by, shown.recipe, shown.current) == (1, "Ada Lovelace", "plain", True)
    assert [part.name for part in shown.parts] == ["assay", "retention", "guard", "fallback"]
    assert shown.verdict == read_openings(toy.path)[0].verdict


def test_the_estimate_is_that_of_the_test_documents(toy):
    score_all(toy)
    e, budget = toy.seen()
    opening = judge_test_set(e, budget, an_opening(toy))
    assert opening.verdict == "PASS"
    assert opening.documents == 12
    assert opening.kept_share.point == pytest.approx((GAINS["S1"] - GAINS["S0"]) / GAINS["T1"], abs=0.1)
    assert opening.teacher_gain.point == pytest.approx(GAINS["T1"], abs=0.02)
    assert opening.guard_share.point == 1.0
    assert " on the test documents" not in evaluate_gate(e, budget).reason
    write_opening(toy.path, opening)
    quoted = f"ship plain: it keeps {opening.kept_share.point:.2f} of the method's gain"
    headline = evaluate_gate(*toy.seen()).reason
    assert quoted in headline
    assert " on the test documents" in headline


def test_the_gate_reads_no_test_score(toy):
    """It judges the same with and without them; only their hashes are listed."""
    before = evaluate_gate(*toy.seen())
    score_all(toy)
    after = evaluate_gate(*toy.seen())
    assert after.variants == before.variants
    assert set(after.provenance.records) - set(before.provenance.records) == {
        "records/test/opening-1.json",
        *(f"records/test/plain/{arm}-s{seed}.json" for arm in ("B", "S1", "S0") for seed in toy.seeds),
    }


def test_another_look_needs_a_reason_and_is_counted(toy):
    first = an_opening(toy)
    assert (first.number, first.reason) == (1, None)
    write_opening(toy.path, first)
    assert an_opening(toy) == first  # cut short before anything was seen: the same opening goes on
    write_opening(toy.path, first.model_copy(update={"verdict": "FAIL"}))
    assert "opening 1 of the test documents ended in FAIL for plain" in " ".join(
        evaluate_gate(*toy.seen()).notes
    )
    with pytest.raises(UserError, match=r"opened 1 time\(s\).*give --reason"):
        an_opening(toy)
    second = an_opening(toy, reason="the export was mended")
    assert (second.number, second.reason) == (2, "the export was mended")
    write_opening(toy.path, second)
    result = evaluate_gate(*toy.seen())
    assert result.test_set.openings == 2
    assert [look.verdict for look in result.test_set.history] == ["FAIL", None]
    assert "only the first look was blind" in " ".join(result.notes)
    opening_path(toy.path, 1).rename(opening_path(toy.path, 3))
    with pytest.raises(UserError, match=r"opening-1\.json: is gone"):
        read_openings(toy.path)


def test_a_look_at_other_artifacts_is_distinguished(toy):
    opening = an_opening(toy)
    e, _ = toy.seen()
    assert summarize_openings([opening], e.artifacts, opening.budget).current
    assert not summarize_openings([opening], e.artifacts | {"S1/s0/plain": "other"}, opening.budget).current
    assert not summarize_openings([opening], e.artifacts, "another budget").current
    assert summarize_openings([], e.artifacts, opening.budget) is None


def test_a_test_set_that_cannot_be_opened_is_reported_before_it_is_spent(toy):
    e, budget = toy.seen()
    with pytest.raises(UserError, match="did you mean 'plain'"):
        choose_variant(evaluate_gate(e, budget), e, "plian")
    none = evaluate_gate(e, budget).model_copy(update={"recommended": {"cpu": None}})
    with pytest.raises(UserError, match="the gate recommends none; name it with --variant"):
        choose_variant(none, e, None)
    (toy.path / "records/test/plain/T1-s2.json").unlink()
    with pytest.raises(UserError, match="teacher T1 of seed 2: not scored on the test documents"):
        check_teachers(e)
    assert not read_openings(toy.path)


def test_a_spoiled_opening_is_one_clear_line(toy):
    edit(write_opening(toy.path, an_opening(toy)), lambda o: o.update(verdict="MAYBE"))
    with pytest.raises(UserError, match=r"opening-1\.json: verdict"):
        read_openings(toy.path)


def test_scores_that_an_opening_left_behind_are_reported(tmp_path):
    place = tmp_path / "records" / "test" / "small"
    place.mkdir(parents=True)
    (place / "T1-s0.json").write_text("{}")  # teachers are scored while they are trained
    assert read_openings(tmp_path) == []
    (place / "S1-s0.json").write_text("{}")
    with pytest.raises(UserError, match="scored without an opening: small"):
        read_openings(tmp_path)
    (place / "S1-s0.json").rename(place.parent / "S1-s0.json")
    (place.parent / "plain").mkdir()
    (place.parent / "S1-s0.json").rename(place.parent / "plain" / "S1-s0.json")
    with pytest.raises(UserError, match="scored without an opening: plain"):
        read_openings(tmp_path)


class ShiftedRun(OpenedRun):
    """The slice `far` has test documents of its own."""

    parts: ClassVar = {"test": TEXTS, "test/far": FAR}


@pytest.mark.slow
def test_shifted_slices_are_judged_on_test_documents_of_their_own(tmp_path):
    toy = ShiftedRun(tmp_path, seeds=[0, 1, 2])
    toy.make()
    score_teachers(toy)
    done = run("-m", "eval.gate.test_set", "--study", str(toy.path), "--by", "Ada")
    assert done.returncode in (1, 2), done.stderr  # random models keep nothing
    assert all(f"{part}: " in done.stdout for part in ("assay", "assay:far", "retention:far"))
    for record in each_score(toy.path, "test"):
        assert record.documents.slice == ["test"] * len(TEXTS) + ["test/far"] * len(FAR)
    shutil.rmtree(toy.path / "records/test")  # other bits now, of models that keep something
    score_teachers(toy)
    score_all(toy)
    e, budget = toy.seen()
    opening = judge_test_set(e, budget, an_opening(toy))
    assert [part.name for part in opening.parts][4:] == ["assay:far", "retention:far"]
    assert (opening.verdict, opening.documents) == ("PASS", len(TEXTS))
    assert opening.slices["far"].point == pytest.approx((GAINS["S1"] - GAINS["S0"]) / GAINS["T1"], abs=0.1)
    write_opening(toy.path, opening)
    gate = evaluate_gate(*toy.seen())
    assert gate.test_set.slices == opening.slices
    assert "; on those of far " in report_format.test_set_line(gate)
