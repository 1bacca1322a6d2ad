"""Next-token accuracy as a module of Hugging Face `evaluate`; it loads offline, by the path of this file.

    evaluate.load("eval/metrics/next_token_accuracy.py").compute(predictions=correct, references=tokens)

`evaluate` copies this file and `functions` beside it into its cache; it reads comments on imports too.
"""

import datasets
import evaluate

from .functions import next_token_accuracy

DESCRIPTION = """The share of tokens that the model held to be the likeliest next one. A ratio of sums over
documents, like bits per byte; unlike them it compares only models of one tokenizer."""

INPUTS = """
Args:
    predictions: number of correct tokens of each document.
    references: number of predicted tokens of each document, at least 1.
Returns:
    next_token_accuracy: sum of correct / sum of predicted, 0 to 1; higher is better.
"""


class NextTokenAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"next_token_accuracy": next_token_accuracy(predictions, references)}
