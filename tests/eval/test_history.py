"""A release at every look: one history, bounds that hold at all times, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from scipy import stats

from eval.core.errors import UserError
from eval.core.records import each_score, write_record
from eval.release.contract_file import read_contract
from eval.stats.drift import QUESTIONS, drifts_so_far, effect_bounds, superiority
from eval.watch.history import (
    Look,
    Seen,
    check_history,
    check_new,
    lock_history,
    previous_hash,
    read_history,
    series_of,
    write_history,
)
from eval.watch.measure import before_release, by_group
from eval.watch.regression import diagnosis, findings, verdict
from eval.watch.sequences import findings_so_far, hardest_since, look_count
from eval.watch.verify import checked
from tests.eval import real_run
from tests.eval.test_recheck import gain, models
from tests.helpers import run as command
from tests.helpers import text

ALPHA = 0.05


def look(looks, n=40, groups=None, domain="", **changes):
    """The next look at a release, n documents of models that differ as `models` says."""
    bits = models(n, seed=100 + len(looks) + changes.pop("seed", 0), **changes)
    names = [f"{len(looks)}-{i}" for i in range(n)]
    seen = Seen(
        id=names,
        domain=[domain] * n,
        group=groups or names,
        bytes=[int(size) for size in bits.bytes],
        tokens=[max(int(size) // 4, 1) for size in bits.bytes],
        unigram=[8.0 + 0.01 * i for i in range(n)],
        release=bits.release.tolist(),
        control=bits.control.tolist(),
        fallback=bits.fallback.tolist(),
    )
    given = {"number": len(looks) + 1, "previous": previous_hash(looks), "release": "r" * 64, "contract": "c"}
    days = {"time": f"2026-01-{len(looks) + 1:02d}T00:00:00+00:00", "target": "cpu", "slice": "validation"}
    return Look(**given, **days, tuned=160.0, seen=seen, state="", reason="")


def history(count, **changes):
    looks: list[Look] = []
    for _ in range(count):
        looks.append(look(looks, **changes))
    return looks


def first_broken(seed, count, noise, **changes):
    """The look at which a release is first called broken, infinite where never."""
    looks: list[Look] = []
    for number in range(1, count + 1):
        looks.append(look(looks, seed=1000 * seed, noise=noise, **changes))
        found = findings_so_far(gain(0.1, 0.1), models(100), series_of(looks), ALPHA)
        if verdict(found) == "FAIL":
            return number
    return np.inf


@pytest.mark.slow
def test_a_good_release_is_not_called_broken_over_many_looks_and_a_broken_one_is_found():
    """One and two standard errors of a look's 40 documents above and below the floor over the control."""
    noise = 0.1
    error = noise * (np.exp(0) / 40**0.5)
    good = [first_broken(s, 12, noise, over_control=0.1 + error, over_fallback=0.3) for s in range(10)]
    assert good.count(np.inf) >= 9
    broken = [first_broken(s, 9, noise, over_control=0.1 - 2 * error, over_fallback=0.3) for s in range(10)]
    assert np.median(broken) <= 6


def test_a_release_that_fades_is_found_although_its_mean_still_holds():
    looks = history(12, over_control=0.3)
    for _ in range(2):
        looks.append(look(looks, over_control=-0.1))
    found = findings_so_far(gain(), models(200), series_of(looks), ALPHA)
    saved = next(f for f in found if f.name == "saved over the control")
    assert saved.now.point > saved.floor, "over everything so far"
    assert saved.verdict == "FAIL"
    assert "since the look of 2026-01-13" in saved.reason
    assert "the method's gain has regressed" in diagnosis(found)


def test_a_harder_world_is_bounded_since_the_look_at_which_it_came():
    looks = history(6)
    before = models(200)
    assert hardest_since(series_of(looks), before, ALPHA).bound < 0.1
    for _ in range(2):
        looks.append(look(looks, level=3.2))
    hardest = hardest_since(series_of(looks), before, ALPHA)
    assert 0.4 < hardest.bound < 0.8
    assert hardest.day == "2026-01-07"


