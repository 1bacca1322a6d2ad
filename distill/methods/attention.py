"""Another attention than the student's: the base under other fields of its config, trained further."""

from copy import deepcopy
from typing import Any

from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedModel

from distill.method import Card, Method, MethodContext, Retrained
from eval.core.config import Frozen
from eval.core.errors import UserError, require_one_of
from eval.core.sections import Train


class Attention(Retrained):
    card = Card(
        title="Another attention",
        paper="sliding windows: Child et al. 2019, arXiv:1904.10509; Beltagy et al. 2020, arXiv:2004.05150",
        claim="a teacher that attends further, or otherwise, than its student may serve sees more",
        touches="the mask and other fields of the teacher's config that no weight depends on",
        limits="what only attention to a far token can tell cannot be absorbed: the student does not see it",
    )

    class Settings(Frozen):
        config: dict[str, Any] = Field(
            min_length=1, description="fields of the base's config and their values in the teacher"
        )
        train: Train = Field(Train(), description="how the teacher is trained, from the base")

    def control(self) -> Method:
        """The same training under the base's own config: the student's mask."""
        return Attention(self.settings.model_copy(update={"config": {}}))

    def start(self, context: MethodContext) -> PreTrainedModel:
        """The base with other fields in its config.

        Raises:
            UserError: it has no such field, or its weights do not fit it.
        """
        base, thing = context.load_base(context.seed), "method.settings: config"
        config = deepcopy(base.config)
        text_config = config.get_text_config()
        for name, value in self.settings.config.items():
            require_one_of(thing, name, sorted(text_config.to_dict()))
            setattr(text_config, name, value)
        model = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
        try:
            model.load_state_dict(base.state_dict())
        except RuntimeError as error:
            cause = " ".join(str(error).split())[:200]
            fix = "change fields that no weight depends on, such as sliding_window"
            raise UserError(thing, f"the weights of the base do not fit ({cause})", fix) from error
        return model.eval()
