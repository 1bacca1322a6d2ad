#!/usr/bin/env bash
# Makes .venv from requirements.lock, unless it is there and of this very lock. A link to one is used as it is:
# it belongs to another folder, and installing this one there would turn that one's commands here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mark=.venv/.lock-installed
if [[ ! -L .venv ]] && ! cat requirements.lock pyproject.toml | cmp -s - "$mark"; then
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $("$python" --version) found; Python 3.11 or newer is needed (set PYTHON)" >&2; exit 3; }
    [[ -x .venv/bin/python ]] || "$python" -m venv .venv
    echo "installing into .venv: torch, then the packages of requirements.lock; 2.8 GB, some minutes" >&2
    # The build of torch that this machine's index gives, with what that build needs; the rest is pinned.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
    # `absorb`, and the packages for notebooks and plug-ins anywhere; they run from this folder.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    cat requirements.lock pyproject.toml >"$mark"
fi
