"""Several methods in one table: the tests that decide, pairs with the first one, the smallest that is as good."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from eval.compare.__main__ import notes
from eval.compare.contrasts import ABSORBED, HARMS, NOT_SEEN, NOT_SHOWN, compare, smallest
from eval.core.budget import load_budget
from eval.core.errors import UserError
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import load_study
from eval.gate.evidence import collect_evidence
from eval.stats.crossed import crossed_mean, linearise
from tests.eval.run_builder import GAINS, Run
from tests.helpers import run as command


def evidence_of(folder, name="toy", **changes):
    built = Run(folder, **changes).make()
    study = load_study(built.path)
    budget = load_budget(study)
    evidence = collect_evidence(built.path, study, budget)
    return replace(evidence, study=study.model_copy(update={"name": name})), budget


NOISE = {"little": 1e-3, "rounding": 1e-7}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """A whole method, a part that does as much, one that does half, one without a gain, and a harmful one."""
    gains = {
        "whole": {},
        "part": {"S1": 0.119},
        "half": {"S1": 0.07},
        "lost": {"S1": 0.03},
        "none": {"T1": 0.0, "S1": 0.03},
        "harm": {"T1": -0.1, "S1": -0.05},
        "little": {"S1": 0.045},
        "rounding": {"T1": 4e-6, "S1": 0.03 + 4e-6},
    }
    return {
        name: evidence_of(
            tmp_path_factory.mktemp(name),
            name,
            gains=GAINS | change,
            noise=NOISE.get(name, 0.002 + 0.0004 * place),
        )
        for place, (name, change) in enumerate(gains.items())
    }


def test_each_study_says_whether_its_gain_was_absorbed(studies):
    rows = compare(list(studies.values()), 0.1)
    assert {row.study: row.result for row in rows} == {
        "whole": ABSORBED,
        "part": ABSORBED,
        "half": ABSORBED,
        "lost": NOT_SHOWN,
        "none": NOT_SEEN,
        "harm": HARMS,
        "little": ABSORBED,
        "rounding": NOT_SEEN,  # as the gate says: float32 scores do not resolve it
    }
    assert rows[0].lead.point == pytest.approx(0.09, abs=0.01)
    assert rows[2].share[1] < 0.04 / 0.12 < rows[2].share[2]
    assert rows[4].share is None


def test_p_is_that_of_both_tests_and_grows_with_the_studies(studies):
    from eval.gate.quality import GAIN, RESOLUTION, kept_gain

    alone, among = compare([studies["half"]], 0.1)[0], compare(list(studies.values()), 0.1)[2]
    evidence = studies["half"][0]
    tables = evidence.gain(VALIDATION, GAIN) - RESOLUTION, evidence.gain(VALIDATION, kept_gain(PLAIN))
    assert alone.p == among.p == alone.holm_p == max(crossed_mean(table).p for table in tables)
    upto = sorted(p for p in (row.p for row in compare(list(studies.values()), 0.1)) if p <= among.p)
    assert among.holm_p == pytest.approx(max(p * (len(studies) - rank) for rank, p in enumerate(upto)))


def test_the_smallest_part_that_keeps_as_much_is_named(studies):
    rows = compare([studies[name] for name in ("whole", "part", "half")], 0.1)
    assert [row.as_good for row in rows] == [None, True, False]
    assert rows[2].behind.low < 0.05 < rows[2].behind.high
    assert smallest(rows) is rows[1]
    assert notes(rows, 0.1, 0.05)[-1].endswith("keeps as much: part")
    assert smallest(compare([studies[name] for name in ("lost", "whole")], 0.1)) is None
    in_between = compare([studies[name] for name in ("whole", "half", "part")], 0.1)
    assert smallest(in_between) is in_between[0], "the first that is not as good ends the search"
    of_little = compare([studies[name] for name in ("little", "lost")], 0.1)
    assert of_little[0].result == ABSORBED
    assert smallest(of_little) is of_little[0], "a part that keeps nothing keeps less, however little that is"


def test_students_are_compared_pair_by_pair_with_two_sided_p_after_holm(studies):
    half, budget = studies["half"]
    copy = replace(half, study=half.study.model_copy(update={"name": "copy"}))
    rows = compare([studies["half"], studies["whole"], studies["part"], (copy, budget)], 0.1)
    first, whole = studies["half"][0], studies["whole"][0]
    columns = first.columns[VALIDATION]
    saved = (first.bits["S1", PLAIN] - whole.bits["S1", PLAIN])[:, columns]
    assert rows[1].over_first.point == pytest.approx(saved.sum() / first.bytes[columns].sum() / len(saved))
    mean = crossed_mean(linearise(saved, first.bytes[columns]))
    raw = 2 * min(mean.p, mean.p_above(0.0))
    assert (rows[1].over_first.low, rows[1].over_first.high) == pytest.approx(mean.bounds(0.05))
    assert rows[1].over_first_p == pytest.approx(2 * raw), "the second of three"
    assert rows[3].over_first.point == 0
    assert rows[3].over_first_p == 1, "a copy is not shown to differ"
    assert rows[0].over_first is None
    lines = notes(rows, 0.1, 0.05)
    assert lines[0].startswith("whole: its S1 is better than that of half: +0.0")
    assert "after Holm over 3" in lines[0]
    assert lines[4].startswith("copy: its S1 is not shown to differ from that of half")
    worse = compare([studies["whole"], studies["half"]], 0.1)
    assert worse[1].over_first.point == pytest.approx(-rows[1].over_first.point)
    assert notes(worse, 0.1, 0.05)[0].startswith("half: its S1 is worse than that of whole: -0.0")


def test_it_is_told_where_ce_was_trained_otherwise(studies):
    evidence, budget = studies["whole"]
    study = evidence.study
    own = study.train.model_copy(update={"epochs": 7})
    other = replace(evidence, study=study.model_copy(update={"ce_train": own, "name": "own"}))
    lines = notes(compare([(evidence, budget), (other, budget)], 0.1), 0.1, 0.05)
    assert lines[0] == "own: CE was trained otherwise than S1: epochs 7 in place of 1"


def test_other_documents_make_no_pair(studies, tmp_path):
    other = evidence_of(tmp_path, seeds=[0, 1, 2])
    rows = compare([studies["whole"], other], 0.1)
    assert rows[1].as_good is None
    assert rows[1].over_first is None
    assert "no pair" in notes(rows, 0.1, 0.05)[0]


def test_another_alpha_is_refused(studies):
    evidence, budget = studies["part"]
    with pytest.raises(UserError, match=r"study part: alpha 0\.01 in its budget, 0\.05 in that of whole"):
        compare([studies["whole"], (evidence, budget.model_copy(update={"alpha": 0.01}))], 0.1)


def test_the_command_shows_a_table_and_writes_it(tmp_path):
    words = []
    for name, change in CHANGES.items():
        words += ["--study", Run(tmp_path / name, gains=GAINS | change, name=name).make().path]
    scores = [path for path in (words[-1] / "records" / "score").iterdir() if path.name != "plain"]
    assert scores
    for path in scores:  # the students are compared as they are: nothing of their variants is needed
        shutil.rmtree(path)
    files = ["--json", tmp_path / "out.json", "--markdown", tmp_path / "out.md"]
    done = command("-m", "eval.compare", *words, *files)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 absorbed" in done.stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["result"] for row in rows] == [ABSORBED, ABSORBED]
    written = (tmp_path / "out.md").read_text()
    assert written.count("\n|") == 3
    for form in (written, done.stdout):
        assert re.search(r"compared on \d{4}-\d\d-\d\d by absorb", form)


CHANGES = {"one": {}, "two": {"S1": 0.08}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one study"),
        (["--row", "less"], "expected a new name"),
        (["--margin", "2"], "a number between 0 and 1"),
        (["--study", "nowhere"], "no such file or folder"),
        (["--study", "SAME"], "give studies of different names, each once"),
        (["--markdown", "."], "is a folder"),
        (["--study", "ARMS"], "arms.less: key: 'data'; accepted: method, student, targets, teacher, train"),
        (["--study", "PACE"], "arms.less.train.epochs: 9, not 1 as in the study"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, words, message):
    whole = Run(tmp_path).make()
    words = [whole.path if word == "SAME" else word for word in words]
    first = [] if words[-1:] in (["ARMS"], ["PACE"]) else ["--study", whole.path]
    for name, arm in {"ARMS": {"data": {"context": 9}}, "PACE": {"train": {"epochs": 9}}}.items():
        (tmp_path / name).write_text(
            yaml.safe_dump(whole.study.model_dump(mode="json") | {"arms": {"less": arm}})
        )
    words = [tmp_path / word if word in ("ARMS", "PACE") else word for word in words]
    done = command("-m", "eval.compare", *first, *words)
    assert done.returncode == 3
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


MADE = ("base", "students/S1", "students/CE")


@pytest.mark.slow
def test_arms_and_rows_are_trained_beside_the_study_and_share_what_is_the_same(tmp_path):
    from tests.helpers import tiny_study

    arms = {"slow": {"train": {"optimizer": {"lr": 0.002}}}}
    raw = yaml.safe_load(tiny_study(tmp_path).read_text()) | {"name": "whole", "arms": arms}
    path = tmp_path / "whole.yaml"
    path.write_text(yaml.safe_dump(raw))
    for words in (["distill/train.py", "--config", path], ["-m", "eval.score", "--study", path]):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    row = "other=--train.optimizer.lr 0.001"
    for _ in range(2):  # the second time nothing is left to do
        done = command("-m", "eval.compare", "--study", path, "--row", row, "--json", tmp_path / "out.json")
        assert done.returncode == 0, done.stderr
    study = load_study(path)
    rows, weights = study.folder.with_name("whole-compare"), "s0/model.safetensors"
    same = {
        name: [top for top in MADE if (rows / name / top / weights).samefile(study.folder / top / weights)]
        for name in ("slow", "other")
    }
    assert same == {"slow": ["base", "students/CE"], "other": ["base"]}, "an arm leaves CE as it is"
    result = json.loads((tmp_path / "out.json").read_text())
    assert [one["study"] for one in result["rows"]] == ["whole", "slow", "other"]
    assert [one["over_first"] is None for one in result["rows"]] == [True, False, False]
    assert any(line.startswith("slow: CE was trained otherwise than S1") for line in result["notes"])
    assert any(line.startswith("slow: its S1 is") for line in result["notes"])
