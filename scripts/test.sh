#!/usr/bin/env bash
# Makes the environment and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source .venv/bin/activate
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# The longest file first; a file's tests share one process, because they share what they have made.
(($#)) || set -- tests/test_pipeline.py tests
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