def test_groups_are_one_value_each():
    looks = [look([], n=40, groups=["a"] * 20 + ["b"] * 20)]
    series = series_of(looks)
    assert len(series.bits.bytes) == 2
    assert [len(values) for values in series.values_since(0).values()] == [2] * 4
    assert series.bits.release.sum() == pytest.approx(sum(looks[0].seen.release))
    found = findings_so_far(gain(), models(200), series, ALPHA)
    assert verdict(found) == "INCONCLUSIVE"
    assert "2 independent documents, or groups, are too few" in diagnosis(found)
    again = look(looks, n=10, groups=["a"] * 10)
    later = series_of([*looks, again])
    firsts = [s.values_since(0)["bytes"].tolist() for s in (later, series)]
    assert (later.starts, firsts[0]) == ([0, 40], firsts[1])
    before = by_group(history(1, n=200)[0].seen)[1]
    since = [later.values_since(start) for start in later.starts]
    assert [len(part["bytes"]) for part in since] == [2, 1], "the group came back"
    moved = drifts_so_far(before, since, ALPHA, later.tuned)
    assert all(np.isfinite([one.low, one.high]).all() for one in moved)


def mean_and_error(values):
    return values.mean(), stats.sem(values)


def test_groups_are_one_value_each_in_a_single_look_too():
    seen = look([], n=24, groups=["a"] * 12 + ["b"] * 12, over_control=0.0).seen
    bits, values = by_group(seen)
    series = series_of([look([], n=24, groups=["a"] * 12 + ["b"] * 12, over_control=0.0)])
    for name in ("release", "control", "fallback", "bytes"):
        np.testing.assert_allclose(getattr(bits, name), getattr(series.bits, name))
    for name, column in values.items():
        np.testing.assert_array_equal(column, series.values_since(0)[name])
    assert values["bytes"].tolist() == [seen.bytes[0], seen.bytes[12]]
    saving = findings(gain(), models(200), bits, ALPHA)[3]
    low, high = stats.t.interval(0.9, 1, *mean_and_error(bits.over("control")))
    assert (saving.now.low, saving.now.high) == pytest.approx((low, high)), "of two values"


def test_two_writers_lose_no_look(tmp_path):
    path = tmp_path / "new" / "history.jsonl"
    with lock_history(path):
        busy = pytest.raises(UserError, match=r"history\.jsonl: another process adds a look; wait for it")
        with busy, lock_history(path):
            pass
        write_history(path, history(1, n=3))
    with lock_history(path):
        assert len(read_history(path)) == 1


def test_one_domain_can_be_taken_alone():
    looks = [look([], domain="code")]
    looks.append(look(looks, domain="prose"))
    assert series_of(looks, "prose").days == ["2026-01-02"]
    assert len(series_of(looks, "prose").bits.bytes) == len(series_of(looks).bits.bytes) / 2


def test_drift_is_seen_at_any_look_and_seldom_where_there_is_none():
    rng = np.random.default_rng(0)

    def values(n, shift=0.0):
        return {name: rng.normal(shift if name == "unigram" else 0, 1, n) for name in QUESTIONS}

    def since(values, *starts):
        return [{name: column[start:] for name, column in values.items()} for start in starts]

    false = 0
    for _ in range(30):
        moved = drifts_so_far(values(60), since(values(120), 0, 40, 80), ALPHA, 160)
        false += any(m.since is not None for m in moved)
    assert false <= 2
    old, new = values(100), values(120)
    new["unigram"][60:] += 3
    moved = {m.name: m for m in drifts_so_far(old, since(new, 0, 60), ALPHA, 160)}
    assert moved["unigram"].since is not None
    assert moved["bytes"].since is None
    assert moved["unigram"].low < superiority(old["unigram"], new["unigram"]) < moved["unigram"].high
    low, _ = effect_bounds(np.arange(50.0), np.arange(100.0, 140.0), ALPHA, 160)
    assert low > 0.6, (
        "values beyond all that were seen do not vary in their place, and are drift all the same"
    )


