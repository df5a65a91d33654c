"""Load a plan of layers or of sub-layers, and apply either in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from simdiff.planning.plan import is_sublayer_plan

if TYPE_CHECKING:
    from simdiff.planning.plan import PruningPlan
    from simdiff.sublayers.plan import SublayerPlan


def load_any_plan(path: Path) -> PruningPlan | SublayerPlan:
    """Read a plan of layers or of sub-layers, by the schema in the file.

    Raises:
        SimdiffError: the file is missing, damaged, of another kind, or of a newer version.
    """
    from simdiff.planning.plan import PruningPlan
    from simdiff.sublayers.plan import SublayerPlan

    return SublayerPlan.load(path) if is_sublayer_plan(path) else PruningPlan.load(path)


@contextlib.contextmanager
def cut_in_memory(
    model: PreTrainedModel, plan: PruningPlan | SublayerPlan
) -> Iterator[PreTrainedModel]:
    """Apply a plan to a model inside a with block; no weight is copied.

    Args:
        model: the model for which the plan was made.
        plan: a plan of layers or of sub-layers.

    Raises:
        SimdiffError: the plan is for another model, or the model cannot express it.
    """
    from simdiff.models.identity import check_same_model
    from simdiff.sublayers.plan import SublayerPlan
    from simdiff.sublayers.surgery import sublayers_removed
    from simdiff.surgery.layers import layers_removed

    check_same_model(model, plan.model, "plan")
    if isinstance(plan, SublayerPlan):
        with sublayers_removed(model, plan.removed):
            yield model
    else:
        with layers_removed(model, plan.removed):
            yield model
