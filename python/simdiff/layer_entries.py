"""Config entries that depend on the depth: which they are, and what a cut makes of them."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from simdiff.errors import SimdiffError

DEPTH_NAMES = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_decoder_layers")
"""Names of the layer count. A class maps its own to the first by its attribute_map."""

MTP = re.compile(r"(^|_)(mtp|nextn)(_|$)")
"""Entries of the multi-token-prediction heads, which are not decoder layers."""

MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")

LAYERISH = re.compile(r"layer|block|(^|_)idx|ind(ex|ices)")

FIRST_LAYERS = re.compile(
    r"first_k_dense|first_k_|num_dense_layers|n_dense_layers|max_window_layers"
    r"|layer_start_index|num_hash_layers"
)
"""Counts of layers from the front: layer i is among them if i is below the value."""

LAST_LAYERS = re.compile(r"num_kv_shared_layers")
"""Counts of layers from the back."""

LAST_INDEX = re.compile(r"layer_end_index")
"""The index of the last layer that is meant; -1 is the last of all."""


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of the config that describes the decoder; never a copy."""
    part = config.get_text_config(decoder=True)
    return part if any(part is found for found in _parts(config)) else config


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    found = [config]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found += _parts(value)
    return found


def layer_counts(text: PreTrainedConfig) -> dict[str, int]:
    """Every entry that may be the number of decoder layers, by the name it is stored under.

    Raises:
        SimdiffError: there is none.
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
    """The number of decoder layers that a config promises.

    Raises:
        SimdiffError: it does not say.
    """
    # LongCat-Flash has two attentions to a layer and counts them as num_hidden_layers.
    return min(layer_counts(text_part(config)).values())


def check_layers(layers: Collection[int], num_layers: int, what: str = "layers") -> None:
    """Refuse indices that are not layers, or named twice.

    Raises:
        SimdiffError: which, and what would be right.
    """
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise SimdiffError(f"{what} must be indices from 0 to {num_layers - 1}, got {layer!r}")
    if len(set(layers)) != len(layers):
        raise SimdiffError(f"{what} must be named once each, got {sorted(layers)}")


@dataclass(frozen=True)
class Depth:
    """A cut: how many layers there were, which stay, how many heads of prediction follow."""

    num_layers: int
    kept: tuple[int, ...]
    num_mtp: int = 0

    def cut(self, values: Sequence[Any]) -> list[Any]:
        """The entries of the layers that stay, and what stands behind those of all layers."""
        return [values[layer] for layer in self.kept] + list(values[self.num_layers :])

    def below(self, value: int) -> int:
        """How many of the layers that stay had an index below the value."""
        return sum(layer < value for layer in self.kept)

    def renumber(self, indices: Sequence[int], base: int = 0) -> list[int]:
        """Indices of layers that stay, as they are numbered after the cut."""
        new = {layer + base: index + base for index, layer in enumerate(self.kept)}
        return [new[layer] for layer in indices if layer in new]


def set_depth(text: PreTrainedConfig, depth: Depth) -> None:
    """Write the number of layers, under every name that held it."""
    for name, value in layer_counts(text).items():
        if value == depth.num_layers:
            setattr(text, name, len(depth.kept))


def depth_of(config: PreTrainedConfig, kept: Sequence[int]) -> Depth:
    """The cut of a config that keeps these layers.

    Raises:
        SimdiffError: the config does not say how many layers there are, or kept are not some of
            them in order.
    """
    num_layers = layer_count(config)
    check_layers(kept, num_layers, "kept layers")
    if not kept or list(kept) != sorted(kept):
        raise SimdiffError(f"kept layers must be at least one, in rising order, got {list(kept)}")
    counts = [vars(text_part(config)).get(name) or 0 for name in MTP_COUNTS]
    return Depth(num_layers, tuple(kept), max(counts))


def cut_entries(config: PreTrainedConfig, depth: Depth) -> PreTrainedConfig:
    """A copy of the config in which every entry of the text part has its likeliest new value."""
    cut = copy.deepcopy(config)
    text = text_part(cut)
    set_depth(text, depth)
    for name, value in list(vars(text).items()):
        if not name.startswith("_"):
            new = cut_entry(name, value, depth)
            if new is not value:
                vars(text)[name] = new
    # Overrides of single layers, by index: transformers' heterogeneous configs.
    overrides = getattr(vars(text).get("_heterogeneity_spec"), "per_layer_overrides", None)
    if overrides is not None:
        kept = enumerate(depth.kept)
        new = {index: overrides[layer] for index, layer in kept if layer in overrides}
        text.per_layer_config = new or None
    return cut


def cut_entry(name: str, value: Any, depth: Depth) -> Any:
    """What becomes of a config entry; the same object if it does not depend on the depth."""
    if MTP.search(name):
        return value
    for applies, transform in _RULES:
        if applies(name, value, depth):
            return transform(value, depth)
    if isinstance(value, dict):
        new = {key: cut_entry(str(key), entry, depth) for key, entry in value.items()}
        return new if any(new[key] is not value[key] for key in value) else value
    return value


def is_int(value: Any) -> bool:
    """A whole number that is not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_index_list(name: str, value: Any, num_layers: int) -> bool:
    """Whether the values name layers: whole numbers below the depth in rising order."""
    return (
        isinstance(value, (list, tuple))
        and bool(LAYERISH.search(name))
        and all(map(is_int, value))
        and all(0 <= layer < num_layers for layer in value)
        and all(low < high for low, high in itertools.pairwise(value))
    )


