"""`absorb`, through the real command line: in no run, in a run half done, and as every other command."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eval.cli import FLOW, MODULES, SIDE_COMMANDS, Step, next_command
from eval.core.artifacts import read_manifest
from eval.core.budget import Budget, Limit, Target
from eval.core.commands import LOG, describe_fields
from eval.core.errors import UserError
from eval.core.jobs import lock_folder
from eval.core.records import read_costs, write_record
from eval.core.sections import Corruption, Source, Task
from eval.core.sections.recipe import RecipeFile
from eval.core.study import Study, load_study, make_run_folder, save_study
from tests.eval.run_builder import Run, edit, put
from tests.helpers import ROOT, run


def absorb(*words, cwd=None):
    command = f"import os, sys; os.chdir({str(cwd or ROOT)!r}); sys.path.insert(0, {str(ROOT)!r}); "
    command += "sys.argv = ['absorb', *sys.argv[1:]]; from eval.cli import main; main()"
    return run("-c", command, *words, PYTHONPATH=str(ROOT))


def test_in_an_empty_folder_it_shows_the_flow_and_where_to_start(tmp_path):
    done = absorb(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("train → compress → score → cost → gate → report → sign → release → watch")
    assert "no run folder here" in done.stdout
    assert "next: absorb train --config" in done.stdout


def test_in_a_run_it_shows_what_is_done_and_the_next_command(tmp_path):
    study = load_study(ROOT / "configs" / "studies" / "tiny.yaml", ["--runs", str(tmp_path / "runs")])
    save_study(study) if make_run_folder(study) else None
    (study.folder / "data").mkdir()
    inside, above = absorb(cwd=study.folder), absorb(cwd=tmp_path)
    for done in (inside, above):
        assert done.returncode == 0, done.stderr
        assert "· absorb train" in done.stdout
        assert "[0 of 6 students]" in done.stdout
        assert "next: absorb train --config" in done.stdout
    for arm in study.student_arms:
        for seed in study.seeds:
            put(study.folder, f"students/{arm}/s{seed}", lambda folder: (folder / "model").write_text(""))
    done = absorb("--study", study.folder)
    assert "✔ absorb train" in done.stdout
    assert f"next: absorb compress --study {study.folder}" in done.stdout
    (study.folder / "gate.json").write_text(json.dumps({"verdict": "FAIL", "reason": "too slow"}))
    assert "✔ absorb gate" in (shown := absorb("--study", study.folder).stdout)
    assert "[FAIL: too slow]" in shown
    (study.folder / "gate.json").write_text("{")
    shown = absorb("--study", study.folder).stdout
    assert "· absorb gate" in shown
    assert "[gate.json cannot be read]" in shown
    (study.folder / "gate.json").write_text(json.dumps({"verdict": "FAIL", "reason": "too slow"}))
    record = study.folder / "records" / "score" / "plain" / "S1-s0.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    os.utime(study.folder / "gate.json", (0, 0))
    shown = absorb("--study", study.folder).stdout
    assert "· absorb gate" in shown
    assert "[FAIL: too slow, of records that have changed since]" in shown
    with lock_folder(study.folder):
        assert f"next: process {os.getpid()} is at work in this run" in absorb("--study", study.folder).stdout
    assert "at work" not in absorb("--study", study.folder).stdout


def test_costs_are_done_when_every_variant_of_every_required_target_is_measured(tmp_path):
    one = Run(tmp_path)
    one.budget["targets"]["edge"] = one.budget["targets"]["cpu"]
    one.make()
    shown = absorb("--study", one.path).stdout
    variants = len(one.recipes) + 2
    assert f"[cpu: {variants - 1} of {variants} variants, edge: 0 of {variants} variants]" in shown, "no base"
    assert f"next: absorb cost --study {one.path} --target cpu" in shown
    base = read_manifest(one.path / "base/s0").hash
    for target in ("cpu", "edge"):
        for recipe in ("plain", *one.recipes):
            one.cost(recipe, 1.0, target)
        record = next(r for r in read_costs(one.path) if (r.recipe, r.target) == ("plain", target))
        source = record.provenance.model_copy(update={"artifact": base})
        write_record(one.path, record.model_copy(update={"arm": "B", "provenance": source}))
        shown = absorb("--study", one.path).stdout
        assert ("✔ absorb cost" in shown) == (target == "edge")
    assert f"next: absorb gate --study {one.path}" in shown
    path = one.path / "records/cost/edge/plain/S1-s0.json"
    edit(path, lambda record: record["provenance"].update(artifact="0" * 64))
    shown = absorb("--study", one.path).stdout
    assert f"edge: {variants - 1} of {variants} variants]" in shown, "of other bytes"


def test_a_folder_that_is_no_run_and_an_unknown_command_are_refused(tmp_path):
    done = absorb("--study", tmp_path)
    assert done.returncode == 3
    assert "no run folder; give a folder that `absorb train` made" in done.stderr
    done = absorb("gat")
    assert done.returncode == 3
    assert "did you mean 'gate'?" in done.stderr
    done = absorb("--nope")
    assert (done.returncode, done.stderr) == (
        3,
        "error: absorb: unrecognized arguments: --nope; --help lists what it takes\n",
    )
    assert "study: ''; give a YAML file, a run folder" in absorb("--study", "").stderr


def study_run(folder):
    """A run folder of the tiny study, as training starts it."""
    study = load_study("tiny", ["--runs", str(folder / "runs")])
    save_study(study) if make_run_folder(study) else None
    (study.folder / "data").mkdir()
    return study


def test_a_study_is_named_by_file_folder_or_name_and_inside_its_run_by_nothing(tmp_path, monkeypatch):
    study = study_run(tmp_path)
    assert load_study("tiny").name == "tiny"
    monkeypatch.chdir(study.folder)
    assert load_study(None).folder == study.folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"a run folder \(the newest here is runs/tiny\), or call this inside"
    ):
        load_study(None)
    with pytest.raises(UserError, match="'runs/tny': no such file or folder; did you mean 'runs/tiny'"):
        load_study("runs/tny")
    with pytest.raises(UserError, match="'tiniy': no such file or folder; did you mean 'tiny'"):
        load_study("tiniy")
    with pytest.raises(UserError, match="a run folder or one of default, harmful, "):
        load_study("configs/none")
    with pytest.raises(UserError, match=r"no study\.yaml; give a folder that"):
        load_study(tmp_path)


def test_a_run_is_found_by_its_settled_file_and_behind_a_link(tmp_path, monkeypatch):
    folder = study_run(tmp_path).folder
    moved = folder.rename(tmp_path / "tiny")  # its `runs` is no longer true
    assert load_study(moved / "study.yaml").folder == moved
    monkeypatch.chdir(moved)
    assert load_study("study.yaml").folder == moved
    (tmp_path / "link").symlink_to(moved)
    assert load_study(tmp_path / "link").folder == moved
    renamed = moved.rename(moved.with_name("other"))
    (tmp_path / "tiny").symlink_to(renamed)
    with pytest.raises(UserError, match=f"run folder {renamed}: its study.yaml is of 'tiny'; rename"):
        load_study(tmp_path / "tiny")


def test_a_command_speaks_of_itself_as_it_was_typed_and_finds_the_run_it_is_in(tmp_path):
    study = study_run(tmp_path)
    done = absorb("gate", "--help")
    assert done.stdout.startswith("usage: absorb gate ")
    assert done.stdout.index("keys of the study") < done.stdout.index("options:"), (
        "its own options are seen last"
    )
    assert run("-m", "eval.gate", "--help").stdout.startswith("usage: python -m eval.gate ")
    assert absorb("watch", "--help").stdout.startswith("usage: absorb watch ")
    done = absorb("gate", cwd=study.folder)
    assert done.returncode == 3
    assert done.stderr.endswith(f"no score record; run absorb train --config {study.folder}\n"), (
        "the first step"
    )
    done = absorb("power", "--study", study.folder, "--among", "0")
    assert done.stderr == (
        "error: absorb power: argument --among: found '0', expected a whole number, 1 or more; "
        "--help lists what it takes\n"
    )
    for flag in ("--gain", "--share"):
        done = absorb("power", "--study", study.folder, flag, "-1")
        assert f"argument {flag}: found '-1', expected a number above 0" in done.stderr


def test_a_result_takes_the_place_of_no_file_of_a_run_and_a_mistyped_study_is_named(tmp_path):
    study = study_run(tmp_path)
    plan = study.folder / "plan.json"
    plan.write_text("{}")
    done = absorb("gate", "--study", study.folder, "--json", plan)
    assert (done.returncode, plan.read_text()) == (3, "{}")
    assert f"--json {plan}: is a file of a run; give a path outside of it" in done.stderr
    done = absorb("gate", "--stduy", study.folder)
    assert done.returncode == 3
    assert "no option --stduy; did you mean --study?" in done.stderr


def test_a_file_in_the_place_of_a_module_of_python_is_named(tmp_path):
    (tmp_path / "queue.py").write_text("raise ImportError\n")
    done = absorb("gate", "--study", "tiny", cwd=tmp_path)
    assert done.returncode == 3
    assert "queue.py: has the name of a module of Python" in done.stderr


def test_a_terminal_that_lacks_a_letter_shows_another(tmp_path):
    env = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "eval.cli"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=False)
    assert (done.returncode, done.stdout[:18]) == (0, b"train ? compress ?"), done.stderr


def test_closed_streams_and_damaged_notes_are_no_trouble(tmp_path):
    study = study_run(tmp_path)
    quiet = (
        f"exec {shlex.quote(sys.executable)} -m eval.gate --study {shlex.quote(str(study.folder))} >&- 2>&-"
    )
    assert subprocess.run(["bash", "-c", quiet], cwd=ROOT, check=False).returncode == 3
    (study.folder / ".lock").write_bytes(b"\xff\xfe")
    with lock_folder(study.folder):
        (study.folder / ".lock").write_bytes(b"\xff\xfe")
        assert "is at work in this run" in absorb("--study", study.folder).stdout


def test_help_needs_no_heavy_library():
    script = "import sys; sys.argv = ['absorb', '--help']; from eval.cli import main\n"
    script += "try: main()\nexcept SystemExit: print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = run("-c", script)
    assert done.stdout.splitlines()[-1] == "False False"
    assert all(f"  {name} " in done.stdout for name in MODULES)


def test_every_command_of_the_flow_is_a_module_and_lists_its_arguments():
    assert {*FLOW, *SIDE_COMMANDS} == set(MODULES)
    done = absorb("gate", "--help")
    assert done.returncode == 0, done.stderr
    assert "--budget BUDGET" in done.stdout
    for key in ("--seeds", "--data.context", "--train.optimizer.lr", "--cost.processes"):
        assert key in done.stdout, key


def test_every_key_of_a_study_is_described_once():
    rows = list(describe_fields(Study))
    keys = [key for key, *_ in rows]
    assert len(keys) == len(set(keys)) > 60
    shown = {key: (kind, default) for key, kind, default, _ in rows}
    assert shown["data.context"] == ("int", "256")
    assert shown["train.optimizer.lr"] == ("float", "0.001")
    assert "those of train." in next(meaning for key, _, _, meaning in rows if key == "base.train")


def test_every_key_of_a_config_carries_its_meaning():
    for model in (Study, Budget, Target, Limit, RecipeFile, Source, Corruption, Task):
        assert [key for key, _, _, meaning in describe_fields(model) if not meaning] == [], model


FAILING = """
import sys
from pathlib import Path
from eval.core.commands import start_log
from eval.core.errors import UserError, entry