def test_a_history_is_read_back_and_a_changed_line_is_noticed(tmp_path):
    path, looks = tmp_path / "history.jsonl", history(3, n=5)
    assert read_history(path) == []
    write_history(path, looks)
    assert read_history(path) == looks
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace('"cpu"', '"gpu"'), *lines[1:]]))
    with pytest.raises(UserError, match=r"line 2: a line before it.*not what was written"):
        read_history(path)
    path.write_text("".join([lines[0], lines[2]]))
    with pytest.raises(UserError, match="line 2"):
        read_history(path)
    path.write_text('{"number": 1}\n')
    with pytest.raises(UserError, match=r"line 1: no look"):
        read_history(path)


def test_a_history_of_something_else_and_a_document_twice_are_refused(tmp_path):
    looks = history(2, n=5)
    for release, target, name, message in (
        ("s" * 64, "cpu", "validation", "look 1 is of the release rrrr"),
        ("r" * 64, "gpu", "validation", "of the target cpu, this one is gpu"),
        ("r" * 64, "cpu", "far", "of the slice validation"),
    ):
        with pytest.raises(UserError, match=message):
            check_history(tmp_path, looks, release, target, name)
    check_history(tmp_path, looks, "r" * 64, "cpu", "validation")
    with pytest.raises(UserError, match=r"document 1-0 was seen at look 2.*copies are no evidence"):
        check_new(tmp_path, looks, looks[1].seen.id)


def test_test_documents_are_what_a_release_is_compared_with(release, tmp_path):
    """The variant was picked on the validation documents: once others were opened, they are the measure."""
    copy = shutil.copytree(release, tmp_path / "copy")
    contract, target = checked(copy, None, None)
    shipped = contract.targets[target]
    assert before_release(copy, shipped, "validation").slice == "validation"
    for record in list(each_score(copy / "evidence")):
        documents = record.documents.model_dump()
        rows = [i for i, name in enumerate(documents["slice"]) if name == "far"]
        columns = {name: [column[i] for i in rows] for name, column in documents.items() if column}
        columns["slice"] = ["test"] * len(rows)
        columns["cluster"] = [f"c{place // 2}" for place in range(len(rows))]
        columns = {name: column for name, column in columns.items() if name != "calibration"}
        on_test = record.model_copy(update={"kind": "test", "documents": type(record.documents)(**columns)})
        write_record(copy / "evidence", on_test)
    path = copy / "evidence" / "reference.json"
    reference = json.loads(path.read_text())
    reference["unigram"]["test"] = reference["unigram"]["far"]
    path.write_text(json.dumps(reference))
    before = before_release(copy, shipped, "validation")
    far = before_release(copy, shipped, "far")
    assert (before.slice, far.slice) == ("test", "far")
    assert (before.documents, len(before.bits.bytes), len(before.values["bytes"])) == (30, 15, 15)
    assert (far.documents, len(far.bits.bytes)) == (30, 30), "without clusters each document is one"
    assert before.bits.over("control").mean() == pytest.approx(far.bits.over("control").mean())


def test_the_command_line_appends_looks_and_refuses_what_is_no_evidence(release, tmp_path):
    path, out = tmp_path / "history.jsonl", tmp_path / "result.json"
    words = ["-m", "eval.watch.recheck", "--release", release, "--append", path, "--json", out]
    for number, split in enumerate(("validation", "far"), 1):
        data = tmp_path / f"{split}.jsonl"
        rows = [{"text": document.text, "domain": document.domain} for document in real_run.documents(split)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = command(*words, "--data", data)
        assert done.returncode in (0, 2), done.stdout + done.stderr
        assert f"{look_count(number)}, bounds that hold at every one" in done.stdout
    result = json.loads(out.read_text())
    assert (result["looks"], result["documents"]) == (2, 70)
    assert (result["contract"], result["owner"]) == (read_contract(release).name, "Team A")
    looks = read_history(path)
    assert [one.state for one in looks][-1] == result["verdict"]
    assert text("code", 0)[:20] not in path.read_text(), "no text is kept"
    other = path.read_text().splitlines()[0].replace(looks[0].release, "0" * 64) + "\n"
    path.write_text(other)
    done = command(*words, "--data", data)
    assert done.returncode == 3
    assert path.read_text() == other
    assert "look 1 is of the release 000000000000, this one is" in done.stderr
