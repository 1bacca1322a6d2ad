"""New documents are in the clusters of the study; groups may come back; both keep the error that is promised."""

import shutil
from io import StringIO

import numpy as np
import pytest
import yaml
from rich.console import Console

from eval.core.documents import Document
from eval.stats.drift import drifts_so_far
from eval.watch.history import series_of
from eval.watch.measure import by_group, groups_of, text_id
from eval.watch.monitor import by_domain, notes_on_domains
from eval.watch.recheck import recheck, show
from eval.watch.regression import check_saving
from eval.watch.sequences import lowest_since
from eval.watch.verify import checked
from tests.eval import real_run
from tests.eval.test_history import look
from tests.eval.test_monitor import released

ALPHA, FLOOR, DRAWS = 0.05, 0.1, 1000


def weekly(looks, groups, saved, domain=None):
    """The next look: one document for each group, that saves so much over the control."""
    one = look(looks, n=len(groups), groups=[str(group) for group in groups])
    seen = one.seen
    control = [bits + gain * size for bits, gain, size in zip(seen.release, saved, seen.bytes, strict=True)]
    changes = {"control": control} | ({} if domain is None else {"domain": domain})
    return one.model_copy(update={"seen": seen.model_copy(update=changes)})


@pytest.mark.parametrize(("clusters", "documents", "icc"), [(16, 4, 0.2), (6, 8, 0.3), (8, 25, 0.2)])
def test_the_errors_of_a_recheck_are_those_promised_where_domains_are_the_clusters(clusters, documents, icc):
    """A gain exactly at its floor, of documents that are alike within a domain. Alone they err up to 25 %."""
    rng = np.random.default_rng([clusters, documents])
    domain = [f"d{i // documents}" for i in range(clusters * documents)]
    new = [Document(str(i), name, f"text {i}") for i, name in enumerate(domain)]
    groups = groups_of(new, "domain", [])
    said = {verdict: 0 for verdict in ("PASS", "FAIL", "INCONCLUSIVE")}
    seen = look([], n=len(new)).seen.model_copy(update={"domain": domain, "group": groups})
    size = np.asarray(seen.bytes, float)
    for _ in range(DRAWS):
        common, own = rng.normal(size=clusters).repeat(documents), rng.normal(size=len(new))
        saved = FLOOR + 0.1 * (icc**0.5 * common + (1 - icc) ** 0.5 * own)
        control = (np.asarray(seen.release) + saved * size).tolist()
        bits, _ = by_group(seen.model_copy(update={"control": control}))
        now = bits.over("control")
        said[check_saving("saved", now, now, FLOOR, ALPHA).verdict] += 1
    assert len(now) == clusters
    assert 0.03 < said["PASS"] / DRAWS < 0.07
    assert 0.03 < said["FAIL"] / DRAWS < 0.075


def test_the_group_of_a_new_document_is_its_cluster_by_the_rule_of_the_study():
    new = [
        Document(str(i), domain, f"text {i}") for i, domain in enumerate(("a", "a", "b", "", "top", "top"))
    ]
    own = [text_id(one) for one in new]
    assert groups_of(new, "domain", []) == ["a", "a", "b", *own[3:]], "no folder is no domain in common"
    assert groups_of(new, "group", []) == groups_of(new, "none", []) == groups_of(new, "source", []) == own
    assert groups_of(new[:2], "domain", []) == own[:2], "all of one domain"
    assert groups_of(new[:2], "domain", ["b"]) == ["a", "a"], "one of those that came before"
    asked = [Document("0", "a", "x", group="g"), Document("1", "a", "y", group="g")]
    assert groups_of(asked, "none", []) == groups_of(asked, "domain", []) == ["g", "g"]


def test_a_recheck_takes_the_clusters_of_its_study(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy")
    contract, target = checked(copy, None, None)
    path, documents = copy / "evidence" / "study.yaml", real_run.documents("far")
    study = yaml.safe_load(path.read_text())

    console = Console(file=StringIO(), width=200)

    def judged(cluster):
        study["data"]["cluster"] = cluster
        path.write_text(yaml.safe_dump(study))
        result = recheck(copy, contract, target, "far", documents)
        show(console, result, contract, target, "far")
        return result.notes, result.findings[-1].now

    nothing, alone = judged("none")
    again, by = judged("domain")
    assert nothing == again == []
    assert by.point == pytest.approx(alone.point)
    assert by.high - by.low > 1.5 * (alone.high - alone.low), "two domains, not thirty documents"
    notes, ungrouped = judged("group")
    assert ungrouped == alone
    assert notes == [
        "the study judged documents by group, and no new one has a `group`: each counts as independent"
    ]
    assert f"note: {notes[0]}" in console.file.getvalue()


def test_a_domain_that_is_one_cluster_is_not_judged_alone():
    looks = []
    for _ in range(6):
        names = ["code", "prose"] * 20
        one = look(looks)
        looks.append(
            one.model_copy(update={"seen": one.seen.model_copy(update={"domain": names, "group": names})})
        )
    assert by_domain(released(), looks, ALPHA) == []
    (note,) = notes_on_domains(looks)
    assert note.startswith("code, prose: a domain that is one cluster")


def test_what_was_seen_since_a_look_is_grouped_anew():
    """A group that comes back is a value since every look at which it came, of its documents since then."""
    looks = []
    for saved in (0.3, 0.3, -0.1):
        looks.append(weekly(looks, range(20), [saved] * 20))
    series = series_of(looks)
    assert series.starts == [0, 20, 40]
    assert [len(series.since(start).bytes) for start in series.starts] == [20, 20, 20]
    np.testing.assert_allclose(series.since(40).over("control"), -0.1)
    last = looks[-1].seen
    assert series.since(40).release.tolist() == last.release
    assert series.values_since(40)["bytes"].tolist() == last.bytes
    assert series.values_since(0)["bytes"].tolist() == looks[0].seen.bytes, "its first document's"


def first_broken(rng, weeks, saved_in, returning):
    """The week in which the upper bound since some look is first below the floor; infinite where never."""
    looks, own = [], rng.normal(0, 0.01, 20)
    for week in range(1, weeks + 1):
        names = range(20) if returning else range(20 * week, 20 * week + 20)
        effect = own if returning else rng.normal(0, 0.01, 20)
        looks.append(weekly(looks, names, saved_in(week) + effect + rng.normal(0, 0.04, 20)))
        lowest = lowest_since(series_of(looks), "control", ALPHA)
        if lowest is not None and lowest.bound < 0.05:
            return week
    return np.inf


@pytest.mark.parametrize("returning", [True, False])
def test_a_fading_release_is_found_although_its_groups_come_back(returning):
    rng = np.random.default_rng(0)
    weeks = [first_broken(rng, 20, lambda week: 0.06 if week <= 8 else 0.0, returning) - 8 for _ in range(3)]
    assert min(weeks) >= 1
    assert np.median(weeks) <= 6


def test_drift_is_seen_although_the_groups_come_back():
    looks, before = [], by_group(look([], n=200).seen)[1]
    for week in range(12):
        one = weekly(looks, range(40), [0.1] * 40)
        if week >= 6:
            one = one.model_copy(update={"seen": one.seen.model_copy(update={"unigram": [20.0] * 40})})
        looks.append(one)
    series = series_of(looks)
    parts = [series.values_since(start) for start in series.starts]
    moved = {one.name: one for one in drifts_so_far(before, parts, ALPHA, series.tuned)}
    assert moved["unigram"].since is not None
    assert moved["bytes"].since is None
