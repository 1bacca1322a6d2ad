"""The contract on new documents: does it hold, has the gain regressed, or did everything get worse?"""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy import stats

from distill.data.parse import Raw, make_document
from eval.core.artifacts import Key, build_artifact
from eval.core.errors import UserError
from eval.core.gate_file import Estimate, KeptShare
from eval.core.sections import Source
from eval.release.contract_file import Bits, Gain, Saving, read_contract
from eval.signoff.keys import new_key, read_trusted
from eval.stats.drift import QUESTIONS, drifts, superiority, surprise
from eval.watch.measure import read_new, text_id
from eval.watch.recheck import recheck
from eval.watch.regression import change, diagnosis, findings, verdict
from eval.watch.verify import checked
from tests.eval import real_run
from tests.eval.run_builder import gate as judge
from tests.eval.run_builder import sign
from tests.helpers import run as command
from tests.helpers import table_width, text

NOTHING = Estimate(point=0.0, low=None, high=None)


def gain(control=0.05, fallback=0.1):
    def saving(floor):
        return Saving(floor=floor, measured=NOTHING)

    return Gain(
        asked_share=0.5,
        kept_share=KeptShare(),
        level=NOTHING,
        teacher_gain=NOTHING,
        over_control=saving(control),
        over_fallback=saving(fallback),
    )


def models(n, *, over_control=0.1, over_fallback=0.2, level=2.5, seed=0, noise=0.02):
    """Bits of n documents whose release saves so much, in bits per byte."""
    rng = np.random.default_rng(seed)
    size = rng.integers(200, 4000, n).astype(float)
    fallback = level + rng.normal(0, 0.3, n)
    release = fallback - over_fallback + rng.normal(0, noise, n)
    control = release + over_control + rng.normal(0, noise, n)
    return Bits(release * size, control * size, fallback * size, size)


CASES = {
    "as released": (
        {},
        "PASS",
        "the gain holds; the fallback does about as well as before (-0.017 bits per byte; between",
    ),
    "regressed": (
        {"over_control": 0.01, "over_fallback": 0.11},
        "FAIL",
        "the method's gain has regressed (saved over the control: at most",
    ),
    "all worse": ({"level": 3.5}, "PASS", "the gain holds; everything got worse, the fallback too (+0.9"),
    "both": (
        {"over_control": -0.1, "over_fallback": 0.0, "level": 3.5},
        "FAIL",
        "and everything got worse, the fallback too",
    ),
    "smaller": (
        {"over_control": 0.07, "over_fallback": 0.17},
        "PASS",
        "the gain is smaller than when it was released",
    ),
    "unsure": ({"over_control": 0.05}, "INCONCLUSIVE", "whether the gain holds is open"),
    "easier": ({"level": 1.5}, "PASS", "the fallback does better than before"),
}


@pytest.mark.parametrize(("changes", "decided", "message"), CASES.values(), ids=CASES)
def test_a_gain_that_regressed_is_distinguished_from_everything_getting_worse(changes, decided, message):
    results = findings(gain(), models(200), models(200, seed=1, **changes), alpha=0.05)
    assert verdict(results) == decided
    assert message in diagnosis(results)


def test_figures_are_those_of_the_corpus_and_changes_those_of_welch():
    before, now = models(80), models(120, seed=1)
    results = {f.name: f for f in findings(gain(), before, now, alpha=0.05)}
    saved = results["saved over the control"]
    assert saved.now.point == pytest.approx((now.control - now.release).sum() / now.bytes.sum())
    a, b = before.over("fallback"), now.over("fallback")
    theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.9)
    ours = results["saved over the fallback"].change
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert (results["saved over the control"].verdict == "PASS") == (saved.now.low >= saved.floor)
    assert change([1.0, 1.0], [1.0, 1.0], 0.05) == Estimate(point=0.0, low=0.0, high=0.0)


