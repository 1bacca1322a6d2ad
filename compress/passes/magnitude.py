"""Unstructured or n:m sparsity by magnitude (Han et al. 2015): the smallest weights of each matrix go.

The baseline that every other pruning must beat; it needs no calibration.
"""

from __future__ import annotations

from torch import Tensor

from compress.sparsity import SparsityPass
from compress.tensors.sparsity import Rule


class Magnitude(SparsityPass):
    statistic = None

    def prune(self, weight: Tensor, statistic: Tensor | None, rule: Rule) -> Tensor:
        return weight * rule.keep(weight.float().abs(), whole=True)
