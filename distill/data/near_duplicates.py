"""Documents that are nearly the same: MinHash and locality-sensitive hashing of their words, by datasketch.

Two texts are near-duplicates where the estimated Jaccard similarity of their runs of five words reaches a
threshold (Broder 1997; Lee et al. 2022, arXiv:2107.06499).
"""

import re
from typing import Any

from eval.core.documents import Document
from eval.core.errors import UserError

PERMUTATIONS, WORDS = 128, 5


class NearDuplicates:
    """The signatures of the documents so far."""

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            fix = 'pip install "datasketch>=1.6", the extra `data`'
            raise UserError("data.near_duplicates", "datasketch is not installed", fix) from error
        self.threshold, self._minhash = threshold, MinHash
        self._index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
        self._signatures: dict[str, Any] = {}

    def find(self, document: Document) -> list[str]:
        """Ids of the documents before this one that are nearly the same."""
        return self._similar(self._signature(document))

    def add(self, document: Document) -> list[str]:
        """The same, and takes the document in."""
        signature = self._signature(document)
        names = self._similar(signature)
        self._index.insert(document.id, signature)
        self._signatures[document.id] = signature
        return names

    def _signature(self, document: Document) -> Any:
        prompt = document.prompt
        before = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
        signature = self._minhash(num_perm=PERMUTATIONS)
        signature.update_batch(shingles(f"{before}\n{document.text}"))
        return signature

    def _similar(self, signature: Any) -> list[str]:
        """What the index finds is likely similar; what counts is the estimate."""
        names = sorted(self._index.query(signature))
        return [name for name in names if signature.jaccard(self._signatures[name]) >= self.threshold]


def shingles(text: str) -> set[bytes]:
    """Runs of five words in lower case; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - WORDS + 1))
    return {" ".join(words[i : i + WORDS]).encode() for i in starts}
