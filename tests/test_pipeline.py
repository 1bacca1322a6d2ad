"""The whole pipeline as people run it, on the tiny study, and the commands of the documents."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date, timedelta
from itertools import pairwise

import httpx
import pytest
import yaml

from eval.core.config import read_yaml, validate_config
from eval.watch.routing import Plan
from scripts.bench_server import free_port
from tests.eval.test_rollout import requests, write_log
from tests.helpers import ROOT, complete, run

pytestmark = pytest.mark.slow
HELP = """
import runpy, sys
for module in sys.argv[1:]:
    print("=====")
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, module
"""


def pipeline(study, timeout=900):
    return complete(["bash", "scripts/pipeline.sh", study], timeout, env={"COLUMNS": "200"})


def lasting(folder):
    """What a run found that is no measurement of time: verdicts, scores, shares, hashes."""
    gate = json.loads((folder / "gate.json").read_text())
    variants = [
        {key: v[key] for key in ("recipe", "engine", "kept_share", "guard_share", "scores", "slices")}
        for v in gate["variants"]
        if v["target"] == "cpu"
    ]
    return {key: gate[key] for key in ("teacher_gain", "scores", "kept_by_student")} | {"variants": variants}


def quality(folder):
    """The part of the table that measures no time, to the byte."""
    return (folder / "table.md").read_text().split("## Quality")[1].split("## Cost")[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    raw = read_yaml(ROOT / "configs" / "studies" / "tiny.yaml")
    study = folder / "study.yaml"
    study.write_text(yaml.safe_dump({**raw, "runs": str(folder / "runs")}))
    return study, folder / "runs" / "tiny", pipeline(study)


def test_the_pipeline_ends_in_a_table_a_report_and_a_verdict(tiny):
    _, folder, done = tiny
    assert done.returncode in (0, 1, 2), done.stderr
    assert str(folder / "report.html") in done.stdout.replace("\n", "")
    gate = json.loads((folder / "gate.json").read_text())
    assert gate["schema_version"] == 3
    assert {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 2}[gate["verdict"]] == done.returncode
    assert {(v["recipe"], v["target"]) for v in gate["variants"]} >= {
        ("plain", "cpu"),
        ("int8", "cpu"),
        ("wanda50", "cpu"),
    }
    measured = next(v for v in gate["variants"] if (v["recipe"], v["target"]) == ("int8", "cpu"))
    assert measured["cost"]["decode_p50"]["upper"] >= measured["cost"]["decode_p50"]["value"] > 0
    assert "<html" in (folder / "report.html").read_text()
    assert (folder / "table.md").read_text()


def test_a_second_call_finds_everything_done(tiny):
    study, folder, _ = tiny
    before = {p: p.read_bytes() for p in folder.glob("records/**/*.json")}
    table = (folder / "table.md").read_bytes()
    assert pipeline(study).returncode in (0, 1, 2)
    assert {p: p.read_bytes() for p in before} == before
    assert (folder / "table.md").read_bytes() == table


def test_killed_at_random_moments_it_ends_in_the_same_table(tiny, tmp_path):
    """kill -9 of the whole process group, five times, somewhere in what is still to do."""
    study, folder, _ = tiny
    raw = yaml.safe_load(study.read_text())
    copy, again = tmp_path / "study.yaml", tmp_path / "runs" / "tiny"
    copy.write_text(yaml.safe_dump({**raw, "runs": str(tmp_path / "runs")}))
    rng, alive = random.Random(0), 0
    for _ in range(5):
        process = subprocess.Popen(
            ["bash", "scripts/pipeline.sh", str(copy)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(rng.uniform(3, 10))
        alive += process.poll() is None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert alive == 5, "the study was over before it could be killed"
    assert pipeline(copy).returncode in (0, 1, 2)
    assert lasting(again) == lasting(folder)
    assert quality(again) == quality(folder)
    assert not list(again.rglob("*.tmp"))


def test_ctrl_c_ends_it_in_one_line_and_130(tiny, tmp_path):
    copy = tmp_path / "study.yaml"
    copy.write_text(yaml.safe_dump({**yaml.safe_load(tiny[0].read_text()), "runs": str(tmp_path / "runs")}))
    process = subprocess.Popen(
        ["bash", "scripts/pipeline.sh", str(copy)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "runs/tiny/data/manifest.json").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(2.0)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert shown.splitlines()[-1] == "stopped; the same command goes on where it was"


def test_every_python_command_of_the_documents_is_a_command(tiny):
    """`python -m x.y` and scripts named in the documents exist and tell their usage."""
    texts = [
        p.read_text() for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    ]
    modules = sorted(
        {m for text in texts for m in re.findall(r"python -m ((?:distill|compress|eval)(?:\.\w+)+)", text)}
    )
    assert {"eval.gate", "eval.report", "compress.run"} <= set(modules)
    done = run("-c", HELP, *modules)  # in one process: most of their time is that of their imports
    assert done.returncode == 0, done.stderr
    usages = done.stdout.split("=====\n")[1:]
    assert len(usages) == len(modules)
    assert all("--study" in usage or "--release" in usage for usage in usages)
    scripts = {m for text in texts for m in re.findall(r"scripts/[\w.]+", text)}
    assert all((ROOT / script).is_file() for script in scripts), scripts


README = (ROOT / "README.md").read_text()


OUR_FILES = ("requests.jsonl", "history.jsonl", "sample.jsonl")  # that the README names
KEYS = ("ada", "ada.pub", "ops", "ops.pub")


def commands(heading):
    """The lines of the first bash block under a heading of the README, without their comments."""
    block = README.split(f"## {heading}\n")[1].split("```bash\n")[1].split("```")[0]
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def as_here(words, study, folder, tmp_path):
    """A command as printed, but for its study, the variant, and the places of keys and new documents."""
    here = {
        "configs/studies/default.yaml": str(study), "runs/default": str(folder), "int4": "int8",
        "runs/default/release/int4": str(folder / "release" / "int8"),
        **{f"~/keys/{name}": str(tmp_path / name) for name in KEYS},
        "my/new.jsonl": str(tmp_path / "new.jsonl"), "rollouts/first": str(tmp_path / "first"),
        **{name: str(tmp_path / name) for name in OUR_FILES},
    }  # fmt: skip
    words = [here.get(word, word) for word in words]
    starts = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.launch"]}
    program, rest = words[0], words[2:] if words[0] == "accelerate" else words[1:]
    return [*starts[program], *rest]


JUDGES = {"eval.gate", "eval.gate.test_set"} | {f"eval.watch.{n}" for n in ("recheck", "monitor", "rollout")}


def serves(command):
    """Starts a server, waits until it can answer, and ends it as Ctrl-C does."""
    address = f"http://127.0.0.1:{(port := free_port())}/healthz"
    process = subprocess.Popen([*command, "--port", str(port)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with process:
        end, ready = time.monotonic() + 120, False
        while not ready:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end, "not ready in two minutes"
            time.sleep(0.5)
            with suppress(httpx.TransportError):
                ready = (answer := httpx.get(address)).status_code == 200
        assert answer.json()["status"] == "release is on"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode in (0, 130)


def verdict_of(folder, recipe):
    gate = json.loads((folder / "gate.json").read_text())
    return next(v["verdict"] for v in gate["variants"] if (v["recipe"], v["target"]) == (recipe, "cpu"))


def test_the_readme_s_commands_run_as_printed(tiny, tmp_path):
    """Stage by stage, then from a verdict to a release; a variant that does not pass is signed with a waiver."""
    study, folder, _ = tiny
    lines = [f"The function number {i} returns the value of its argument plus {i}.\n" * 8 for i in range(12)]
    for name in ("new.jsonl", "sample.jsonl"):
        (tmp_path / name).write_text(
            "".join(json.dumps({"text": f"{name}: {line}"}) + "\n" for line in lines)
        )
    plan = validate_config(Plan, read_yaml(ROOT / "configs/rollouts/default.yaml"), "plan")
    write_log(tmp_path / "requests.jsonl", requests(plan, 1, 40))
    stages, release = commands("Stage by stage"), commands("From a verdict to a release")
    assert len(stages) >= 7
    assert len(release) >= 9
    for words in [*stages, *release]:
        command = as_here(words, study, folder, tmp_path)
        if "eval.signoff" in command and "--by" in command and verdict_of(folder, "int8") != "PASS":
            command += ["--waive", "tiny on purpose", "--expires", str(date.today() + timedelta(days=30))]
        if "eval.serve" in command:
            serves(command)
            continue
        done = complete(command, timeout=600)
        judges = JUDGES & set(command)
        assert done.returncode in ((0, 1, 2) if judges else (0,)), f"{words}: {done.stdout}{done.stderr}"
    assert (folder / "release" / "int8" / "contract.yaml").is_file()
    assert "Ada L." in (folder / "signoff" / "index.html").read_text()


def test_the_files_that_the_architecture_names_are_there():
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = set(re.findall(r"`((?:distill|compress|eval|configs|docs)/[\w./]+\.\w+)`", text))
    assert len(names) > 20
    assert not [name for name in names if not (ROOT / name).exists()]
    walk = text.split("## One batch")[1].split("## One score")[0]
    steps = re.findall(r"^\d\. `([\w/]+\.py)`", walk, flags=re.MULTILINE)
    assert steps[0] == "distill/train.py"
    assert len(steps) <= 6
    for above, below in pairwise(steps):
        module = below.removesuffix(".py").replace("/", ".")
        assert f"from {module} import" in (ROOT / above).read_text(), f"{above} does not import {below}"


def test_the_python_of_the_documents_runs(tiny, tmp_path):
    """As printed but for the place of its run; the verdict is that of the run that is there."""
    _, folder, _ = tiny
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    code = "".join(blocks).replace("runs/notebook", str(tmp_path)).replace("runs/tiny", str(folder))
    body = "\n".join(f"    {line}" for line in code.splitlines())
    (tmp_path / "notebook.py").write_text(f"if __name__ == '__main__':\n{body}\n")
    done = run(tmp_path / "notebook.py", PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[0] in ("PASS", "FAIL", "INCONCLUSIVE")
    assert (tmp_path / "tiny" / "students" / "S1" / "s0" / "manifest.json").is_file()
