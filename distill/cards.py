"""Model cards of exported models, with their lineage."""

from huggingface_hub import ModelCard, ModelCardData

from distill.method import make_method
from eval.study import Study

ROLES = {
    "B": "the plain base: what could be shipped instead",
    "S1": "the student of the teacher that carries the method",
    "S0": "the control student, of the teacher without the method",
    "CE": "trained on the text alone, for as many steps as the students",
}


def model_card(study: Study, arm: str, seed: int) -> str:
    """README.md of one exported model: what it is, what it was made of, how to load it."""
    base = study.base.path if arm != "B" else None
    data = ModelCardData(base_model=base, library_name="transformers", pipeline_tag="text-generation")
    text = f"""---
{data.to_yaml()}
---

# {study.name}: {arm}, seed {seed}

This is {ROLES[arm]} in the study `{study.name}`. It is a plain causal language model: load it with
`transformers.AutoModelForCausalLM.from_pretrained`. What it was made of, and the hash of every file, stands
in `manifest.json`.
"""
    if arm in ("S1", "S0"):
        card = make_method(study.method).card
        text += f"""
- method of the study: {card.title} ({card.paper})
- claim under test: {card.claim}
- known limits of the method: {card.limits}
"""
    return str(ModelCard(text))
