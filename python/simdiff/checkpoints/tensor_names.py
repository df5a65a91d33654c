"""Layers in tensor names: find the prefix that counts them, and renumber them after a cut."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from simdiff.errors import SimdiffError
from simdiff.models.layer_indices import spans


@dataclass(frozen=True)
class LayerNumbers:
    """The names of layers in a checkpoint, before and after the cut."""

    prefix: str
    """Prefix before a layer's number, such as model.layers."""
    new: dict[int, int]
    """New number of each kept layer by its old number, including heads after the last layer."""
    stock: str
    """Prefix in the names of the stock model, which may have more or fewer parts."""
    others: tuple[str, ...] = ()
    """Prefixes that count other things, such as the layers of a vision tower."""

    def rename(self, name: str) -> str | None:
        """The new name of a tensor; None if its layer is removed."""
        layer = layer_of(name, self.prefix)
        if layer is None:
            return name
        if layer not in self.new:
            return None
        rest = name[len(self.prefix) + 1 + len(str(layer)) :]
        return f"{self.prefix}.{self.new[layer]}{rest}"

    def rename_any(self, name: str) -> str | None:
        """The new name of a module, in the names of the files or of the stock model."""
        if layer_of(name, self.prefix) is None and layer_of(name, self.stock) is not None:
            return LayerNumbers(self.stock, self.new, self.stock).rename(name)
        return self.rename(name)


def layer_of(name: str, prefix: str) -> int | None:
    """The index of the layer that a tensor belongs to; None if it belongs to none."""
    if not name.startswith(prefix + "."):
        return None
    number = name[len(prefix) + 1 :].partition(".")[0]
    return int(number) if number.isdecimal() and str(int(number)) == number else None


def counted_prefixes(names: Iterable[str]) -> dict[str, set[int]]:
    """The prefixes before the first number in names, each with the numbers that follow it.

    Numbers inside layers, such as those of experts, come after a layer's number and do not count.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        match = re.match(r"((?:[^.]*[^.\d][^.]*\.)+)(\d+)(?=\.|$)", name)
        if match:
            found[match[1][:-1]].add(int(match[2]))
    return dict(found)


def find_prefix(
    names: Collection[str], num_layers: int, extra: int, expected: str, where: str
) -> str:
    """Find the prefix that counts the decoder layers of a checkpoint by its numbers.

    Its numbers are exactly 0 to num_layers - 1, followed by up to `extra` heads.

    Args:
        names: names of all tensors.
        num_layers: number of layers in the config.
        extra: number of multi-token-prediction heads in the config.
        expected: the prefix that stock transformers would write; it decides between several, such
            as a decoder and a vision tower of the same depth.
        where: the checkpoint, for messages.

    Raises:
        SimdiffError: config and weights disagree on the number of layers.
    """
    found = counted_prefixes(names)
    layers = set(range(num_layers))
    fits = [
        prefix
        for prefix, numbers in found.items()
        if layers <= numbers <= set(range(num_layers + extra))
    ]
    # Stored names may lack the prefix of the base model (GPT-2's h.0) or have an additional one.
    alike = [
        prefix
        for prefix in found
        if prefix == expected
        or f".{expected}".endswith(f".{prefix}")
        or f".{prefix}".endswith(f".{expected}")
    ]
    chosen = [prefix for prefix in fits if prefix in alike] or (fits if not alike else [])
    if expected in chosen or len(chosen) == 1:
        return expected if expected in chosen else chosen[0]
    counts = "; ".join(
        f"{prefix} has {spans(found[prefix])}" for prefix in sorted(alike or found)[:5]
    )
    missing = sorted(layers - set().union(*(found[prefix] for prefix in alike)) if alike else [])
    raise SimdiffError(
        f"{where}: the weights must have the {num_layers} layers that config.json says "
        f"({expected}.0 to {num_layers - 1}), but {counts or 'no tensor is numbered'}"
        + (f"; layer {', '.join(map(str, missing[:5]))} is missing" if missing else "")
        + ": config and weights belong to different models, or a file is missing"
    )


def new_numbers(kept: Sequence[int], num_layers: int, heads: Iterable[int]) -> dict[int, int]:
    """New numbers by old ones: the kept layers from 0 on, then the heads after the last layer."""
    new = {old: index for index, old in enumerate(kept)}
    return new | {head: head - num_layers + len(kept) for head in heads}
