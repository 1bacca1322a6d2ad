"""The tasks of a study: prompts with known answers, scored beside its documents."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from eval.core.config import Frozen


class Harness(Frozen):
    """How lm-evaluation-harness asks a model; what is not given is as its task and the tokenizer have it."""

    chat_template: bool = Field(False, description="write prompts by the tokenizer's chat template")
    shots: int | None = Field(
        None, ge=0, description="solved examples in front; none: as many as the task has"
    )
    bos: bool | None = Field(None, description="begin texts with BOS; none: as the tokenizer does")
    generation: dict[str, Any] = Field(
        {}, description="settings of generated answers over those of the task, such as `max_gen_toks`"
    )


class Task(Frozen):
    """Prompts with answers: a JSONL file, or a task of lm-evaluation-harness as `lm_eval:NAME`."""

    kind: Literal["multiple_choice", "exact_match", "f1", "lm_eval"] = Field(
        description="how answers are scored; `lm_eval` leaves it to lm-evaluation-harness"
    )
    path: str = Field(description="a JSONL file, or `lm_eval:NAME`")
    new_tokens: int = Field(16, gt=0, description="tokens of a generated answer, at most")
    limit: int | None = Field(None, gt=0, description="samples, at most; none: all")
    harness: Harness = Harness()

    @model_validator(mode="after")
    def harness_is_asked(self) -> Self:
        if self.kind != "lm_eval" and self.harness != Harness():
            raise ValueError("`harness` is for `kind: lm_eval`")
        return self
