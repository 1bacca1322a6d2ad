"""Who is to blame: the method, the world or the input; its page, its metrics and its exit codes."""

import json
import re

import numpy as np
import pytest

from eval.core.records import VALIDATION
from eval.release.contract_file import read_contract
from eval.stats.drift import QUESTIONS
from eval.watch.history import read_history, series_of, write_history
from eval.watch.measure import Before, before_release
from eval.watch.monitor import by_domain, metrics_text, notes_on_domains, watched
from eval.watch.monitor_page import page_of
from tests.eval import real_run
from tests.eval.test_history import history, look
from tests.eval.test_recheck import models
from tests.helpers import run as command
from tests.helpers import table_width

ALPHA = 0.05


def released(n=200, **changes):
    """What was measured at the release, of documents as `look` makes them."""
    bits = models(n, **changes)
    tokens = np.maximum(bits.bytes // 4, 1)
    rng = np.random.default_rng(9)
    values = [bits.bytes, bits.bytes / tokens, 8.0 + 0.4 * rng.random(n), bits.fallback / bits.bytes]
    return Before(VALIDATION, len(bits.bytes), bits, dict(zip(QUESTIONS, values, strict=True)))


def said(looks):
    return watched("", released(), series_of(looks), ALPHA).blame


CASES = {
    "fine": ({}, "fine", ""),
    "fading": (
        {"over_control": 0.02, "over_fallback": 0.2},
        "the method is fading",
        "saved over the control",
    ),
    "worse than the fallback": ({"over_fallback": 0.05}, "the method is fading", "saved over the fallback"),
    "harder": ({"level": 3.2}, "the world got harder", "the fallback needs at least"),
    "both": ({"level": 3.2, "over_control": 0.0}, "both", "saved over the control"),
    "a little": ({"over_control": 0.095, "level": 2.52}, "fine", ""),
}


@pytest.mark.parametrize(("changes", "state", "reason"), CASES.values(), ids=CASES)
def test_method_and_world_are_told_from_each_other(changes, state, reason):
    looks = history(4)
    for _ in range(4):
        looks.append(look(looks, **changes))
    blame = said(looks)
    assert blame.state == state
    if reason:
        assert blame.reasons[0].startswith(reason)
        assert "since 2026-01-05" in blame.reasons[0] or "since 2026-01-04" in blame.reasons[0]


def test_other_texts_on_which_all_holds_are_an_input_that_changed():
    looks = history(4)
    for _ in range(4):
        one = look(looks)
        sizes = one.seen.model_copy(update={"tokens": [max(size // 9, 1) for size in one.seen.bytes]})
        looks.append(one.model_copy(update={"seen": sizes}))
    blame = said(looks)
    assert blame.state == "the input changed"
    assert "bytes per token" in blame.reasons[0]
    assert "Cliff's delta +" in blame.reasons[0]


def test_nothing_rings_by_chance_over_many_looks():
    rung = 0
    for seed in range(20):
        looks = []
        for _ in range(8):
            looks.append(look(looks, seed=10_000 * (seed + 1), noise=0.1))
        rung += said(looks).state != "fine"
    assert rung <= 2


def test_the_domain_that_fades_is_named():
    looks = []
    for _ in range(6):
        looks.append(look(looks, domain="code"))
        looks.append(look(looks, domain="prose", over_control=0.0))
    parts = {part.name: part for part in by_domain(released(), looks, ALPHA)}
    assert parts["code"].blame.state == "fine"
    assert parts["prose"].blame.state == "the method is fading"
    assert by_domain(released(), looks[:1], ALPHA) == [], "one domain is all of them"


def test_domains_that_are_too_small_are_counted():
    looks = [look([], domain="code")]
    looks.append(look(looks, n=5, domain="prose"))
    looks.append(look(looks, n=4, domain=""))
    assert [part.name for part in by_domain(released(), looks, ALPHA)] == ["code"]
    said = "prose (5), (none) (4): fewer than 20 documents, so judged only with all others"
    assert notes_on_domains(looks) == [said]
    assert notes_on_domains(looks[:1]) == []


def test_the_command_line_names_owner_and_contract_and_writes_page_and_metrics(release, tmp_path):
    path, page, metrics = tmp_path / "history.jsonl", tmp_path / "page.html", tmp_path / "monitor.prom"
    data = tmp_path / "new.jsonl"
    rows = [{"text": d.text, "domain": d.domain} for d in real_run.documents(VALIDATION)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "-m",
        "eval.watch.monitor",
        "--release",
        release,
        "--history",
        path,
        "--page",
        page,
        "--metrics",
        metrics,
    ]
    empty = command(*words)
    assert empty.returncode == 3
    assert "no look yet; give texts with --data" in empty.stderr
    done = command(*words, "--data", data, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not verified against a key" in done.stdout
    contract = read_contract(release)
    assert f"Team A: {contract.name} on cpu: fine" in done.stdout
    assert re.search(r"seen on \d{4}-\d\d-\d\d by absorb", done.stdout)
    assert table_width(done.stdout) <= 120
    assert [one.state for one in read_history(path)] == ["fine"]
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["state"], result["owner"], result["contract"]) == ("fine", "Team A", contract.name)
    lines = metrics.read_text().splitlines()
    assert all(re.fullmatch(r'# (HELP|TYPE) .*|[a-z_]+\{(\w+="[^"]*",?)*\} \S+', line) for line in lines)
    assert any(line.startswith("absorb_state{") and 'state="fine"} 1' in line for line in lines)
    html = page.read_text()
    assert html.count("<svg") == html.count("<figcaption>") == 3
    assert "a dot may lie outside it" in html
    assert "1 look, " in html
    assert "no interval" not in done.stdout.split("when released")[1].splitlines()[0]
    for raw in ("unigram │", "bytes_per_token", "<td>unigram", "<td>bytes_per_token"):
        assert raw not in done.stdout + html
    assert "Team A answers for it" in html
    assert not re.search(r'(src|href)="(?!#)', html), "opens offline"


def test_an_alarm_is_an_exit_code_and_stands_on_the_page(release, tmp_path):
    """A history that another look would join: its documents are made up, its release is real."""
    contract = read_contract(release)
    before = before_release(release, contract.targets["cpu"], VALIDATION)
    size = before.bits.bytes
    looks = []
    for _ in range(5):
        one = look(looks, n=40)
        bits = {name: getattr(before.bits, name).tolist() for name in ("release", "control", "fallback")}
        noise = np.random.default_rng(len(looks)).normal(0, 0.01, 40)
        seen = one.seen.model_copy(
            update={
                "bytes": size.astype(int).tolist(),
                **bits,
                "release": (before.bits.control + noise * size).tolist(),
            }
        )
        looks.append(one.model_copy(update={"seen": seen}))
    parts = [watched("", before, series_of(looks), contract.alpha)]
    assert parts[0].blame.state == "the method is fading"
    html = page_of(contract, "cpu", before.bits, looks, parts, 0.8)
    assert 'class="said fading"' in html
    assert 'state="the method is fading"} 1' in metrics_text(contract, "cpu", parts, looks)
    write_history(tmp_path / "h.jsonl", looks)
    done = command("-m", "eval.watch.monitor", "--release", release, "--history", tmp_path / "h.jsonl")
    assert done.returncode == 3
    assert "look 1 is of the release rrrr" in done.stderr
