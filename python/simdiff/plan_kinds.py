"""Plans of layers and plans of sub-layers: one from the other, and either applied in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from simdiff.errors import SimdiffError

if TYPE_CHECKING:
    from simdiff.selection import PruningPlan
    from simdiff.sublayer_plans import SublayerPlan

SUBLAYER_SCHEMA = "simdiff.sublayer_plan"


def is_sublayer_plan(path: Path) -> bool:
    """Whether a file says that it is a plan of sub-layers; what cannot be read is not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("schema") == SUBLAYER_SCHEMA


def refuse_sublayers(path: Path) -> None:
    """Refuse a plan of sub-layers where whole layers are cut from files.

    Raises:
        SimdiffError: why stock loaders could not read the result, and what can be done instead.
    """
    if is_sublayer_plan(path):
        from simdiff.sublayer_surgery import NO_CHECKPOINT

        raise SimdiffError(
            f"{path}: must be a plan of whole layers, but is one of sub-layers, and {NO_CHECKPOINT}"
        )


def load_any_plan(path: Path) -> PruningPlan | SublayerPlan:
    """Read a plan of layers or of sub-layers; the file says which.

    Raises:
        SimdiffError: missing, damaged, of another kind, or written by a newer version.
    """
    from simdiff.selection import PruningPlan
    from simdiff.sublayer_plans import SublayerPlan

    return SublayerPlan.load(path) if is_sublayer_plan(path) else PruningPlan.load(path)


@contextlib.contextmanager
def cut_in_memory(
    model: PreTrainedModel, plan: PruningPlan | SublayerPlan
) -> Iterator[PreTrainedModel]:
    """A plan applied to a model for the duration of a with block; no weight is copied.

    Args:
        model: that the plan was made for.
        plan: of layers or of sub-layers.

    Raises:
        SimdiffError: a plan for another model, or one that the model cannot express.
    """
    from simdiff.models import check_same_model
    from simdiff.sublayer_plans import SublayerPlan
    from simdiff.sublayer_surgery import removed_sublayers
    from simdiff.surgery import removed_layers

    check_same_model(model, plan.model, "plan")
    if isinstance(plan, SublayerPlan):
        with removed_sublayers(model, plan.removed):
            yield model
    else:
        with removed_layers(model, plan.removed):
            yield model
