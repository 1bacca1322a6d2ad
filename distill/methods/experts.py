"""One LoRA adapter per domain, routed by the domain of the document, or by what of it was read so far.

That is by all experts, each as likely as what it read (`likelihood`), or by the one that a router chooses
from the first tokens (`text`): a batch then needs the adapters of its rows alone.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from distill.method import Card, Method, MethodContext, TeacherOutput, plain_output
from distill.models.cached import NextLogProbs
from distill.models.generation import CachedReader, refuse_packing
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, ChosenRows, Row, collate
from eval.core.errors import UserError
from eval.core.sections import Optimizer, Train

ALL = "all"  # domain of the control's single adapter
BASE = "__base__"  # peft's name for the model without adapters
NAMES = "domains.json"  # domain -> adapter name: peft and file systems refuse some characters of domains
ROUTER = "router.safetensors"
ONE_TEXT = "a router reads the first tokens of one document"
ROUTER_ROWS = 64  # of each domain that the router is fitted to, at most
RESIDENT = 64  # adapters in memory, where a batch does not need more


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


def fit_router(features: Tensor, labels: Tensor) -> Tensor:
    """[D + 1, K] float64, by which `choose` tells K domains apart: ridge regression to one-hot labels.

    Every domain weighs the same, however many rows it has.

    Args:
        features: [R, D]; labels: [R] int64, from 0 to K - 1, each of them at least once.
    """
    x = F.pad(features.double(), (0, 1), value=1.0)
    y = F.one_hot(labels).double()
    weights = (1 / y.sum(0))[labels, None]
    square = x.T @ (weights * x)
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    return torch.linalg.solve(square + ridge, x.T @ (weights * y))


def choose(router: Tensor, features: Tensor) -> list[int]:
    """The domain of each of the features [B, D]."""
    return (F.pad(features.double(), (0, 1), value=1.0) @ router.to(features.device)).argmax(-1).tolist()


class Experts(Method):
    card = Card(
        title="Routed expert adapters",
        paper="Hu et al. 2021, LoRA, arXiv:2106.09685; experts by domain: Gururangan et al. 2021, DEMix, "
        "arXiv:2108.05036; one chosen by the text: Gururangan et al. 2023, c-BTM, arXiv:2303.14177",
        claim="an adapter trained on a single domain predicts that domain better than one for all domains",
        touches="every linear layer named in target_modules; needs the domain of each training document",
        limits="by domain, a document of an unseen one gets the plain base; by likelihood, every expert "
        "reads every text; by text, the first tokens get the plain base, and each row is read twice; with "
        "plenty of text, training longer gains as much",
    )

    own_model = True

    class Settings(Frozen):
        rank: int = Field(8, gt=0, description="of each adapter")
        alpha: float = Field(16.0, gt=0, description="an adapter's output is multiplied by alpha / rank")
        target_modules: list[str] | str = Field("all-linear", description="linear layers that get adapters")
        domains: list[str] = Field(
            default_factory=list, description="with an adapter each; none: every domain of the training rows"
        )
        train: Train = Field(
            Train(epochs=2, optimizer=Optimizer(lr=1e-3)), description="how each adapter is trained"
        )
        routing: Literal["domain", "likelihood", "text"] = Field(
            "domain",
            description="the expert of the document's domain; all, as likely as what was read is; or the one "
            "that a router chooses by the first tokens",
        )
        router_tokens: int = Field(16, gt=0, description="tokens of a row from which `text` chooses")
        routed: bool = Field(True, description="false: one adapter for all domains, as the control has")

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
        if self._routing == "text":  # first: it may refuse the rows
            self._fit_router(context, groups)
        for domain, rows in groups.items():
            name = names[domain]
            torch.manual_seed(context.seed)  # initial weights of the adapter
            model = get_peft_model(context.load_base(context.seed), config, adapter_name=name)
            context.train(model, rows, self._budget(rows), name)
            model.save_pretrained(str(context.folder), selected_adapters=[name])
        write_text(context.folder / NAMES, json.dumps(names))

    @property
    def _routing(self) -> str:
        return self.settings.routing if self.settings.routed else "domain"

    @torch.no_grad()
    def _fit_router(self, context: MethodContext, groups: dict[str, ChosenRows]) -> None:
        """Fits the router to the states of the base, of rows that are long enough.

        Raises:
            UserError: rows hold several texts, or a domain has no such row.
        """
        base, count = context.load_base(context.seed), self.settings.router_tokens
        features, labels = [], []
        for label, (domain, rows) in enumerate(groups.items()):
            chosen: list[Row] = []
            for row in rows:
                refuse_packing(bool(row.packed), ONE_TEXT)
                if len(row.tokens) >= count:
                    chosen.append(replace(row, tokens=row.tokens[:count]))
                if len(chosen) == ROUTER_ROWS:
                    break
            if not chosen:
                problem = f"has no row of {count} tokens"
                raise UserError(
                    f"domain {domain!r}", problem, "give a smaller router_tokens, or leave it out"
                )
            for start in range(0, len(chosen), 8):
                batch = collate(chosen[start : start + 8], 0).to(base.device)
                features.append(self._features(plain_output(base, batch=batch)).cpu())
            labels += [label] * len(chosen)
        router = fit_router(torch.cat(features), torch.tensor(labels))
        save_file({"router": router.contiguous()}, context.folder / ROUTER)

    def _features(self, output: TeacherOutput) -> Tensor:
        """[B, D] float32: the mean state of the tokens that the router looks at."""
        return output.hidden[0][:, : self.settings.router_tokens].float().mean(1)

    @contextmanager
    def attached(self, teacher: PreTrainedModel, context: MethodContext) -> Iterator[None]:
        trainable = [p.requires_grad for p in teacher.parameters()]
        path = context.folder / NAMES
        if not path.is_file():
            raise UserError("method experts", f"file {path} is missing", "delete that folder and run again")
        self._names: dict[str, str] = json.loads(path.read_text())
        self._folder = context.folder
        if self._routing == "text":
            self._router = load_file(context.folder / ROUTER)["router"]
        first = next(iter(self._names.values()))
        self._model = PeftModel.from_pretrained(teacher, str(context.folder / first), adapter_name=first)
        self._loaded = [first]  # what was used last stands last
        try:
            self._model.eval()
            yield
        finally:
            self._model.unload()
            del self._model, self._names, self._folder, self._loaded
            for parameter, flag in zip(teacher.parameters(), trainable, strict=True):
                parameter.requires_grad_(flag)

    def _route(self, domain: str) -> str:
        """The adapter of a domain: its own, or the plain base where none was trained."""
        return self._names.get(domain if self.settings.routed else ALL, BASE)

    def _load(self, names: list[str]) -> None:
        """Has these adapters in memory, and of the others those used last: RESIDENT in all."""
        for name in dict.fromkeys(names):
            if name == BASE:
                continue
            if name in self._loaded:
                self._loaded.remove(name)
            else:
                self._model.load_adapter(str(self._folder / name), adapter_name=name)
                self._model.eval()
            self._loaded.append(name)
        others = [name for name in self._loaded if name not in names]
        for name in others[: max(0, len(self._loaded) - RESIDENT)]:
            self._model.set_adapter(self._loaded[-1])  # the active one cannot go
            self._model.delete_adapter(name)
            self._loaded.remove(name)

    def _output_of(self, adapters: list[str], batch: Batch) -> TeacherOutput:
        self._load(adapters)
        return plain_output(self._model, batch=batch, adapter_names=adapters)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        if self._routing == "likelihood":
            return TeacherOutput(self._mixture(batch))
        if self._routing == "text":
            return self._chosen(batch)
        return self._output_of([self._route(domain) for domain in batch.domains], batch)

    def _chosen(self, batch: Batch) -> TeacherOutput:
        """The plain base, and after `router_tokens` of each row the expert that the router chose by them.

        Raises:
            UserError: rows hold several texts.
        """
        refuse_packing(batch.positions is not None, ONE_TEXT)
        base = self._output_of([BASE] * len(batch.input_ids), batch)
        if batch.input_ids.shape[1] < self.settings.router_tokens:
            return base
        expert = self._output_of(self._choose(base), batch)
        read = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device) + 1
        known = (read >= self.settings.router_tokens)[None, :, None]
        return TeacherOutput(hidden=[torch.where(known, expert.hidden[0], base.hidden[0])], heads=base.heads)

    def _choose(self, base: TeacherOutput) -> list[str]:
        """The adapter of each row."""
        names = list(self._names.values())
        return [names[label] for label in choose(self._router, self._features(base))]

    def _mixture(self, batch: Batch) -> Tensor:
        """[B, T, V] log of the mean of all experts' distributions, weighted by `posterior`."""
        rows = len(batch.input_ids)
        outputs = [self._output_of([name] * rows, batch).dense() for name in self._names.values()]
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

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> NextLogProbs:
        short = len(prompts[0].tokens) < self.settings.router_tokens
        if self._routing == "likelihood" or (self._routing == "text" and short):
            return super().reader(teacher, prompts)
        if self._routing == "text":
            batch = collate(prompts, 0).to(teacher.device)
            adapters = self._choose(self._output_of([BASE] * len(prompts), batch))
        else:
            adapters = [self._route(row.domain) for row in prompts]
        self._load(adapters)
        return CachedReader([self._model], prompts, adapter_names=adapters)
