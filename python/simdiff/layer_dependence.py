"""What a layer that stays needs of one that goes, where no attribute of the layer shows it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from simdiff.layer_check import Difference
from simdiff.layer_entries import Depth, spans


def lost_by_sharing(text: PreTrainedConfig, depth: Depth) -> list[Difference]:
    """Layers that reuse what the last layer before them computed, if that one goes.

    GLM's and DeepSeek's sparse attention lets "shared" layers take the tokens that the indexer of
    an earlier layer chose: an argument of the forward, which no attribute of a layer shows.
    """
    lost = []
    for name, value in vars(text).items():
        if isinstance(value, (list, tuple)) and len(value) == depth.num_layers:
            source = None
            for layer, kind in enumerate(value):
                if kind != "shared":
                    source = layer
                elif layer in depth.kept and source is not None and source not in depth.kept:
                    lost.append(Difference(layer, f"reuses the {name} of layer {source}"))
    return lost


def lost_attention(text: PreTrainedConfig, depth: Depth) -> list[Difference]:
    """The last attention of a hybrid: stock caches count the tokens there, or cannot generate."""
    kinds = getattr(text, "layer_types", None)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != depth.num_layers:
        return []
    attends = [layer for layer, kind in enumerate(kinds) if "attention" in _without_linear(kind)]
    if not attends or any(layer in depth.kept for layer in attends):
        return []
    return [Difference(None, f"one of the attention layers {spans(attends)} must stay")]


def _without_linear(kind: Any) -> str:
    return "" if kind == "linear_attention" else str(kind)
