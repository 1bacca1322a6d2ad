"""Exact match as a module of Hugging Face `evaluate`; it loads offline, by the path of this file.

    evaluate.load("eval/metrics/exact_match.py").compute(predictions=["42"], references=[["42", "forty-two"]])

`evaluate` copies this file and `functions` beside it into its cache; it reads comments on imports too.
"""

import datasets
import evaluate

from .functions import exact_match

DESCRIPTION = (
    "The share of generated answers that are one of the accepted ones, but for white space around them."
)

INPUTS = """
Args:
    predictions: the generated answers.
    references: the accepted answers of each, at least one.
Returns:
    exact_match: share of exact answers, 0 to 1; higher is better.
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [exact_match(*pair) for pair in zip(predictions, references, strict=True)]
        return {"exact_match": sum(scores) / len(scores)}
