"""The gate and a sign-off of a run folder, in this process and at a stated time."""

import json
from datetime import UTC, datetime

from eval.core.budget import load_budget
from eval.core.study import load_study
from eval.gate.decision import evaluate_gate
from eval.gate.evidence import collect_evidence
from eval.signoff.__main__ import stated
from eval.signoff.keys import private_key
from eval.signoff.statement import signed

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def gate(run):
    """gate.json as the gate writes it."""
    study = load_study(run.path)
    budget = load_budget(study)
    result = evaluate_gate(collect_evidence(run.path, study, budget), budget).model_dump(mode="json")
    (run.path / "gate.json").write_text(json.dumps(result, indent=1) + "\n")


def sign(run, key, recipe="int8", target="cpu", **given):
    given = {"by": "Ada", "signer": private_key(key), "now": NOW, **given}
    text = signed(stated(run.path, recipe=recipe, target=target, **given), given["signer"])
    path = run.path / "signoff" / f"{recipe}-{target}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