def test_the_contract_is_not_broken_by_chance():
    """At the floor itself a break is said in about 5 % of the cases, as alpha promises."""
    before = models(100)
    broken = [
        verdict(findings(gain(control=0.1, fallback=-1), before, models(100, seed=1 + i), alpha=0.05))
        for i in range(400)
    ]
    assert 0.02 < broken.count("FAIL") / 400 < 0.09
    assert 0.02 < broken.count("PASS") / 400 < 0.09


def test_one_document_decides_nothing():
    results = findings(gain(), models(20), models(1), alpha=0.05)
    assert verdict(results) == "INCONCLUSIVE"
    said = diagnosis(results)
    assert "one document, or one group, says nothing about others" in said
    assert "whether the fallback does as well as before cannot be told (" in said
    assert "about as well" not in said


def test_a_wide_interval_is_not_called_about_as_before():
    """Few documents that differ much from each other: what is meant, 5 % of the bits, is not within sight."""
    few, many = models(6), models(400)
    rng = np.random.default_rng(3)
    stretch = 1 + 0.3 * rng.permutation(np.linspace(-1, 1, 6))
    spread = Bits(few.release * stretch, few.control * stretch, few.fallback * stretch, few.bytes)
    said = diagnosis(findings(gain(), many, spread, alpha=0.05))
    meant = 0.05 * many.fallback.sum() / many.bytes.sum()
    assert (
        f"whether the fallback does as well as before, that is within {meant:.3f}, 5 %, cannot be told ("
        in said
    )
    assert "about as well" not in said


def test_drift_is_seen_where_there_is_some_and_seldom_elsewhere():
    rng = np.random.default_rng(0)

    def sample(n, shift=0.0):
        return {name: rng.normal(shift if name == "unigram" else 0, 1, n) for name in QUESTIONS}

    drift_of = {d.name: d for d in drifts(sample(200), sample(200, shift=1.0))}
    assert drift_of["unigram"].holm_p < 1e-6
    assert drift_of["unigram"].effect == pytest.approx(0.52, abs=0.1), "2 Phi(1 / sqrt 2) - 1"
    assert min(d.holm_p for name, d in drift_of.items() if name != "unigram") > 0.05
    false = [min(d.holm_p for d in drifts(sample(30), sample(30))) <= 0.05 for _ in range(200)]
    assert np.mean(false) < 0.09


def test_the_effect_is_that_of_all_pairs():
    rng = np.random.default_rng(1)
    before, now = rng.integers(0, 9, 40).astype(float), rng.integers(2, 9, 25).astype(float)
    pairs = np.sign(now[:, None] - before[None, :])
    assert superiority(before, now) == pytest.approx(pairs.mean())


def test_surprise_is_the_cross_entropy_of_the_smoothed_unigram():
    counts = {0: 3, 1: 1}
    p = np.array([4, 2, 1]) / 7
    assert surprise(counts, 3, [0, 1, 2, 2]) == pytest.approx(-np.log2(p[[0, 1, 2, 2]]).mean())


BAD = {
    "no json": ('{"text": ', "line 1: not JSON"),
    "no text": ('{"id": "a"}', "None; give each line a `text`"),
    "zero bytes": ('{"text": ""}', "give each line a `text` that is not empty"),
    "a list": ("[1]", "line 1: expected a JSON object, found list; write one JSON object a line"),
    "a key that nothing reads": (
        '{"text": "a", "lable": 1}',
        "line 1: key: 'lable'; accepted: domain, group, id",
    ),
    "an empty prompt": ('{"text": "a", "prompt": " "}', "give each line a `prompt` that is not empty"),
    "both": ('{"text": "a", "messages": []}', "messages beside a text or a prompt; give the messages alone"),
    "no answer": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}',
        "of which the last is an answer of the assistant",
    ),
    "an empty turn": (
        '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}',
        "give each line a `content` that is not empty",
    ),
    "calls that are none": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": ["f"]}]}',
        "tool_calls ['f']; give a list of objects",
    ),
    "tools of a text": ('{"text": "a", "tools": [{}]}', "give `tools` beside `messages`"),
    "a text twice": ('{"text": "a"}\n{"text": "a"}', "'a'... is 2 documents, as far as they are read"),
    "twice": ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', "id 'x' appears 2 times"),
    "nothing": ("\n", "the file is empty"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_bad_documents_are_refused(tmp_path, content, message):
    path = tmp_path / "new.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_new(path, 100)
    assert message in str(error.value)


CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "four", "prompt": "2 + 2 ="}, {"prompt_column": "prompt"}),
        ({"messages": CHAT}, {"messages_column": "messages"}),
        ({"messages": CHAT, "tools": TOOLS}, {"messages_column": "messages", "tools_column": "tools"}),
    ],
)
def test_prompts_and_chats_are_read_as_those_of_the_study(tmp_path, row, columns):
    """Reference: how the sources of a study are read, for the documents on which the verdict was given."""
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    (new,) = read_new(tmp_path / "new.jsonl", 3)
    of_study = make_document(Source(kind="dataset", path="json", **columns), Raw("", row, ""))
    assert (new.prompt, new.text, list(new.tools)) == (
        of_study.prompt, of_study.text, list(of_study.tools),
    )  # fmt: skip
    assert new.text == "four", "an answer is not cut"
    assert text_id(new) != text_id(replace(new, prompt="3 + 1 ="))


