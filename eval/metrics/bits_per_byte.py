"""Bits per byte as a module of Hugging Face `evaluate`; it loads offline, by the path of this file.

    evaluate.load("eval/metrics/bits_per_byte.py").compute(predictions=bits, references=sizes)

`evaluate` copies this file and `functions` beside it into its cache; it reads comments on imports too.
"""

import datasets
import evaluate

from .functions import bits_per_byte

DESCRIPTION = """Bits per byte of a corpus: the negative log2 likelihood of all documents over their size in
bytes of UTF-8. A ratio of sums, not a mean of ratios: a long document counts for more than a short one."""

INPUTS = """
Args:
    predictions: negative log2 likelihood of each document, in bits.
    references: size of each document in bytes, at least 1.
Returns:
    bits_per_byte: sum of bits / sum of bytes; lower is better.
"""


class BitsPerByte(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="Gao et al. (2020), The Pile: an 800GB dataset of diverse text, section 3.1",
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(predictions, references)}
