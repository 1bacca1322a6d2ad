"""Expected calibration error as a module of Hugging Face `evaluate`; it loads offline, by this file's path.

    metric = evaluate.load("eval/metrics/calibration_error.py")
    metric.compute(predictions=confidence, references=correct, tokens=tokens)

Its inputs are sums by bin, so that the tokens of many documents and models need not be kept.
`evaluate` copies this file and `functions` beside it into its cache; it reads comments on imports too.
"""

import datasets
import evaluate

from .functions import calibration_error

DESCRIPTION = """Expected calibration error: tokens are put into bins by the probability that the model gave
to the likeliest next token; the error is the mean over tokens of the distance, in their bin, between the
mean probability and the share that was right. With few tokens it is above 0 even for a calibrated model."""

INPUTS = """
Args:
    predictions: sum of the confidence of the tokens of each bin.
    references: number of correct tokens of each bin.
    tokens: number of tokens of each bin; 0 where a bin is empty.
Returns:
    calibration_error: sum of |predictions - references| / sum of tokens, 0 to 1; lower is better.
"""


class CalibrationError(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        names = ("predictions", "references", "tokens")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Guo et al. (2017), On Calibration of Modern Neural Networks, section 2",
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value("float64") for name in names}),
        )

    def _compute(
        self, predictions: list[float], references: list[float], tokens: list[float]
    ) -> dict[str, float]:
        return {"calibration_error": calibration_error(predictions, references, tokens)}
