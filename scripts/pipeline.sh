#!/usr/bin/env bash
# The whole pipeline, and its true documentation: bash scripts/pipeline.sh [STUDY.yaml]
# From nothing to a budget table. What is done already is recognised by hash and not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
study="${1:-configs/studies/default.yaml}"

bash scripts/setup.sh
source .venv/bin/activate
export TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1

step() { # a mistake ends in 3, which is no verdict, and Ctrl-C in 130
    local code=0
    "$@" || code=$?
    ((code == 0)) || exit $((code == 130 ? 130 : 3))
}

todo=0
python scripts/finished.py --study "$study" || todo=$? # 0 all done, 1 something to do, 3 a bad study
((todo < 2)) || exit 3
if ((todo)); then
    # Bases, teachers, and the students S1, S0 and CE.
    step python distill/train.py --config "$study"
    step python -m compress.run --study "$study"           # recipes x {S1, S0} x seeds
    step python -m eval.score --study "$study"             # quality of every model, in new processes
    step python -m eval.score.agreement --study "$study" --documents 48 # flips and KL; without the number on all
    step python -m eval.cost --study "$study" --target cpu # latency, memory and size, in fresh processes
    python scripts/finished.py --study "$study" --mark & # beside the verdict, which changes nothing that it reads
fi
verdict=0
python -m eval.gate --study "$study" >/dev/null || verdict=$? # 0 pass, 1 fail, 2 inconclusive, 3 error
((verdict < 3)) || exit "$verdict"
python -m eval.report --study "$study" # the table here, table.md and report.html in the run's folder
wait
exit "$verdict"
