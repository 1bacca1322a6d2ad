"""The design's layout and arrows, held against the disk."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import ROOT

TOP = {
    "distill", "compress", "eval", "configs", "scripts", "tests", "docs", "pyproject.toml", "README.md",
    "requirements.lock", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
}  # fmt: skip
PACKAGES = ("distill", "compress", "eval")
# They catch everything: of a command, which prints it and ends with 3, of a worker, which sends it to its parent, and
# of what runs the tests' commands.
OUTERMOST = ("eval/core/errors.py", "eval/core/jobs.py", "tests/warm_python.py")


def tracked():
    """Files that git tracks: what a user keeps beside them is no part of the layout."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def sources():
    tops = (*PACKAGES, "scripts", "tests")
    return [ROOT / name for name in tracked() if name.endswith(".py") and name.split("/")[0] in tops]


def test_the_top_level_holds_the_agreed_names_and_no_others():
    assert {name.split("/")[0] for name in tracked() if not name.startswith(".")} == TOP


def test_files_and_functions_stay_small():
    for path in sources():
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path} is too long"
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 80, f"{path}:{node.name} has {lines} lines"


def test_eval_is_a_house_of_rooms_with_at_most_twelve_files():
    modules = [Path(name) for name in tracked() if name.startswith("eval/") and name.endswith(".py")]
    files = Counter(path.parent for path in modules if path.name != "__init__.py")
    assert files.pop(Path("eval"), 0) <= 2
    assert max(files.values()) <= 12, files.most_common(1)


def test_eval_is_imported_by_name_and_no_error_is_swallowed():
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] != "eval" for a in node.names), f"{path}: rebinds a builtin"
            if isinstance(node, ast.ExceptHandler):
                names = ast.unparse(node.type) if node.type else "everything"
                outermost = (
                    path.relative_to(ROOT).as_posix() in OUTERMOST
                )  # elsewhere what raises it as its own
                assert (
                    outermost
                    or isinstance(node.body[-1], ast.Raise)
                    or names not in ("everything", "Exception", "BaseException")
                ), f"{path}:{node.lineno}"
                assert not all(isinstance(s, ast.Pass) for s in node.body), f"{path}:{node.lineno}"


def test_no_file_of_distill_bears_the_name_of_another_module():
    """`accelerate launch distill/train.py` puts distill/ first on the path."""
    done = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(*m.packages_distributions())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    taken = set(done.stdout.split()) | set(sys.stdlib_module_names)
    assert not {p.stem for p in (ROOT / "distill").glob("*.py")} & (taken - {"__init__"})


def test_the_import_contracts_hold():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_lock_pins_everything_and_leaves_torch_to_the_machine():
    lines = (ROOT / "requirements.lock").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+-]+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names) > 50
    assert not {"torch", "torchvision", "torchaudio", "scikit-learn"} & set(names)


def test_the_tree_in_the_readme_shows_every_file_or_its_room_and_nothing_else():
    """The line of a package stands for the files at its root; each of its rooms has a line of its own."""
    block = (ROOT / "README.md").read_text().split("<!-- tree -->")[1].split("```")[1]
    shown = {line.split()[0] for line in block.splitlines() if line.strip()}
    files = [name for name in tracked() if not name.startswith(".")]
    folders = {f"{folder}/" for name in files for folder in Path(name).parents} - {"./"}
    assert not shown - {*files, *folders}
    for name in files:
        above = [f"{folder}/" for folder in Path(name).parents]
        if above[0] not in {f"{package}/" for package in PACKAGES}:
            above = [folder for folder in above if folder.rstrip("/") not in PACKAGES]
        assert shown & {name, *above}, f"{name}: neither it nor its room is shown"
