"""What passes that set weights to zero share: their options, the walk over layers, the report."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.calibration import Walk, calibration_rows, input_norms
from compress.model_size import decoder_weights, layer_matrices, size_of, skipped_modules
from compress.recipe import Context, Pass, PassReport, Skipped, Stage
from compress.targets import Targets
from compress.tensors.sparsity import Rule, outlier_share, owl_sparsity, wanda_scores
from distill.models.layers import decoder_layers
from eval.core.documents import batches
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_LAYER = "no linear layer that it can prune"


class SparsityPass(Pass):
    """A pass that sets weights of the decoder's linear layers to zero; a subclass says which."""

    stage = Stage.SPARSITY
    statistic: ClassVar[Literal["norms", "hessians"] | None]  # of the inputs of a matrix, that it needs

    class Options(Targets):
        sparsity: float = Field(0.5, ge=0, lt=1, description="share of zeros")
        pattern: str | None = Field(
            None,
            pattern=r"^[1-9]\d*:[1-9]\d*$",
            description="in place of `sparsity`: n of every m weights of a row stay, as in `2:4`",
        )
        rows: int = Field(32, gt=0, description="training rows that calibrate")
        allocation: Literal["uniform", "owl"] = Field(
            "uniform",
            description="the same sparsity in every layer; or `owl`: less where more scores are outliers",
        )
        owl_outlier: float = Field(
            5.0, gt=0, description="for `owl`: times the mean score of a layer; what is above is an outlier"
        )
        owl_reach: float = Field(
            0.08, gt=0, lt=1, description="for `owl`: half of the spread of the layers' sparsities"
        )

        @model_validator(mode="after")
        def fits_together(self) -> Self:
            if self.pattern is not None:
                n, m = (int(part) for part in self.pattern.split(":"))
                if n >= m:
                    raise ValueError(f"pattern {self.pattern} keeps everything; give n below m")
                if "sparsity" in self.model_fields_set:
                    raise ValueError("give `sparsity` or `pattern`, not both")
                if self.allocation != "uniform":
                    raise ValueError(
                        f"allocation {self.allocation} needs `sparsity`: a pattern is the same everywhere"
                    )
            return self

        @property
        def rule(self) -> Rule:
            if self.pattern is None:
                return Rule(self.sparsity)
            n, m = (int(part) for part in self.pattern.split(":"))
            return Rule(1 - n / m, (n, m))

    @abstractmethod
    def prune(self, weight: Tensor, statistic: Tensor | None, rule: Rule) -> Tensor:
        """[O, I]: the weights of one matrix, some of them zero.

        Args:
            weight: [O, I].
            statistic: norms [I] or Hessian [I, I] of its inputs, where those before it are pruned.
        """

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        chosen = self.options.choose(weight_modules(model))
        names = names_of(model)
        layers = decoder_layers(model)[2]
        if not any(self._fits(module) for module in layers.modules() if names[module] in chosen):
            raise UserError(self.name, NO_LAYER, "leave the pass out of the recipe")
        return model

    def _fits(self, module: nn.Module) -> bool:
        rule = self.options.rule
        group = 1 if rule.pattern is None else rule.pattern[1]
        return isinstance(module, nn.Linear) and module.in_features % group == 0

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        before, options = size_of(model, context.dtype), self.options
        chosen, names = options.choose(weight_modules(model)), names_of(model)
        rows = calibration_rows(context.rows, options.rows, context.seed)
        walk = Walk(model, rows, context.pad)
        rules, facts = self._rules(model, walk, context)
        seen, reached, skipped = set[nn.Module](), 0, list[Skipped]()
        for i, (layer, rule) in enumerate(zip(walk.layers, rules, strict=True)):
            matrices = {names[m]: m for m in layer_matrices(layer).values()}
            taken = {name: m for name, m in matrices.items() if name in chosen and self._fits(m)}
            skipped += [self._skip(name, m, chosen) for name, m in matrices.items() if name not in taken]
            if rule.sparsity > 0:
                statistics = self._statistics(walk, i, taken)
                for name, module in taken.items():  # in turn: inputs come from pruned layers
                    module.weight.data = self.prune(module.weight.detach(), statistics.get(name), rule)
                if self.statistic is not None:
                    walk.leave(i)
            reached += sum(m.weight.numel() for m in taken.values())
            seen |= set(matrices.values())
            context.report((i + 1) / len(walk.layers))
        if len(skipped) == len(seen):
            raise UserError(self.name, NO_LAYER, "leave the pass out of the recipe")
        skipped += skipped_modules(model, seen, "not a linear layer of the decoder")
        named = sum(n for name, n in decoder_weights(model).items() if name.rpartition(".")[0] in chosen)
        after = size_of(model, context.dtype)
        return model, PassReport(
            name=self.name,
            before=before,
            after=after,
            named=named,
            reached=reached,
            skipped=skipped,
            facts=facts,
        )

    def _statistics(self, walk: Walk, layer: int, modules: dict[str, nn.Linear]) -> dict[str, Tensor]:
        if self.statistic is None or not modules:
            return {}
        return walk.norms(layer, modules) if self.statistic == "norms" else walk.hessians(layer, modules)

    def _skip(self, name: str, module: nn.Linear, chosen: set[str]) -> Skipped:
        unfit = f"{module.in_features} inputs do not divide into {self.options.pattern}"
        return Skipped(module=name, reason=unfit if name in chosen else "not in targets, or ignored")

    def _rules(
        self, model: PreTrainedModel, walk: Walk, context: Context
    ) -> tuple[list[Rule], dict[str, Any]]:
        """The rule of each layer, and what the report says of them.

        Raises:
            UserError: OWL asks for more than all weights of a layer, or for less than none.
        """
        options = self.options
        if options.allocation == "uniform":
            return [options.rule] * len(walk.layers), {}
        names, chosen = names_of(model), options.choose(weight_modules(model))
        by_layer = [
            {names[m]: m for m in layer_matrices(layer).values() if names[m] in chosen}
            for layer in walk.layers
        ]
        modules = {name: m for layer in by_layer for name, m in layer.items()}
        norms = dense_norms(model, modules, context, options.rows)
        outliers = [
            outlier_share(
                [wanda_scores(m.weight, norms[name].to(m.weight.device)) for name, m in layer.items()],
                options.owl_outlier,
            )
            if layer
            else 0.0
            for layer in by_layer
        ]
        weights = [sum(m.weight.numel() for m in layer.values()) for layer in by_layer]
        shares = owl_sparsity(outliers, weights, options.sparsity, options.owl_reach)
        if not 0 <= min(shares) <= max(shares) < 1:
            problem = f"layers would have {min(shares):.2f} to {max(shares):.2f} zeros"
            raise UserError(f"{self.name}.allocation: owl", problem, "give a smaller `owl_reach`")
        rounded = [round(share, 6) for share in shares]
        return [Rule(share) for share in shares], {"layer_sparsity": rounded, "outliers": outliers}


def weight_modules(model: PreTrainedModel) -> set[str]:
    """Names of the modules inside the decoder layers that hold matrices."""
    return {name.rpartition(".")[0] for name in decoder_weights(model)}


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    return {module: name for name, module in model.named_modules()}


def dense_norms(
    model: PreTrainedModel, modules: dict[str, nn.Linear], context: Context, count: int
) -> dict[str, Tensor]:
    """`input_norms` in the model as it is, of all modules in one forward pass."""
    rows = calibration_rows(context.rows, count, context.seed)
    moved = (batch.to(model.device) for batch in batches(rows, context.pad))
    with torch.no_grad():
        return input_norms(
            modules, [(b.attention_mask, partial(model, **b.inputs, use_cache=False)) for b in moved]
        )