@entry
def main():
    start_log(Path(sys.argv[1]))
    print("the words before")
    {}

main()
"""


def test_the_traceback_of_an_operating_system_error_is_in_the_log(tmp_path):
    done = run("-c", FAILING.format("open('/nowhere/file')"), tmp_path)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        f"error: [Errno 2] No such file or directory: '/nowhere/file'; the traceback is in {tmp_path / LOG}"
    ]
    assert "Traceback (most recent call last)" in (tmp_path / LOG).read_text()


def test_bad_input_has_one_line_and_no_traceback(tmp_path):
    done = run("-c", FAILING.format("raise UserError('x', 1, 'give 2')"), tmp_path)
    assert (done.returncode, done.stderr) == (3, "error: x: 1; give 2\n")
    assert "Traceback" not in (tmp_path / LOG).read_text()


def test_an_operating_system_error_without_a_log_is_one_line():
    done = run("-c", FAILING.format("open('/nowhere/file')"), "/nowhere")
    assert done.returncode == 3
    assert done.stderr == "error: [Errno 2] No such file or directory: '/nowhere/file'\n"


def test_the_text_of_an_early_exit_is_printed():
    done = run("-c", FAILING.format("sys.exit('nothing to do here')"), "/nowhere")
    assert (done.returncode, done.stderr) == (3, "nothing to do here\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_change_how_a_command_ends(tmp_path):
    (tmp_path / LOG).symlink_to("/dev/full")
    problem = "No space left on device; this command goes on without its log"
    warning = f"warning: {tmp_path / LOG}: {problem}\n"
    done = run("-c", FAILING.format("return 0"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the words before\n", warning)
    done = run("-c", FAILING.format("raise OSError(28, 'No space left on device')"), tmp_path)
    assert done.returncode == 3
    assert done.stderr == f"{warning}error: [Errno 28] No space left on device\n"


def test_a_reader_that_has_enough_ends_it_in_silence(tmp_path):
    script = FAILING.format("print('line\\n' * 100_000)")
    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$0" -c "$1" "$2" | head -1; echo ${PIPESTATUS[0]}',
            sys.executable,
            script,
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("the words before\n141\n", "")


def test_what_goes_by_stands_in_the_run_s_log_with_its_time_and_a_traceback_stays_there(tmp_path):
    script = """
