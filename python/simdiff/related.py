"""Documents of one subject, found by their words, so that they stay on one side of a split."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

# Two documents that share so many words in a row hold one passage.
RUN = 8
# Passages of one article of Wikipedia are mostly above, others below. Of BoolQ's 2938 passages 745
# pairs are: two on the passport card (0.30), on Archie Comics (0.26), on one TV series (0.21).
SIMILARITY = 0.2
# Words in more documents than these say little of a subject, and are left out for speed.
_MOST_DOCUMENTS = 60


def words_of(document: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"\w+", document.lower())


def runs_of(document: str, length: int = RUN) -> set[int]:
    """Hashes of all its runs of so many words; equal ones within one process alone."""
    words = words_of(document)
    return {hash(tuple(words[k : k + length])) for k in range(len(words) - length + 1)}


def related_groups(documents: Sequence[str]) -> list[int]:
    """For every document the number of its group: the first document that it is related to.

    Two documents are related where they share a run of `RUN` words, or where the cosine of their
    word weights (1 + log count) log(documents / documents with the word) is at least `SIMILARITY`;
    so are two that are related to one and the same.

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
        for run in runs_of(document):
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
