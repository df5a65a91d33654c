"""Find documents on the same subject by their words, so that a split keeps them together."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Two documents that share a run of this many words contain the same passage.
RUN = 8
# Passages of the same Wikipedia article are mostly above this similarity, others below. Of BoolQ's
# 2938 passages, 745 pairs are above: two on the passport card (0.30), on Archie Comics (0.26), on
# one TV series (0.21).
SIMILARITY = 0.2
# Words that occur in more documents than this say little about a subject; skipped for speed.
_MOST_DOCUMENTS = 60
_WORD = re.compile(r"\w+")
# Multiplier of the polynomial hash: odd, with no pattern in its bits (Knuth's MMIX generator).
_BASE = np.uint64(6364136223846793005)


def words_of(document: str) -> list[str]:
    """The words of a document in lower case, without punctuation."""
    return _WORD.findall(document.lower())


def runs_of(document: str, length: int = RUN) -> NDArray[np.uint64]:
    """64-bit hashes of the document's runs of `length` words, sorted, each once.

    A run's hash is a polynomial in the hashes of its words, modulo 2^64. Python salts those, so
    hashes can be compared within one process alone. Eight bytes a word: the runs of a text take
    about as much memory as the text itself.
    """
    found = _WORD.finditer(document.lower())
    words = np.fromiter((hash(word[0]) for word in found), dtype=np.int64).view(np.uint64)
    count = max(0, len(words) - length + 1)
    runs = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        runs = runs * _BASE + words[offset : offset + count]
    return np.unique(runs)


def related_groups(documents: Sequence[str]) -> list[int]:
    """For every document the index of the first document in its group of related documents.

    Two documents are related if they share a run of `RUN` words, or if the cosine of their word
    weights (1 + log count) log(documents / documents with the word) is at least `SIMILARITY`. The
    relation is transitive: the groups are its connected components.

    Source: Salton and Buckley, "Term-weighting approaches in automatic text retrieval" (1988), for
    the weights.
    """
    parent = list(range(len(documents)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(a: int, b: int) -> None:
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    first: dict[int, int] = {}
    for index, document in enumerate(documents):
        for run in runs_of(document).tolist():
            join(index, first.setdefault(run, index))
    for a, b in _alike(documents):
        join(a, b)
    return [root(index) for index in range(len(documents))]


def _alike(documents: Sequence[str]) -> list[tuple[int, int]]:
    counts = [Counter(words_of(document)) for document in documents]
    spread = Counter(word for count in counts for word in count)
    found: list[tuple[int, int]] = []
    earlier: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for index, count in enumerate(counts):
        weights = {
            word: (1 + math.log(times)) * math.log(len(documents) / spread[word])
            for word, times in count.items()
        }
        norm = math.sqrt(sum(weight * weight for weight in weights.values()))
        cosines: dict[int, float] = defaultdict(float)
        for word, weight in weights.items():
            if norm > 0 and spread[word] <= _MOST_DOCUMENTS:
                for other, its in earlier[word]:
                    cosines[other] += its * weight / norm
                earlier[word].append((index, weight / norm))
        found += [(other, index) for other, cosine in cosines.items() if cosine >= SIMILARITY]
    return found
