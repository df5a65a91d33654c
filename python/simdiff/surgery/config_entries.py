"""Find the config entries that depend on the depth, and compute their values after a cut."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from simdiff.errors import SimdiffError
from simdiff.models.config import (
    MTP,
    is_int,
    layer_count,
    layer_counts,
    mtp_counts,
    text_part,
)
from simdiff.models.layer_indices import check_layers

LAYERISH = re.compile(r"layer|block|(^|_)idx|ind(ex|ices)")

FIRST_LAYERS = re.compile(
    r"first_k_dense|first_k_|num_dense_layers|n_dense_layers|max_window_layers"
    r"|layer_start_index|num_hash_layers"
)
"""Names of counts of first layers: layer i is counted if i is below the value."""

LAST_LAYERS = re.compile(r"num_kv_shared_layers")
"""Names of counts of last layers."""

LAST_INDEX = re.compile(r"layer_end_index")
"""Names of entries that hold the index of a last layer; -1 means the last layer of the model."""


@dataclass(frozen=True)
class Depth:
    """A cut: the number of layers before it, the kept layers, and the number of MTP heads."""

    num_layers: int
    kept: tuple[int, ...]
    num_mtp: int = 0

    def cut(self, values: Sequence[Any]) -> list[Any]:
        """Keep the entries of the kept layers, and all entries after those of the layers."""
        return [values[layer] for layer in self.kept] + list(values[self.num_layers :])

    def below(self, value: int) -> int:
        """The number of kept layers whose index was below the value."""
        return sum(layer < value for layer in self.kept)

    def renumber(self, indices: Sequence[int], base: int = 0) -> list[int]:
        """Drop the indices of removed layers and renumber the others as after the cut."""
        new = {layer + base: index + base for index, layer in enumerate(self.kept)}
        return [new[layer] for layer in indices if layer in new]


def set_depth(text: PreTrainedConfig, depth: Depth) -> None:
    """Write the new number of layers under every name that held the old one."""
    for name, value in layer_counts(text).items():
        if value == depth.num_layers:
            setattr(text, name, len(depth.kept))


def depth_of(config: PreTrainedConfig, kept: Sequence[int]) -> Depth:
    """Describe the cut of a config that keeps the given layers.

    Raises:
        SimdiffError: the config does not state the number of layers, or `kept` are not layers in
            rising order.
    """
    num_layers = layer_count(config)
    check_layers(kept, num_layers, "kept layers")
    if not kept or list(kept) != sorted(kept):
        raise SimdiffError(f"kept layers must be at least one, in rising order, got {list(kept)}")
    heads = max(mtp_counts(text_part(config)).values(), default=0)
    return Depth(num_layers, tuple(kept), heads)


def cut_entries(config: PreTrainedConfig, depth: Depth) -> PreTrainedConfig:
    """Copy a config and give every entry of its text part the most likely value after the cut."""
    cut = copy.deepcopy(config)
    text = text_part(cut)
    set_depth(text, depth)
    for name, value in list(vars(text).items()):
        if not name.startswith("_"):
            new = cut_entry(name, value, depth)
            if new is not value:
                vars(text)[name] = new
    # Heterogeneous configs of transformers hold overrides of single layers, by layer index.
    overrides = getattr(vars(text).get("_heterogeneity_spec"), "per_layer_overrides", None)
    if overrides is not None:
        kept = enumerate(depth.kept)
        new = {index: overrides[layer] for index, layer in kept if layer in overrides}
        text.per_layer_config = new  # also if empty: a class fills in defaults where it is absent
    return cut


def cut_entry(name: str, value: Any, depth: Depth) -> Any:
    """The value of a config entry after the cut; the same object if the depth does not matter."""
    if MTP.search(name):
        return value
    for applies, transform in _RULES:
        if applies(name, value, depth):
            return transform(value, depth)
    if isinstance(value, dict):
        new = {key: cut_entry(str(key), entry, depth) for key, entry in value.items()}
        return new if any(new[key] is not value[key] for key in value) else value
    return value


def is_index_list(name: str, value: Any, num_layers: int) -> bool:
    """Whether a list holds layer indices: rising whole numbers below the depth."""
    return (
        isinstance(value, (list, tuple))
        and bool(LAYERISH.search(name))
        and all(map(is_int, value))
        and all(0 <= layer < num_layers for layer in value)
        and all(low < high for low, high in itertools.pairwise(value))
    )


def is_run_length(value: Any, num_layers: int) -> bool:
    """Whether a value encodes one entry per layer as [[[a, b], times], ...], as GPT-Neo's does."""
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
