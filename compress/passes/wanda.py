"""Unstructured or n:m sparsity by Wanda (Sun et al. 2023): weight magnitude times input norm, row by row."""

from __future__ import annotations

from torch import Tensor

from compress.sparsity import SparsityPass
from compress.tensors.sparsity import Rule, wanda_scores


class Wanda(SparsityPass):
    statistic = "norms"

    def prune(self, weight: Tensor, statistic: Tensor | None, rule: Rule) -> Tensor:
        assert statistic is not None
        return weight * rule.keep(wanda_scores(weight, statistic.to(weight.device)), whole=False)
