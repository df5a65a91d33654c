"""The config of a model without some of its layers, and the proof that stock classes read it so."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from simdiff.errors import SimdiffError, SurgeryError
from simdiff.layer_check import Difference, build, compare, describe
from simdiff.layer_entries import Depth, cut_entry, layer_count, set_depth, text_part
from simdiff.selection import check_layers


@dataclass(frozen=True)
class ConfigCut:
    """A config without some layers."""

    config: PreTrainedConfig
    """A deep copy of the whole config; of a composite one only the text part is cut."""
    changes: tuple[str, ...]
    """What was changed, one line each, for people."""


def cut_config(config: PreTrainedConfig, kept: Sequence[int]) -> ConfigCut:
    """Describe the model that has only the kept layers.

    The layer count goes down under each of its names; lists with one entry per layer are cut,
    lists of layer indices renumbered, counts of first and last layers recomputed.

    Args:
        config: of the dense model; it is not changed.
        kept: indices from 0 of the layers that stay, rising.

    Raises:
        SimdiffError: the config does not say how many layers there are, or kept are not some of
            them in order.
    """
    depth = _depth(config, kept)
    cut = copy.deepcopy(config)
    text = text_part(cut)
    before = dict(vars(text))
    set_depth(text, depth)
    for name, value in before.items():
        if not name.startswith("_"):
            new = cut_entry(name, value, depth)
            if new is not value:
                vars(text)[name] = new
    overrides = getattr(before.get("_heterogeneity_spec"), "per_layer_overrides", None)
    if overrides is not None:
        new = {index: overrides[layer] for index, layer in enumerate(kept) if layer in overrides}
        text.per_layer_config = new or None
    return ConfigCut(cut, tuple(_changes(before, vars(text))))


def _depth(config: PreTrainedConfig, kept: Sequence[int]) -> Depth:
    num_layers = layer_count(config)
    check_layers(kept, num_layers, "kept layers")
    if not kept or list(kept) != sorted(kept):
        raise SimdiffError(f"kept layers must be at least one, in rising order, got {list(kept)}")
    text = text_part(config)
    mtp = [getattr(text, name, 0) for name in ("num_nextn_predict_layers", "num_mtp_layers")]
    return Depth(num_layers, tuple(kept), max(count or 0 for count in mtp))


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = []
    for name in sorted(before):
        old, new = before[name], after[name]
        if old is not new and old != new:
            sized = isinstance(old, (list, tuple)) and isinstance(new, (list, tuple))
            if sized and len(old) > 8:
                lines.append(f"{name}: {len(old)} entries to {len(new)}")
            else:
                lines.append(f"{name}: {old} to {new}")
    return lines


def check_cut(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    cut: PreTrainedConfig,
    kept: Sequence[int],
    *,
    allow_packed: bool = False,
) -> None:
    """Prove that stock classes build the kept layers from the cut config.

    Both models are built without weights, from the configs as they are saved and loaded again;
    layer i of the cut one must have the classes, the parameter shapes and the plain attributes
    of layer kept[i] of the dense one.

    Args:
        model_class: a stock class.
        config: of the dense model.
        cut: what `cut_config` made of it.
        kept: indices from 0 of the layers that stay, rising.
        allow_packed: accept parameters outside the layers that hold entries of every layer
            (Gemma 3n); whoever writes the weights must slice them.

    Raises:
        SurgeryError: they differ; it says in which layers.
    """
    compared = compare(
        describe(build(model_class, config)), describe(build(model_class, cut)), kept
    )
    packed = [] if allow_packed else compared.packed
    differences = list(compared.differences)
    differences += [
        Difference(None, f"{name}: {key} holds entries of every layer") for name, key, _ in packed
    ]
    refuse(model_class, differences)


def refuse(model_class: type[PreTrainedModel], differences: Sequence[Difference]) -> None:
    """Raise SurgeryError if there are differences."""
    if differences:
        raise SurgeryError(
            f"{model_class.__name__} cannot express this cut: what stock transformers builds from "
            f"the cut config differs in {'; '.join(map(str, differences[:3]))}"
            + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
        )
