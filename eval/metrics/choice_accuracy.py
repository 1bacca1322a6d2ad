"""Multiple choice as a module of Hugging Face `evaluate`; it loads offline, by the path of this file.

    metric = evaluate.load("eval/metrics/choice_accuracy.py")
    metric.compute(predictions=[[-3.0, -5.0]], references=[0], sizes=[[4, 7]])

`evaluate` copies this file and `functions` beside it into its cache; it reads comments on imports too.
"""

import datasets
import evaluate

from .functions import likeliest_choice

DESCRIPTION = """The share of questions of which the likeliest choice is the right one: raw, and with the
log-likelihood of a choice divided by its bytes, so that a choice does not lose for its mere length."""

INPUTS = """
Args:
    predictions: log-likelihood of every choice of each question, given its prompt.
    references: index of the right choice.
    sizes: bytes of every choice, at least 1.
Returns:
    accuracy, accuracy_per_byte: 0 to 1; higher is better.
"""


class ChoiceAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
            "sizes": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Gao et al., lm-evaluation-harness: its `acc`; its `acc_norm` divides by characters",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[int], sizes: list[list[int]]
    ) -> dict[str, float]:
        raw = [likeliest_choice(values) for values in predictions]
        per_byte = [likeliest_choice(*pair) for pair in zip(predictions, sizes, strict=True)]
        return {
            name: sum(a == b for a, b in zip(choices, references, strict=True)) / len(references)
            for name, choices in (("accuracy", raw), ("accuracy_per_byte", per_byte))
        }
