"""Plans for tests that need no scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simdiff.selection import PruningPlan


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
