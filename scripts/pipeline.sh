#!/usr/bin/env bash
# The whole pipeline, and its true documentation: bash scripts/pipeline.sh [STUDY.yaml]
# From nothing to a budget table. What is done already is recognised by hash and not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
study="${1:-configs/studies/default.yaml}"

bash scripts/setup.sh
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

accelerate launch distill/train.py --config "$study" # bases, teachers, students S1, S0 and CE, scored
python -m compress.run --study "$study"              # recipes x {S1, S0} x seeds
python -m eval.score --study "$study"                # quality of every model, in new processes
python -m eval.cost --study "$study" --target cpu    # latency, memory, size, in fresh processes
verdict=0
python -m eval.gate --study "$study" || verdict=$?   # 0 pass, 1 fail, 2 inconclusive
((verdict < 3)) || exit "$verdict"
python -m eval.report --study "$study" # table and report.html
exit "$verdict"
