"""Find kept layers that use what a removed layer computed.

No attribute of a layer shows these dependencies: shared indexers, the last attention of a hybrid.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from simdiff.models.layer_indices import spans
from simdiff.surgery.config_entries import Depth
from simdiff.surgery.structure import Difference


def lost_by_sharing(text: PreTrainedConfig, depth: Depth) -> list[Difference]:
    """Find kept "shared" layers whose source, the last full layer before them, is removed.

    In the sparse attention of GLM and DeepSeek such layers use the tokens that the indexer of an
    earlier layer chose. They arrive as an argument of the forward, so no attribute shows them.
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
    """Report a removed last attention of a hybrid: stock caches count the tokens in that layer."""
    kinds = getattr(text, "layer_types", None)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != depth.num_layers:
        return []
    attends = [layer for layer, kind in enumerate(kinds) if "attention" in _without_linear(kind)]
    if not attends or any(layer in depth.kept for layer in attends):
        return []
    return [Difference(None, f"one of the attention layers {spans(attends)} must stay")]


def _without_linear(kind: Any) -> str:
    return "" if kind == "linear_attention" else str(kind)
