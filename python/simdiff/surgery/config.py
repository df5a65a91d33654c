"""Cut layers out of a config, and prove that stock classes build the kept layers from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from simdiff.errors import SurgeryError
from simdiff.models.config import MTP, mtp_counts, text_part
from simdiff.models.layer_indices import spans
from simdiff.surgery.config_entries import cut_entries, depth_of
from simdiff.surgery.config_search import Trial, alternatives, search_config
from simdiff.surgery.structure import Difference, Structure


@dataclass(frozen=True)
class ConfigCut:
    """A config from which layers were cut, and the changes in it."""

    config: PreTrainedConfig
    """A deep copy of the whole config; in a composite config only the text part is cut."""
    changes: tuple[str, ...]
    """The changed entries, one line each, for people."""


def cut_config(
    config: PreTrainedConfig,
    kept: Sequence[int],
    *,
    model_class: type[PreTrainedModel] | None = None,
    trial: Trial | None = None,
) -> ConfigCut:
    """Make the config of the model that has only the kept layers.

    The layer count is reduced under each of its names; lists with one entry per layer are cut,
    lists of layer indices renumbered, counts of first and last layers recomputed. If the stock
    class builds other layers from these values, other values are tried (`config_search`). The
    result is not proven: `check_cut` does that.

    Args:
        config: config of the dense model; it is not changed.
        kept: indices of the kept layers, from 0, in rising order.
        model_class: the stock class; None takes the class that the config names.
        trial: the trial of this cut, if the caller has built the dense model already.

    Raises:
        SimdiffError: the config does not state the number of layers, or `kept` are not layers in
            rising order.
    """
    depth = depth_of(config, kept)
    if trial is None and (model_class := model_class or stock_class(config)):
        trial = Trial(model_class, config, kept)
    cut = search_config(trial) if trial else cut_entries(config, depth)
    return ConfigCut(cut, tuple(_changes(vars(text_part(config)), vars(text_part(cut)))))


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of transformers that loads a model of this config; None if there is none."""
    for name in config.architectures or ():
        if found := getattr(transformers, name, None):
            return found
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return found[0] if isinstance(found, tuple) else found
    return None


def without_mtp(config: PreTrainedConfig) -> None:
    """Change a config in place to have no multi-token-prediction heads.

    Stock causal language models neither load nor save the weights of such heads. A model saved from
    memory therefore has none, and generation that looks for them would fail.
    """
    entries = vars(text_part(config))
    entries |= dict.fromkeys(mtp_counts(text_part(config)), 0)
    for name, value in entries.items():
        if MTP.search(name) and isinstance(value, list):
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

    Both models are built without weights from configs that were saved and loaded again. Layer i of
    the cut model must have the classes, the parameter shapes and the plain attributes of layer
    kept[i] of the dense model.

    Args:
        model_class: a stock class.
        config: config of the dense model.
        cut: the config that `cut_config` made from it.
        kept: indices of the kept layers, from 0, in rising order.
        allow_packed: accept parameters outside the layers that hold entries of every layer
            (Gemma 3n); the caller must slice them when it writes the weights.

    Raises:
        SurgeryError: the models differ; the message names the layers.
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
    """Raise SurgeryError if there are differences; name them and layers that could be removed."""
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
