"""The report, through its command line, on synthetic run folders."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from eval.study import load_study

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('x')</script> & $x^2$ | `a` ](b)"
VOID = {"meta", "br", "input", "img", "hr", "link", "path", "use"}
SLICES = {"heldout": 64, "near": 32, "far": 32}

# recipe, engine, bits per byte, kept share, guard share, decode ms, disk MiB, verdict
VARIANTS = [
    ("plain", "torch", 2.593, 0.66, 1.0, 2.31, 2.1, "PASS"),
    ("int8", "openvino", 2.5932, 0.657, 0.998, 0.71, 0.83, "PASS"),
    ("int4", "openvino", 2.598, 0.631, 0.962, 0.64, 0.61, "PASS"),
    ("wanda50", "torch", 2.63, 0.52, 0.7, 2.35, 2.1, "INCONCLUSIVE"),
    ("depth25", "torch", 2.629, 0.475, 0.71, 1.78, 1.7, "INCONCLUSIVE"),
    ("depth25-int8", "openvino", 2.6294, 0.47, 0.705, 0.58, 0.66, "INCONCLUSIVE"),
    ("nf4", "bitsandbytes", 2.61, 0.6, 0.9, 6.8, 1.2, "FAIL"),
    ("int8-bnb", "bitsandbytes", 2.594, 0.655, 0.99, 5.2, 1.4, "FAIL"),
]
BUDGET = yaml.safe_load("""
{name: default, alpha: 0.05, f: 0.5, g: 0.5, slices: {near: 0.5, far: 0.5}, hash: abc, targets: {
  cpu: {device: cpu, required: true, limits: {decode_p50: {at_most: 1.0, of: plain}}},
  gpu: {device: cuda, required: false, limits: {}}}}
""")
POWER = yaml.safe_load(
    "{documents: 64, seeds: 3, effect: 0.02, power_now: 0.86, seeds_for_80: 3, documents_for_80: 51}"
)
MADE = yaml.safe_load("""
{data: def, versions: {python: 3.11.2, torch: 2.13.0}, artifacts: {S1/s0/plain: fed},
 machines: [{host: laptop, cpu: Some CPU @ 2.0 GHz, isa: AVX512, cores: 2, device: cpu}]}
""")
STUDY = yaml.safe_load("""
{name: demo, seeds: [0, 1, 2], budget: default, data: {documents: [{kind: folder, path: stdlib}]},
 base: {path: somewhere}, method: {name: ensemble}, train: {}}
