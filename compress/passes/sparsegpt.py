"""Unstructured or n:m sparsity by SparseGPT (Frantar and Alistarh 2023): what is left is corrected.

The share of zeros is that of each block of 128 inputs, over all rows.
"""

from __future__ import annotations

from torch import Tensor

from compress.sparsity import SparsityPass
from compress.tensors.sparsegpt import sparsegpt
from compress.tensors.sparsity import Rule


class SparseGPT(SparsityPass):
    statistic = "hessians"

    def prune(self, weight: Tensor, statistic: Tensor | None, rule: Rule) -> Tensor:
        assert statistic is not None
        return sparsegpt(weight, statistic, rule)
