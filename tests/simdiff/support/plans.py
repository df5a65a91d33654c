"""Plans for tests that need no scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simdiff.planning.plan import PruningPlan

# Names of models that end in files of several formats.
ODD_NAMES = [
    "org/model-7B",
    'a "quoted": {name}, # not a comment',
    "line\nbreak: [0, 1]\n- x",
    "../modèle/日本 😀 \\ \t\x07\x7f\u2028\x85",
    "- yes",
    "null",
    "org/name@main",
]


def plan_for(depth: int, removed: Sequence[int], **model: Any) -> PruningPlan:
    """A plan without scores, for a model of which `model` is known."""
    return PruningPlan(
        removed=tuple(removed),
        num_layers=depth,
        protected=(),
        criterion="block-influence",
        formula="mean(1 - cos)",
        alpha=None,
        importance=tuple(float(layer) for layer in range(depth)),
        ranking=tuple(range(depth)),
        notes=(),
        model={"name": "tiny", **model},
        calibration={},
    )
