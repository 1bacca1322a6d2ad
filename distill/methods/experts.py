"""One LoRA adapter per domain, routed by the domain of the document, or by what of it was read so far."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from distill.method import Card, Method, MethodContext, TeacherOutput, mean_texts, plain_output
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, ChosenRows, Row
from eval.core.errors import UserError
from eval.core.sections import Generation, Optimizer, Train

ALL = "all"  # domain of the control's single adapter
BASE = "__base__"  # peft's name for the model without adapters
NAMES = "domains.json"  # domain -> adapter name: peft and file systems refuse some characters of domains


def posterior(log_probs: Tensor, starts: Tensor) -> Tensor:
    """Log-weights [K, B, T] of K experts at each position, from the tokens of its text up to there.

    Bayes' rule from equal weights (Gururangan et al. 2021, section 5): an expert weighs as much as the
    likelihood that it gave to what was read, so that no weight depends on a later token.

    Args:
        log_probs: [K, B, T] that each expert gave to the token at the position, from those before it; 0 where
            none was predicted.
        starts: [B, T] bool, True where a text begins: what stands before is of another one.
    """
    places = torch.arange(starts.shape[1], device=starts.device)
    first = torch.where(starts, places, 0).cummax(dim=1).values.expand_as(log_probs)  # of the text
    read = log_probs.masked_fill(starts, 0.0).cumsum(dim=-1)
    return (read - read.gather(-1, first)).log_softmax(dim=0)


class Experts(Method):
    card = Card(
        title="Routed expert adapters",
        paper="Hu et al. 2021, LoRA, arXiv:2106.09685; experts by domain: Gururangan et al. 2021, DEMix, "
        "arXiv:2108.05036",
        claim="an adapter trained on a single domain predicts that domain better than one for all domains",
        touches="every linear layer named in target_modules; needs the domain of each training document",
        limits="by domain, a document of an unseen one gets the plain base; by likelihood, every expert "
        "reads every text; with plenty of text, training longer gains as much",
    )

    own_model = True

    class Settings(Frozen):
        rank: int = Field(8, gt=0)
        alpha: float = Field(16.0, gt=0)
        target_modules: list[str] | str = "all-linear"
        domains: list[str] = Field(default_factory=list)  # none: every domain of the training rows
        train: Train = Train(epochs=2, optimizer=Optimizer(lr=1e-3))
        routing: Literal["domain", "likelihood"] = Field(
            "domain", description="the expert of the document's domain, or all, as likely as what was read is"
        )
        routed: bool = True  # false: one adapter for all domains, the control

    def control(self) -> Method:
        """One adapter of the same rank, trained on the same rows for the same steps."""
        return Experts(self.settings.model_copy(update={"routed": False}))

    def _groups(self, rows: Sequence[Row]) -> dict[str, ChosenRows]:
        """Domain -> the rows its adapter is trained on."""
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.domain, []).append(place)
        domains = self.settings.domains or sorted(places)
        groups = {domain: ChosenRows(rows, places.get(domain, [])) for domain in domains}
        if len(groups) < max(2, len(domains)):
            problem = f"needs two or more different domains, found {domains}"
            raise UserError("method experts", problem, "fix `domains`, or the domains of the data")
        for name, group in groups.items():
            if len(group) < self.settings.train.rows:
                problem = f"needs {self.settings.train.rows} rows or more, has {len(group)}"
                raise UserError(f"domain {name!r}", problem, "give it more rows, or leave it out")
        if self.settings.routed:
            return groups
        return {ALL: ChosenRows(rows, [place for group in groups.values() for place in group.places])}

    def _budget(self, rows: Sequence[Row]) -> Train:
        """With `train.steps`, the control's single adapter gets as many steps as all experts together."""
        train = self.settings.train
        if self.settings.routed or train.steps is None:
            return train
        return train.model_copy(update={"steps": train.steps * len({row.domain for row in rows})})

    def fit(self, context: MethodContext) -> None:
        config = LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            target_modules=self.settings.target_modules,
            task_type="CAUSAL_LM",
        )
        groups = self._groups(context.rows())
        names = {domain: f"expert{i}" for i, domain in enumerate(groups)}
        for domain, rows in groups.items():
            name = names[domain]
            torch.manual_seed(context.seed)  # initial weights of the adapter
            model = get_peft_model(context.load_base(context.seed), config, adapter_name=name)
            context.train(model, rows, self._budget(rows), name)
            model.save_pretrained(str(context.folder), selected_adapters=[name])
        write_text(context.folder / NAMES, json.dumps(names))

    @contextmanager
    def attached(self, teacher: PreTrainedModel, context: MethodContext) -> Iterator[None]:
        trainable = [p.requires_grad for p in teacher.parameters()]
        path = context.folder / NAMES
        if not path.is_file():
            raise UserError("method experts", f"file {path} is missing", "delete that folder and run again")
        self._names: dict[str, str] = json.loads(path.read_text())
        first, *rest = self._names.values()
        self._model = PeftModel.from_pretrained(teacher, str(context.folder / first), adapter_name=first)
        try:
            for name in rest:
                self._model.load_adapter(str(context.folder / name), adapter_name=name)
            self._model.eval()
            yield
        finally:
            self._model.unload()
            del self._model, self._names
            for parameter, flag in zip(teacher.parameters(), trainable, strict=True):
                parameter.requires_grad_(flag)

    def _route(self, domain: str) -> str:
        """The adapter of a domain: its own, or the plain base where none was trained."""
        return self._names.get(domain if self.settings.routed else ALL, BASE)

    @property
    def _by_likelihood(self) -> bool:
        return self.settings.routed and self.settings.routing == "likelihood"

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        if self._by_likelihood:
            return TeacherOutput(self._mixture(batch))
        adapters = [self._route(domain) for domain in batch.domains]
        return plain_output(self._model, batch=batch, adapter_names=adapters)

    def _mixture(self, batch: Batch) -> Tensor:
        """[B, T, V] log of the mean of all experts' distributions, weighted by `posterior`."""
        rows = len(batch.input_ids)
        outputs = [
            plain_output(self._model, batch=batch, adapter_names=[name] * rows).dense()
            for name in self._names.values()
        ]
        following = batch.input_ids[:, 1:, None]
        given = torch.stack([output[:, :-1].gather(-1, following)[..., 0] for output in outputs])
        starts = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        if batch.positions is not None:
            starts = batch.positions == 0
        starts[:, 0] = True
        weights = posterior(torch.nn.functional.pad(given, (1, 0)), starts)
        mixed = outputs[0] + weights[0, ..., None]
        for output, weight in zip(outputs[1:], weights[1:], strict=True):
            mixed = torch.logaddexp(mixed, output + weight[..., None])
        return mixed

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        if self._by_likelihood:
            return super().write(teacher, prompts, generation, seed)
        adapters = [self._route(row.domain) for row in prompts]
        return mean_texts([self._model], prompts, generation, seed, adapter_names=adapters)
