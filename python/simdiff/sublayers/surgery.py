"""Remove attention and MLP sub-layers from a model in memory; no stock config can express it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from transformers import PreTrainedModel

from simdiff.errors import SimdiffError, SurgeryError
from simdiff.models.structure import find_decoder_layers, text_config
from simdiff.planning.plan import NO_CHECKPOINT
from simdiff.sublayers.stand_ins import StandIns
from simdiff.sublayers.structure import ATTENTION, SublayerMap, find_sublayers
from simdiff.surgery.config_entries import Depth
from simdiff.surgery.dependencies import lost_by_sharing


def remove_sublayers(
    model: PreTrainedModel,
    names: Collection[tuple[int, str]],
    found: SublayerMap | None = None,
) -> PreTrainedModel:
    """Remove attention or MLP sub-layers from a model, in place; their parameters are freed.

    The state that enters such a sub-layer leaves it unchanged, to the last bit: norms of its own,
    before and after, are removed with it. Layers keep their numbers and their places in the KV
    cache, so generation works as before; positions and masks count every token even if the
    attention of layer 0 is removed. Afterwards `save_pretrained` refuses to save the model.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        names: (layer, kind) of the sub-layers to remove, see `simdiff.sublayers.structure.KINDS`.
        found: `find_sublayers(model)`, if it is known already.

    Returns:
        The same model.

    Raises:
        SimdiffError: the sub-layers of a layer cannot be told apart, a name does not exist, or
            there are no names or all.
        SurgeryError: a kept layer reuses what the attention of a removed one computes.
    """
    stand_ins = _stand_ins(model, names, found)
    stand_ins.put_in()
    vars(model)["save_pretrained"] = _refuse_to_save
    return model


@contextlib.contextmanager
def sublayers_removed(
    model: PreTrainedModel,
    names: Collection[tuple[int, str]],
    found: SublayerMap | None = None,
) -> Iterator[PreTrainedModel]:
    """Remove sub-layers inside a with block and put them back at its end.

    See `remove_sublayers`. No weight is copied or moved.
    """
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
