"""Documents of one subject, told by runs of words."""

from __future__ import annotations

import numpy as np

from simdiff.data.related import related_groups, runs_of


def num_shared(first: object, second: object) -> int:
    return len(np.intersect1d(first, second))  # type: ignore[call-overload]


def test_runs_are_told_apart_by_their_words_and_their_order() -> None:
    """Fifteen different words make eight runs; the order of words counts, punctuation does not."""
    words = [f"w{n}" for n in range(15)]
    runs = runs_of(" ".join(words))
    assert len(runs) == 8
    assert num_shared(runs_of("W0, w1; w2 w3 w4 w5 w6 (w7)!"), runs) == 1
    assert num_shared(runs_of(" ".join(reversed(words))), runs) == 0
    assert num_shared(runs, runs_of("")) == len(runs_of("too short")) == 0
    repeated = runs_of(" ".join(words[:8] * 3))  # a period of 8: its 8 rotations, each once
    assert len(repeated) == 8
    assert num_shared(runs, repeated) == 1


def test_documents_of_one_subject() -> None:
    """A run of 8 words, or rare words in common: a subject; frequent words are none."""
    common = "the of and in to a is"
    apart = [f"{common} w{n}a w{n}b w{n}c w{n}d" for n in range(12)]
    run = "eight words that are in two documents together"
    documents = [
        *apart,
        f"k1 k2 k3 k4 {run}",
        f"{run} l1 l2 l3 l4",
        "passport card passport card travel document",
        "the passport card is a document",
    ]
    groups = related_groups(documents)
    assert groups == [*range(13), 12, 14, 14]
