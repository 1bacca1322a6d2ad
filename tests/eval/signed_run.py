"""The gate and a sign-off of a run folder, in this process and at a stated time."""

import json
from datetime import UTC, datetime

from eval.budget import load_budget
from eval.evidence import collect
from eval.judge import judged
from eval.keys import private_key
from eval.signoff import stated
from eval.statement import signed
from eval.study import load_study

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


def gate(run):
    """gate.json as the gate writes it."""
    study = load_study(run.path)
    budget = load_budget(study)
    result = judged(collect(run.path, study, budget), budget).model_dump(mode="json")
    (run.path / "gate.json").write_text(json.dumps(result, indent=1) + "\n")


def sign(run, key, recipe="int8", target="cpu", **given):
    given = {"by": "Ada", "signer": private_key(key), "now": NOW, **given}
    text = signed(stated(run.path, recipe=recipe, target=target, **given), given["signer"])
    path = run.path / "signoff" / f"{recipe}-{target}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
