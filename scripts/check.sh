#!/usr/bin/env bash
# Format, lint, types and import contracts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source .venv/bin/activate
ruff format --check .
ruff check .
mypy
lint-imports
