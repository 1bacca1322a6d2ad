"""Model cards of exported models, with their lineage."""

from huggingface_hub import ModelCard, ModelCardData

from eval.core.sections import NamedModel
from eval.core.study import Study

AS_LONG = ", for as many steps as the students"
ROLES = {
    "B": "the plain base: what could be shipped instead",
    "T": "the pretrained model that teaches in place of the base",
    "S1": "the student of the teacher that carries the method",
    "S0": "the control student, of the teacher without the method",
    "CE": f"trained on the text alone{AS_LONG}",
}
KINDS = {  # task -> what a model is, and what loads it
    "causal_lm": ("causal language model", "AutoModelForCausalLM"),
    "classification": ("text classifier", "AutoModelForSequenceClassification"),
}
ON_POLICY = "trained without a teacher, on what it wrote itself, each token with the advantage 1"


def front_matter(
    study: Study, arm: str, seed: int | None, parents: dict[str, str], teacher: NamedModel | None
) -> ModelCardData:
    """Metadata for programs: the base, the method, and the hashes of all that the model was made from."""
    named: NamedModel = teacher or study.base
    if arm not in ("B", "T") and study.student.path is not None:
        named = NamedModel(path=study.student.path)
    return ModelCardData(
        base_model=named.path if named.is_on_hub else None,  # a file has no hub name
        library_name="transformers",
        pipeline_tag="text-classification" if study.data.labels else "text-generation",
        lineage={
            "study": study.name,
            "study_sha256": study.hash(),
            "arm": arm,
            **({} if seed is None else {"seed": seed}),
            **({"method": study.method.name} if arm == "S1" else {}),
            **(
                {"tuning": study.student.tuning, "start": study.student.start}
                if arm not in ("B", "T")
                else {}
            ),
            "parents_sha256": parents,
        },
    )


def model_card(
    study: Study,
    arm: str,
    seed: int | None,
    parents: dict[str, str],
    method: dict[str, str] | None = None,
    teacher: NamedModel | None = None,
) -> str:
    """README.md of one exported model: what it is, what it was made of, how to load it.

    Args:
        seed: None for a model that no seed changed.
        method: the card of the study's method, for S1 and S0.
        teacher: the pretrained model that this one is, for T.
    """
    role = ON_POLICY if arm == "CE" and study.ce_arm == "on_policy" else ROLES[arm]
    if own := study.own_training_text(arm):
        role = f"{role.removesuffix(AS_LONG)}, with settings of its own: {own}"
    kind, loader = KINDS[study.task]
    title = f"{study.name}: {arm}" + ("" if seed is None else f", seed {seed}")
    text = f"""---
{front_matter(study, arm, seed, parents, teacher).to_yaml()}
---

# {title}

This is {role} in the study `{study.name}`. It is a plain {kind}: load it with
`transformers.{loader}.from_pretrained`. What it was made of stands above; the hash of every file
stands in `manifest.json`.
"""
    if method is not None and study.teacher is not None:
        named, server = study.teacher, study.teacher.server
        paths = ", ".join(str(member.path) for member in named.mix) or named.path
        text += f"""
- teacher of the study: {paths or named.file if server is None else f"{server.model}, behind a server"}
"""
    if method is not None:
        text += f"""
- method of the study: {method["title"]} ({method["paper"]})
- claim under test: {method["claim"]}
- known limits of the method: {method["limits"]}
"""
    return str(ModelCard(text))