import sys
from pathlib import Path
from eval.core.commands import start_log
from eval.core.errors import entry

@entry
def main():
    start_log(Path(sys.argv[1]))
    print("\\x1b[32mPASS\\x1b[0m: shipped")
    print("\\x1b[2Kbar", end="", file=sys.stderr)
    raise RuntimeError("the library's own words")

main()
"""
    done = run("-c", script, tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert f"RuntimeError: the library's own words; the traceback is in {tmp_path / LOG}" in done.stderr
    text = (tmp_path / LOG).read_text()
    lines = [line for line in text.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ \d+ ", line)]
    assert lines[0].endswith(f"$ -c {tmp_path}")
    assert lines[1].endswith(" PASS: shipped")
    assert "bar" not in text
    assert "Traceback (most recent call last)" in text


def test_after_a_verdict_that_does_not_pass_the_next_command_is_an_honest_one():
    state = "INCONCLUSIVE: too few seeds"
    assert next_command(Path("runs/x"), Step("sign", False, missing=state)).startswith("absorb power --study")
    assert "sign" not in next_command(Path("runs/x"), Step("sign", False, missing="FAIL: too slow"))
    assert next_command(Path("runs/x"), Step("sign", False)).startswith("absorb sign --study runs/x")


def test_help_and_mistakes_need_no_torch():
    """A second and more of imports comes after the command line was read."""
    script = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    script += "    assert 'torch' not in sys.modules, name\n"
    rooms = {name: (ROOT / name.replace(".", "/")).is_dir() for name in MODULES.values()}
    done = run("-c", script, *(f"{name}.__main__" if is_room else name for name, is_room in rooms.items()))
    assert done.returncode == 0, done.stderr


def test_advice_names_the_short_commands_everywhere():
    """One way to say what to run next; docstrings alone name a command as the module that it is."""
    for package in ("distill", "compress", "eval"):
        for path in sorted((ROOT / package).rglob("*.py")):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            texts = (n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
            for text in texts:
                spelled_out = re.search(r"python -m (eval|compress)\b", text.value)
                assert id(text) in docstrings or not spelled_out, f"{path}:{text.lineno}"
        for path in sorted((ROOT / package).rglob("*.j2")):
            assert "python -m" not in path.read_text(), path