def is_run_length(value: Any, num_layers: int) -> bool:
    """Whether it spells one entry a layer as [[[a, b], times], ...], like GPT-Neo."""
    try:
        return sum(len(unit) * times for unit, times in value) == num_layers and all(
            isinstance(unit, (list, tuple)) for unit, _ in value
        )
    except (TypeError, ValueError):
        return False


def _expand(value: Any) -> list[Any]:
    return [entry for unit, times in value for _ in range(times) for entry in unit]


def _is_per_layer(name: str, value: Any, depth: Depth) -> bool:
    lengths = {depth.num_layers, depth.num_layers + depth.num_mtp}
    return isinstance(value, (list, tuple)) and len(value) in lengths


def _is_spelled_out(name: str, value: Any, depth: Depth) -> bool:
    return isinstance(value, str) and "pattern" in name and len(value) == depth.num_layers


def _is_by_index(name: str, value: Any, depth: Depth) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and bool(LAYERISH.search(name))
        and all(str(key).isdigit() and int(key) < depth.num_layers for key in value)
    )


def _renumber_keys(value: dict[Any, Any], depth: Depth) -> dict[Any, Any]:
    new = {layer: index for index, layer in enumerate(depth.kept)}
    return {type(key)(new[int(key)]): entry for key, entry in value.items() if int(key) in new}


_Rule = tuple[Callable[[str, Any, Depth], bool], Callable[[Any, Depth], Any]]
_RULES: tuple[_Rule, ...] = (
    (
        lambda name, value, depth: is_index_list(name, value, depth.num_layers),
        lambda value, depth: type(value)(depth.renumber(value)),
    ),
    (
        lambda name, value, depth: is_run_length(value, depth.num_layers),
        lambda value, depth: [[depth.cut(_expand(value)), 1]],
    ),
    (_is_per_layer, lambda value, depth: type(value)(depth.cut(value))),
    (_is_spelled_out, lambda value, depth: "".join(depth.cut(value))),
    (_is_by_index, _renumber_keys),
    (
        lambda name, value, depth: is_int(value) and bool(FIRST_LAYERS.search(name)),
        lambda value, depth: depth.below(value),
    ),
    (
        lambda name, value, depth: is_int(value) and bool(LAST_LAYERS.search(name)),
        lambda value, depth: len(depth.kept) - depth.below(depth.num_layers - value),
    ),
    (
        lambda name, value, depth: is_int(value) and value >= 0 and bool(LAST_INDEX.search(name)),
        lambda value, depth: depth.below(value + 1) - 1,
    ),
)


def spans(layers: Sequence[int]) -> str:
    """Rising indices, runs joined: 0-2, 5."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
