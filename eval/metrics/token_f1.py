"""F1 of words as a module of Hugging Face `evaluate`; it loads offline, by the path of this file.

    evaluate.load("eval/metrics/token_f1.py").compute(predictions=["42"], references=[["42", "forty-two"]])

`evaluate` copies this file and `functions` beside it into its cache; it reads comments on imports too.
"""

import datasets
import evaluate

from .functions import token_f1

DESCRIPTION = """The mean over answers of the F1 of their words against the best of the accepted ones: case,
punctuation and English articles do not count."""

INPUTS = """
Args:
    predictions: the generated answers.
    references: the accepted answers of each, at least one.
Returns:
    token_f1: mean F1, 0 to 1; higher is better.
"""


class TokenF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("string"),
            "references": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Rajpurkar et al. (2016), SQuAD: 100,000+ Questions, section 6",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        scores = [token_f1(*pair) for pair in zip(predictions, references, strict=True)]
        return {"token_f1": sum(scores) / len(scores)}
