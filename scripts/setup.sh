#!/usr/bin/env bash
# Makes .venv from requirements.lock, unless it is there and of this very lock.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mark=.venv/.lock-installed
if ! cmp -s requirements.lock "$mark"; then
    python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "error: $("$python" --version) found; Python 3.11 or newer is needed (set PYTHON)" >&2; exit 3; }
    "$python" -m venv .venv
    # The build of torch that this machine's index gives, with what that build needs; the rest is pinned.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
    cp requirements.lock "$mark"
fi