""")
SCORES = {"B": 2.715, "T0": 2.71, "T1": 2.584, "CE": 2.69, "S0": 2.679, "S1": 2.593}


def span(point: float, half: float) -> dict:
    return {"point": point, "low": round(point - half, 6), "high": round(point + half, 6)}


def kept(point: float, half: float = 0.11) -> dict:
    return {**span(point, half), "bootstrap_low": point - 0.1, "bootstrap_high": point + 0.13}


def cost(decode: float, disk: float, recipe: str) -> dict:
    def latency(value: float, spread: float, plain: float) -> dict:
        ratio = {"point": value / plain, "lower": value / plain * 0.97, "upper": value / plain * 1.04}
        relative = None if recipe == "plain" else {**ratio, "of": "plain"}
        return {**timed, "value": value, "lower": value * 0.98, "upper": value * spread, "relative": relative}

    timed = {"unit": "ms", "requests": 60, "processes": 3}
    none = {**timed, "value": None, "lower": None, "upper": None, "needs": 459}
    size = {"unit": "MiB", "requests": 3, "processes": 3}
    return {
        "prefill_p50": latency(decode * 6.1, 1.04, 14.1),
        "prefill_p95": latency(decode * 6.9, 1.12, 15.9),
        "prefill_p99": none,
        "decode_p50": latency(decode, 1.03, 2.31),
        "decode_p95": latency(decode * 1.31, 1.1, 3.02),
        "decode_p99": none,
        "peak_memory": {"value": 187.25, "lower": 186.0, "upper": 188.5, **size},
        "disk": {"value": disk, "lower": disk, "upper": disk, **size},
    }


def parts(kept: float, guard: float, verdict: str) -> list[dict]:
    def part(name: str, value: float, limit: float, unit: str, reason: str) -> dict:
        held = {"estimate": value, "low": value * 0.8, "high": value * 1.3, "limit": limit, "unit": unit}
        return {"name": name, "verdict": "PASS" if value > 0.01 else verdict, **held, "reason": reason}

    slow = "FAIL" if verdict == "FAIL" else "PASS"
    return [
        part("assay", 0.126, 0.0, "bits/byte", "the method improves the teacher on heldout"),
        part("retention", (kept - 0.5) * 0.126, 0.0, "bits/byte", "at least 0.5 of the gain is kept"),
        part("guard", (guard - 0.5) * 0.122, 0.0, "bits/byte", "at least 0.5 of the student's gain is kept"),
        part("fallback", 0.122, 0.0, "bits/byte", "it beats the base"),
        part("slice:near", 0.0123456, 0.0, "bits/byte", "at least 0.5 of the gain is kept on near"),
        part("slice:far", 0.0098765, 0.0, "bits/byte", "at least 0.5 of the gain is kept on far"),
        {**part("cost:decode_p50", 0.31, 1.0, "x plain", "held against the upper bound"), "verdict": slow},
    ]


def variant(row: tuple, target: str = "cpu", measured: bool = True) -> dict:
    recipe, engine, bits, share, guard, decode, disk, verdict = row
    reason = {
        "PASS": "keeps the gain and stays within every limit",
        "FAIL": "decode is slower than the uncompressed student",
        "INCONCLUSIVE": "it cannot be told whether at least 0.5 of the teacher's gain is kept on heldout",
    }[verdict]
    here = "PASS" if verdict == "FAIL" else verdict
    return {
        **{"recipe": recipe, "target": target, "engine": engine, "p": 0.01, "measured": measured},
        "verdict": verdict if measured else "INCONCLUSIVE",
        "reason": reason if measured else f"its cost was not measured on {target}",
        "parts": parts(share, guard, verdict),
        "holm_p": 0.03 if measured else None,
        "kept_share": kept(share, 0.12),
        "kept_of_student": kept(share / 0.66, 0.05),
        "guard_share": kept(guard, 0.06),
        "slices": {name: {"kept_share": kept(share - 0.02), "verdict": here} for name in ("near", "far")},
        "scores": {name: span(bits + 0.2 * i, 0.03) for i, name in enumerate(SLICES)},
        "cost": cost(decode, disk, recipe) if measured else None,
        "how": None if measured else f"python -m eval.cost --study runs/x --target {target}",
        "hashes": {"artifact": {"0": "a" * 64}, "control": {"0": "f" * 64}, "records": {}},
        "recommended": recipe == "int8" and measured,
    }


def gate_of(run: Path, title: str, variants: list[dict]) -> dict:
    paths = sorted((run / "records").rglob("*.json"))
    records = {p.relative_to(run).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    return {
        **{"schema_version": 1, "study": run.name, "title": title, "method": "ensemble", "verdict": "PASS"},
        **{"seeds": [0, 1, 2], "documents": SLICES, "budget": BUDGET, "power": POWER, "variants": variants},
        "reason": "int8 keeps the method's gain on cpu, beats the fallback and stays within every limit.",
        "recommended": {"cpu": "int8", "gpu": None},
        "teacher_gain": span(0.126, 0.021),
        "teacher_gain_slices": {"near": span(0.131, 0.03), "far": span(0.098, 0.035)},
        "scores": {
            arm: {name: span(bits + 0.2 * i, 0.03) for i, name in enumerate(SLICES)}
            for arm, bits in SCORES.items()
        },
        "kept_by_student": {"over_control": kept(0.66), "over_ce": kept(0.75), "over_base": kept(0.93)},
        "provenance": {**MADE, "config": load_study(run).hash(), "records": records},
    }


def write_manifest(folder: Path, arm: str, seed: int, start: float) -> None:
    curve = [
        [step, start * (0.4 + 0.6 / (1 + step / 40)) + 0.03 * ((step * 7 + seed) % 5)]
        for step in range(0, 300, 3)
    ]
    facts = {"arm": arm, "seed": seed, "recipe": "plain", "engine": "torch", "loss_curve": curve}
    names = {"kind": "model", "name": folder.name, "key": "k", "hash": "h"}
    manifest = {**names, "files": {}, "parents": {}, "versions": {}, "facts": facts}
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_folder(
    place: Path, title: str = "A three-member ensemble, distilled", variants: list[dict] | None = None
) -> Path:
    """A run folder as the earlier stages leave it: study, records, manifests and gate.json."""
    run = place / "demo"
    for i, record in enumerate(["score/plain/S1-s0", "score/int8/S1-s0", "cost/cpu/int8/S1-s0"]):
        path = run / "records" / f"{record}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"record": i}))
    for seed in range(3):
        write_manifest(run / "base" / f"s{seed}", "B", seed, 6.0)
        for arm in ("S1", "S0", "CE"):
            write_manifest(run / "students" / arm / f"s{seed}", arm, seed, 3.0)
    study = {**STUDY, "title": title, "runs": str(place)}
    (run / "study.yaml").write_text(yaml.safe_dump(study))
    default = [variant(row) for row in VARIANTS] + [variant(VARIANTS[6], "gpu", measured=False)]
    (run / "gate.json").write_text(json.dumps(gate_of(run, title, default if variants is None else variants)))
    return run


def report(run: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", "-m", "eval.report", "--study", str(run)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)


def made(run: Path) -> tuple[str, str, str]:
    """stdout, table.md and report.html of a run that succeeds."""
    done = report(run)
    assert done.returncode == 0, done.stderr
    return done.stdout, (run / "table.md").read_text(), (run / "report.html").read_text()


class Page(HTMLParser):
    """Every tag with its attributes; asserts that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str, str, str]:
    run = run_folder(tmp_path_factory.mktemp("runs"))
    return run, *made(run)