def test_prompts_where_the_verdict_was_of_texts_are_refused(release, tmp_path):
    (tmp_path / "new.jsonl").write_text('{"text": "four", "prompt": "2 + 2 ="}\n')
    done = command("-m", "eval.watch.recheck", "--release", release, "--data", tmp_path / "new.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "document '1': a prompt; the documents of the verdict had none" in done.stderr


def test_new_documents_are_cut_as_those_of_the_study_were(tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps({"text": "ab\N{EURO SIGN}c"}))
    assert read_new(path, 4)[0].text == "ab"
    with pytest.raises(UserError, match="no such file"):
        read_new(tmp_path / "other", 4)


def test_the_same_documents_give_what_was_released(release, released_run):
    contract, target = checked(release, read_trusted([released_run.folder / "key.pub"]), None)
    result = recheck(release, contract, target, "far", real_run.documents("far"))
    for finding in result.findings:
        assert finding.now.point == pytest.approx(finding.before.point, abs=1e-5)
    assert [d.distance for d in result.drift] == [0, 0, 0, pytest.approx(0, abs=0.04)]
    assert verdict(result.findings) == "PASS"
    gains = contract.targets["cpu"].gain["far"]
    saved = next(f for f in result.findings if f.name == "saved over the control")
    assert saved.before == gains.over_control.measured


@pytest.mark.slow
def test_a_release_of_chats_is_rechecked_with_chats_by_the_real_command(tmp_path):
    """Reference: the bits of the verdict's own documents, which a template laid out."""
    run = real_run.RealRun(tmp_path, recipes=real_run.RECIPES, chat=True).make()
    run.fallback_cost()
    judge(run)
    new_key(tmp_path / "key")
    sign(run, tmp_path / "key", "small")
    out, keys = tmp_path / "release", ["--key", tmp_path / "key", "--public", tmp_path / "key.pub"]
    given = ["--study", run.path, "--variant", "small", "--owner", "Team A", "--out", out, *keys]
    built = command("-m", "eval.release", *given)
    assert built.returncode == 0, built.stderr
    rows = [
        {"id": d.id, "domain": d.domain, "messages": [*d.prompt, {"role": "assistant", "content": d.text}]}
        for d in real_run.documents("validation", chat=True)
    ]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--release", out, "--data", tmp_path / "new.jsonl", "--public", tmp_path / "key.pub"]
    done = command("-m", "eval.watch.recheck", *words, "--json", tmp_path / "said.json")
    assert done.returncode == 0, done.stderr
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["verdict"] == "PASS"
    for finding in said["findings"]:
        assert finding["now"]["point"] == pytest.approx(finding["before"]["point"], abs=1e-5)
    (tmp_path / "new.jsonl").write_text('{"text": "four"}\n')
    done = command("-m", "eval.watch.recheck", *words)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
    assert "no prompt; the documents of the verdict had one" in done.stderr


def test_a_release_that_is_not_the_signed_one_is_refused(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy")
    new_key(tmp_path / "other")
    with pytest.raises(UserError, match="was signed with the unknown key"):
        checked(copy, read_trusted([tmp_path / "other.pub"]), None)
    with pytest.raises(UserError, match=r"--target.*accepted: cpu"):
        checked(copy, None, "tpu")
    weights = copy / "evidence/control/small/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"control/small/model\.safetensors is changed"):
        checked(copy, None, None)
    shutil.copy(copy / "fallback/model.safetensors", weights)
    shutil.copy(copy / "fallback/manifest.json", weights.parent)
    (copy / "manifest.json").unlink()
    with build_artifact(
        tmp_path / "forged", kind="release", name="x", key=Key("x"), parents={}, facts={}
    ) as place:
        shutil.copytree(copy, place, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"control/small/manifest\.json is not the variants/small/S0/s0"):
        checked(tmp_path / "forged", None, None)


def test_other_weights_under_a_signed_manifest_are_refused(release, tmp_path):
    copy = shutil.copytree(release, tmp_path / "copy")
    shutil.copy(copy / "fallback/model.safetensors", copy / "variants/small/model.safetensors")
    (copy / "manifest.json").unlink()
    with build_artifact(
        tmp_path / "forged", kind="release", name="x", key=Key("x"), parents={}, facts={}
    ) as place:
        shutil.copytree(copy, place, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"artifact .*variants/small: model\.safetensors has sha256"):
        checked(tmp_path / "forged", None, None)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("alpha",), 0.2),
        (("inputs", "scored_bytes"), 64),
        (("targets", "cpu", "gain", "validation", "over_control", "floor"), 0.0),
        (("targets", "cpu", "gain", "validation", "over_fallback", "floor"), -1.0),
        (("targets", "cpu", "waiver"), {"reason": "never mind", "expires": "2999-01-01"}),
        (("targets", "cpu", "signature", "file"), "evidence/signoff.json"),
    ],
)
def test_a_softer_contract_under_a_new_manifest_is_refused(release, tmp_path, place, value):
    """Whoever can write the folder can write its manifest, but not the sign-off."""
    copy = shutil.copytree(release, tmp_path / "copy")
    contract = yaml.safe_load((copy / "contract.yaml").read_text())
    inner = contract
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (copy / "contract.yaml").write_text(yaml.safe_dump(contract))
    (copy / "manifest.json").unlink()
    with build_artifact(
        tmp_path / "forged", kind="release", name="x", key=Key("x"), parents={}, facts={}
    ) as aside:
        shutil.copytree(copy, aside, dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"not what was signed: {re.escape('.'.join(place))}"):
        checked(tmp_path / "forged", None, None)


