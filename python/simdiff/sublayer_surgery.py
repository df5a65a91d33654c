"""Attention and MLP sub-layers taken out of a model in memory; no stock config says that."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedModel

from simdiff.errors import SimdiffError, SurgeryError
from simdiff.layer_dependence import lost_by_sharing
from simdiff.layer_entries import Depth
from simdiff.models import find_decoder_layers, text_config
from simdiff.sublayer_standins import StandIns
from simdiff.sublayers import ATTENTION, SublayerMap, find_sublayers

NO_CHECKPOINT = (
    "stock classes build both sub-layers of every layer, so no config of a checkpoint says that "
    "one is missing: without its weights it would be loaded with random ones. Apply the plan in "
    "memory (simdiff.sublayer_surgery.remove_sublayers, `simdiff eval --plan`), or remove whole "
    "layers (`simdiff plan --unit layer`)"
)
"""What can be done with sub-layers that go, and why no pruned checkpoint is written."""


def remove_sublayers(
    model: PreTrainedModel,
    names: Collection[tuple[int, str]],
    found: SublayerMap | None = None,
) -> PreTrainedModel:
    """Take attention or MLP sub-layers out of a model, in place; their parameters are freed.

    What enters such a sub-layer goes on as it is, to the last bit: norms of its own, before and
    after, go with it. Layers keep their number and their places in the KV cache, so generation
    works as before, with positions and masks that count every token even where the attention of
    layer 0 is gone. `save_pretrained` refuses from then on.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        names: (layer, kind) of those that go, kinds as in `simdiff.sublayers.KINDS`.
        found: `find_sublayers(model)`, where it is known already.

    Returns:
        The same model.

    Raises:
        SimdiffError: a layer whose sub-layers cannot be told apart, a name that is not one, all
            sub-layers, or none.
        SurgeryError: a layer that stays reuses what the attention of one that goes computes.
    """
    stand_ins = _stand_ins(model, names, found)
    stand_ins.put_in()
    vars(model)["save_pretrained"] = _refuse_to_save
    return model


@contextlib.contextmanager
def removed_sublayers(
    model: PreTrainedModel,
    names: Collection[tuple[int, str]],
    found: SublayerMap | None = None,
) -> Iterator[PreTrainedModel]:
    """`remove_sublayers` for the duration of a with block; no weight is copied or moved."""
    stand_ins = _stand_ins(model, names, found)
    saving = vars(model).get("save_pretrained")
    stand_ins.put_in()
    vars(model)["save_pretrained"] = _refuse_to_save
    try:
        yield model
    finally:
        stand_ins.take_out()
        if saving is None:
            del vars(model)["save_pretrained"]
        else:
            vars(model)["save_pretrained"] = saving


def _stand_ins(
    model: PreTrainedModel, names: Collection[tuple[int, str]], found: SublayerMap | None
) -> StandIns:
    found = found or find_sublayers(model)
    chosen = found.chosen(names)
    gone = {sublayer.name.layer for sublayer in chosen if sublayer.name.kind == ATTENTION}
    depth = Depth(len(found.layers), tuple(k for k in range(len(found.layers)) if k not in gone))
    lost = lost_by_sharing(text_config(model), depth)
    if lost:
        raise SurgeryError(
            f"{type(model).__name__}: attention cannot be removed where another layer needs it: "
            + "; ".join(map(str, lost))
        )
    return StandIns(find_decoder_layers(model).modules, chosen)


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise SimdiffError(f"save_pretrained: sub-layers were removed, and {NO_CHECKPOINT}")