def test_terminal_shows_the_table_and_ends_with_the_path(demo):
    run, out, _, _ = demo
    assert out.splitlines()[-1] == str(run / "report.html")
    for row in VARIANTS:
        assert row[0] in out
    assert "int8 *" in out
    assert "not measured" in out
    assert "eval.cost --study runs/x --target gpu" in out


def test_page_is_one_file_that_asks_for_nothing(demo):
    html = demo[3]
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"link", "img", "iframe", "object", "embed", "base"})
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_page_can_be_read_by_ear_and_keyboard(demo):
    page = Page(demo[3])
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("aria-labelledby", "for"):
            assert name not in attributes or attributes[name] in ids
    assert all("scope" in a for tag, a in page.tags if tag == "th")
    pictures = [a for tag, a in page.tags if tag == "svg"]
    assert len(pictures) == 1 + 1 + 4  # the chain, one target that was measured, four arms with curves
    assert all(a["role"] == "img" and a["aria-label"] for a in pictures)
    assert dict(page.tags)["html"]["lang"] == "en"


def test_hostile_words_stay_words(tmp_path):
    odd = {**variant(VARIANTS[1]), "recipe": HOSTILE, "reason": HOSTILE, "engine": HOSTILE}
    _, table, html = made(run_folder(tmp_path, HOSTILE, [odd, variant(VARIANTS[0])]))
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<script>alert" not in html
    assert "alert('x')" in " ".join(page.text)
    assert "<script>" not in table.replace("\\<script>", "")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    for above, below in pairwise(rows):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in (above, below)]
        assert bars[0] == bars[1] or below.startswith(("| arm", "| stage", "| recipe"))


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_every_number_of_the_table_is_the_gates(demo):
    run, _, table, _ = demo
    known = numbers(json.loads((run / "gate.json").read_text()))
    bare = re.sub(r"p(50|95|99)|95 % interval|\b[A-Z]\d|[a-z]+[-a-z]*\d+(-[a-z]\w+)?", "", table)
    shown = re.findall(r"\d+(?:\.\d+)?", re.sub(r"reason .*|[^|]*(?=\|$)", "", bare, flags=re.M))
    assert len(shown) > 150
    for text in shown:
        half = 0.5000001 * 10 ** -len(text.partition(".")[2])
        assert any(abs(abs(n) - float(text)) <= half for n in known), text


