"""Find the part of a config that describes the decoder, and the number of layers in it."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

from simdiff.errors import SimdiffError

DEPTH_NAMES = (
    "num_hidden_layers",
    "num_layers",
    "n_layers",
    "n_layer",
    "num_decoder_layers",
    "num_blocks",
)
"""Names of the layer count; a config class maps its own name to the first by attribute_map."""

MTP = re.compile(r"(^|_)(mtp|nextn)(_|$)")
"""Names of entries of multi-token-prediction heads, which are not decoder layers."""


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the decoder; the object itself, not a copy."""
    part = config.get_text_config(decoder=True)
    return part if any(part is found for found in parts(config)) else config


def parts(config: PreTrainedConfig | None) -> list[PreTrainedConfig]:
    """A config and all configs in it; empty for None."""
    if config is None:
        return []
    found = [config]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found += parts(value)
    return found


def quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The quantisation that a config describes, if any."""
    for part in (config, text_part(config)):
        found = getattr(part, "quantization_config", None)
        if found:
            return dict(found)
    return None


def mtp_counts(text: PreTrainedConfig) -> dict[str, int]:
    """The numbers of multi-token-prediction heads in a config, by their names.

    Their weights are stored as layers behind the last one.
    """
    return {
        name: value
        for name, value in vars(text).items()
        if MTP.search(name) and "num" in name and is_int(value) and value > 0
    }


def is_int(value: Any) -> bool:
    """Whether a value is an int but not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def layer_counts(text: PreTrainedConfig) -> dict[str, int]:
    """Config entries that may hold the number of decoder layers, by their stored names.

    Raises:
        SimdiffError: there is no such entry.
    """
    names: tuple[str, ...] = DEPTH_NAMES
    if isinstance(getattr(text, "decoder_layers", None), int):
        names = ("decoder_layers",)  # num_hidden_layers then counts those of the encoder
    counts = {}
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            counts[text.attribute_map.get(name, name)] = value
    if not counts:
        raise SimdiffError(
            f"{type(text).__name__} must have a number of layers under one of the names "
            f"{', '.join(DEPTH_NAMES)}, got none above 0"
        )
    return counts


def layer_count(config: PreTrainedConfig) -> int:
    """The number of decoder layers that a config states.

    Raises:
        SimdiffError: the config does not state it.
    """
    # LongCat-Flash has two attentions per layer, and num_hidden_layers counts the attentions.
    return min(layer_counts(text_part(config)).values())