def test_the_command_line(release, tmp_path):
    path = tmp_path / "new.jsonl"
    odd = [" ".join(reversed(text("code", i, 40).split())).upper() for i in range(30)]
    path.write_text("".join(json.dumps({"text": content}) + "\n" for content in odd))
    done = command("-m", "eval.watch.recheck", "--release", release, "--data", path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL: the method's gain has regressed" in done.stdout
    assert "everything got worse" in done.stdout
    assert "drifted" in done.stdout
    assert read_contract(release).name in done.stdout
    assert re.search(r"checked on \d{4}-\d\d-\d\d by absorb", done.stdout)
    assert table_width(done.stdout) <= 120
    assert "90 % intervals" in done.stdout
    assert "not verified against a key" in done.stdout
    assert "--public signer.pub" in (release / "README.md").read_text()


def test_documents_that_all_say_the_same_are_no_sample():
    same = Bits(*(np.repeat(column, 3) for column in vars(models(1)).values()))
    results = findings(gain(), models(200), same, alpha=0.05)
    assert verdict(results) == "INCONCLUSIVE"
    assert "whether the gain holds is open" in diagnosis(results)


def test_half_a_surrogate_pair_is_a_character_like_any(tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text('{"text": "a\\ud800b"}')
    assert read_new(path, 100)[0].text == "a?b"