def test_same_gate_same_bytes_and_other_times_same_quality(demo, tmp_path):
    run, _, table, html = demo
    assert made(run)[1:] == (table, html)
    slower = [variant((*row[:5], row[5] * 3, *row[6:])) for row in VARIANTS]
    other = made(run_folder(tmp_path, variants=[*slower, variant(VARIANTS[6], "gpu", measured=False)]))[1]
    assert other != table
    assert other.partition("## Cost")[0] == table.partition("## Cost")[0]


def test_percentiles_that_could_not_be_had_are_not_printed(tmp_path):
    first = variant(VARIANTS[0])
    first["cost"]["decode_p95"] |= {"value": None, "upper": None, "needs": 59}
    first["cost"]["prefill_p95"] |= {"value": None, "upper": None}
    _, table, html = made(run_folder(tmp_path, variants=[first]))
    cells = [cell.strip() for cell in table.partition("## Cost")[2].splitlines()[4].split("|")]
    assert cells[6] == "\N{EN DASH}"
    assert cells[8] == "needs 59 requests"
    assert "needs 59 requests" in html
    assert "None" not in table + html
    assert "nan" not in table


def changed(run: Path) -> str:
    """The study with another seed."""
    return (run / "study.yaml").read_text().replace("- 2", "- 7")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: (run / "gate.json").unlink(), "gate.json: missing"),
        (lambda run: (run / "gate.json").write_text("{"), "Invalid JSON"),
        (
            lambda run: (run / "gate.json").write_text('{"schema_version": 99}'),
            "schema_version: Input should be 1",
        ),
        (lambda run: (run / "records/score/int8/S1-s0.json").write_text("{}"), "score/int8/S1-s0.json was"),
        (lambda run: (run / "records/score/int8/S1-s0.json").unlink(), "is absent"),
        (lambda run: (run / "records/score/int8/S1-s1.json").write_text("{}"), "was absent"),
        (lambda run: (run / "study.yaml").write_text(changed(run)), "study.yaml was"),
    ],
)
def test_missing_or_stale_gate_is_refused_in_one_line(tmp_path, spoil, words):
    run = run_folder(tmp_path)
    spoil(run)
    done = report(run)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert f"python -m eval.gate --study {run}" in done.stderr
    assert not (run / "table.md").exists()
    assert not (run / "report.html").exists()


def test_two_thousand_rows_in_reasonable_time(tmp_path):
    many = [variant((f"r{i}", *VARIANTS[i % 8][1:])) for i in range(2000)]
    run = run_folder(tmp_path, variants=many)
    start = time.monotonic()
    _, table, html = made(run)
    assert time.monotonic() - start < 120
    assert "| r1999 |" in table
    assert html.count('<tr class="row">') == 2000
    assert len(html) < 20e6


PRESS = """<script>
const heads = [...document.querySelectorAll(".budget > thead button")];
const named = (text) => heads.find((head) => head.textContent === text);
const read = () => [...document.querySelectorAll("tr.row")].filter((row) => !row.parentNode.hidden)
  .map((row) => row.cells[0].firstChild.textContent.trim()).join(" ");
const seen = [];
named("decode p50, ms").click(); seen.push(read());
named("decode p50, ms").click(); seen.push(read());
named("variant").click(); seen.push(read());
const select = document.getElementById("target");
select.value = "gpu"; select.dispatchEvent(new Event("change")); seen.push(read());
seen.push(document.querySelector("[aria-sort]").textContent, document.documentElement.scrollWidth <= innerWidth);
document.title = seen.join(";");
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_sorts_filters_and_shows_no_error(demo, tmp_path):
    page = tmp_path / "report.html"
    page.write_text(demo[3] + PRESS)
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    quiet += ["--disable-sync", "--disable-background-networking", "--disable-component-update"]
    quiet += [
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=390,800",
        "--dump-dom",
    ]
    command = ["chromium", *quiet, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    up, down, named, gpu, head, fits = title[1].split(";")
    fastest = [row[0] for row in sorted(VARIANTS, key=lambda row: row[5])]
    assert up.split() == [*fastest, "nf4"]  # what was not measured stays last
    assert down.split() == [*fastest[::-1], "nf4"]
    assert named.split()[:3] == ["depth25", "depth25-int8", "int4"]
    assert (gpu, head, fits) == ("nf4", "variant", "true")
    assert ">1 of 9 rows shown<" in done.stdout
