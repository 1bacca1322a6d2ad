"""What a classifier says of texts beside its likelihood: the class that it takes, and its Brier score."""

from collections.abc import Callable

import torch
from torch import Tensor

from eval.core.documents import Batch


class ClassPredictions:
    """Asks a model, and keeps of every document what is said beside the likelihood of its class."""

    def __init__(self, predict: Callable[[Batch], Tensor]) -> None:
        self.predict = predict
        self.predicted: dict[str, int] = {}  # document -> the likeliest class, the first of equals
        self.brier: dict[str, float] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """[B, T, V] scores of V classes, as the model gives them."""
        scores = self.predict(batch)
        at = scores[:, :-1][batch.mask.to(scores.device)].double().cpu()
        values = brier_scores(at.softmax(-1), batch.labels[batch.mask])
        self.predicted |= zip(batch.documents, at.argmax(-1).tolist(), strict=True)
        self.brier |= zip(batch.documents, values.tolist(), strict=True)
        return scores


def brier_scores(probabilities: Tensor, labels: Tensor) -> Tensor:
    """[N] sum over the V classes of (p - [label])^2, 0 to 2 (Brier 1950, equation 2); lower is better.

    Args:
        probabilities: [N, V]; labels: [N] int64.
    """
    right = torch.nn.functional.one_hot(labels, probabilities.shape[-1])
    return (probabilities - right).square().sum(-1)
