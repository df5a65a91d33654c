"""The config of a model without some of its layers, and the proof that stock classes read it so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from simdiff.errors import SurgeryError
from simdiff.layer_check import Difference, Structure
from simdiff.layer_entries import MTP, MTP_COUNTS, cut_entries, depth_of, spans, text_part
from simdiff.layer_search import Trial, alternatives, search


@dataclass(frozen=True)
class ConfigCut:
    """A config without some layers."""

    config: PreTrainedConfig
    """A deep copy of the whole config; of a composite one only the text part is cut."""
    changes: tuple[str, ...]
    """What was changed, one line each, for people."""


def cut_config(
    config: PreTrainedConfig,
    kept: Sequence[int],
    *,
    model_class: type[PreTrainedModel] | None = None,
    trial: Trial | None = None,
) -> ConfigCut:
    """Describe the model that has only the kept layers.

    The layer count goes down under each of its names; lists with one entry per layer are cut,
    lists of layer indices renumbered, counts of first and last layers recomputed. Where the stock
    class then builds other layers, other values are searched for (`layer_search`). Whether the
    result is right is for `check_cut` to say.

    Args:
        config: of the dense model; it is not changed.
        kept: indices from 0 of the layers that stay, rising.
        model_class: the stock class; None takes the one that the config names.
        trial: the cut's own, where the caller has built the dense model already.

    Raises:
        SimdiffError: the config does not say how many layers there are, or kept are not some of
            them in order.
    """
    depth = depth_of(config, kept)
    if trial is None and (model_class := model_class or stock_class(config)):
        trial = Trial(model_class, config, kept)
    cut = search(trial) if trial else cut_entries(config, depth)
    return ConfigCut(cut, tuple(_changes(vars(text_part(config)), vars(text_part(cut)))))


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that loads a model of this config, if it has one."""
    for name in config.architectures or ():
        if found := getattr(transformers, name, None):
            return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    return None


def without_mtp(config: PreTrainedConfig) -> None:
    """Say in a config, in place, that there are no multi-token-prediction heads.

    Stock causal language models neither load nor save their weights, so a model saved from memory
    has none, and generation that looks for them would fail.
    """
    entries = vars(text_part(config))
    for name, value in entries.items():
        if name in MTP_COUNTS and value:
            entries[name] = 0
        elif MTP.search(name) and isinstance(value, list):
            entries[name] = []


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    lines = []
    for name in sorted(set(before) & set(after)):
        old, new = before[name], after[name]
        if name.startswith("_") or isinstance(old, PreTrainedConfig) or old == new:
            continue
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
    trial = Trial(model_class, config, kept)
    compared = trial.compare(cut)
    packed = [] if allow_packed else compared.packed
    differences = list(compared.differences)
    differences += [
        Difference(None, f"{name}: {key} holds entries of every layer") for name, key, _ in packed
    ]
    refuse(model_class, config, differences, trial.dense, len(trial.dense.layers) - len(kept))


def refuse(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    differences: Sequence[Difference],
    dense: Structure,
    num_removed: int,
) -> None:
    """Raise SurgeryError if there are differences: which, and which layers may go instead."""
    if not differences:
        return
    layers = sorted({d.layer for d in differences if d.layer is not None})
    raise SurgeryError(
        f"{model_class.__name__} cannot express this cut: from the cut config stock transformers "
        f"builds something else"
        + (f" for layers {spans(layers)}" if layers else "")
        + f" ({'; '.join(map(str, differences[:3]))}"
        + (f"; and {len(differences) - 3} more differences)" if len(differences) > 3 else ")")
        + f". What may be removed instead: {alternatives(model_class, config, dense, num_removed)}"
    )
