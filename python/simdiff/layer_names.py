"""Layers in the names of tensors: which prefix counts them, and their new numbers after a cut."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from simdiff.errors import SimdiffError


@dataclass(frozen=True)
class LayerNumbers:
    """How layers are called in a checkpoint, and what they are called after the cut."""

    prefix: str
    """Before the number, such as model.layers."""
    new: dict[int, int]
    """Old number to new number, of the layers that stay; heads behind the last layer included."""
    stock: str
    """The prefix in the names of the stock model, which may have more or fewer parts."""
    others: tuple[str, ...] = ()
    """Prefixes that count something else, such as the layers of a vision tower."""

    def rename(self, name: str) -> str | None:
        """The new name of a tensor, or None if it goes with its layer."""
        layer = layer_of(name, self.prefix)
        if layer is None:
            return name
        if layer not in self.new:
            return None
        rest = name[len(self.prefix) + 1 + len(str(layer)) :]
        return f"{self.prefix}.{self.new[layer]}{rest}"


def layer_of(name: str, prefix: str) -> int | None:
    """The layer that a tensor belongs to, or None if it belongs to none."""
    if not name.startswith(prefix + "."):
        return None
    number = name[len(prefix) + 1 :].partition(".")[0]
    return int(number) if number.isdecimal() and str(int(number)) == number else None


def counted_prefixes(names: Iterable[str]) -> dict[str, set[int]]:
    """What precedes the first number in names, and the numbers that follow it.

    Experts and the like inside layers come after a layer's number and so are not seen.
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
    """The prefix that counts the decoder layers of a checkpoint, found by structure.

    It is the one whose numbers are exactly 0 to num_layers - 1, with up to `extra` heads behind.

    Args:
        names: of all tensors.
        num_layers: the config's.
        extra: speculative (MTP) heads that the config declares.
        expected: the prefix that stock transformers would write; decides between several, such as
            a decoder and a vision tower of the same depth.
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
    # Stored names may lack the base model's prefix (GPT-2's h.0) or have one more.
    alike = [
        prefix
        for prefix in found
        if prefix == expected or f".{expected}".endswith(f".{prefix}")
        or f".{prefix}".endswith(f".{expected}")
    ]  # fmt: skip
    chosen = [prefix for prefix in fits if prefix in alike] or (fits if not alike else [])
    if expected in chosen or len(chosen) == 1:
        return expected if expected in chosen else chosen[0]
    counts = "; ".join(
        f"{prefix} has {_ranges(found[prefix])}" for prefix in sorted(alike or found)[:5]
    )
    missing = sorted(layers - set().union(*(found[prefix] for prefix in alike)) if alike else [])
    raise SimdiffError(
        f"{where}: the weights must have the {num_layers} layers that config.json says "
        f"({expected}.0 to {num_layers - 1}), but {counts or 'no tensor is numbered'}"
        + (f"; layer {', '.join(map(str, missing[:5]))} is missing" if missing else "")
        + ": config and weights belong to different models, or a file is missing"
    )


def _ranges(numbers: Collection[int]) -> str:
    """0, 2-5 for {0, 2, 3, 4, 5}."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def renumber_names(content: Any, layers: LayerNumbers, where: str) -> Any:
    """Renumber the layers in every string and key of a quantisation config.

    Such configs list modules by name (`modules_to_not_convert`, `ignore`), literally or as regular
    expressions. What names a layer that went, goes.

    Args:
        content: JSON.
        layers: the new numbers.
        where: the file and entry, for messages.

    Raises:
        SimdiffError: an expression chooses layers in a way that has no counterpart after the cut.
    """
    if isinstance(content, str):
        return _renumber_name(content, layers, where)
    if isinstance(content, dict):
        renamed = {}
        for key, value in content.items():
            new = _renumber_name(key, layers, where) if isinstance(key, str) else key
            if new is not None:
                renamed[new] = renumber_names(value, layers, f"{where}.{key}")
        return renamed
    if isinstance(content, (list, tuple)):
        items = [renumber_names(item, layers, where) for item in content]
        return type(content)(
            new for new, old in zip(items, content, strict=True) if new is not None or old is None
        )
    return content


def _renumber_name(name: str, layers: LayerNumbers, where: str) -> str | None:
    """One name or expression; None if all layers that it names went."""
    last = re.escape(layers.prefix.rpartition(".")[2])
    match = re.search(rf"(?<![A-Za-z0-9_]){last}(?P<dot>\\?\.)(?P<number>.*)", name, re.DOTALL)
    before = name[: match.start()] + last if match else ""
    if match is None or _names_another(before, layers):
        return name
    number, head = match["number"], name[: match.start("number")]
    one = re.match(r"(\d+)(?=\\?\.|\$|$)", number)
    if one:
        new = layers.new.get(int(one[1]))
        return None if new is None else f"{head}{new}{number[one.end() :]}"
    several = re.match(r"\((\?:)?((?:\d+\|)*\d+)\)(?=\\?\.|\$|$)", number)
    if several:
        kept = [layers.new[int(n)] for n in several[2].split("|") if int(n) in layers.new]
        if not kept:
            return None
        group = f"({several[1] or ''}{'|'.join(map(str, kept))})"
        return f"{head}{group}{number[several.end() :]}"
    every = re.match(r"\(?(?:\\d|\[0-9\]|\.)?[*+]|\[\^", number)
    if every or not re.match(r"[\d(\[]", number):
        return name
    raise SimdiffError(
        f"{where}: {name!r} chooses layers by an expression that cannot be renumbered: list the "
        "layers by name, or as (1|2|3), in the checkpoint's config first"
    )


def _names_another(before: str, layers: LayerNumbers) -> bool:
    """Whether a name up to its number is of something else that is counted, a vision tower say."""
    plain = before.replace("\\", "").removeprefix("re:").lstrip("^.*")
    return any(plain == other or plain.endswith(f".{other}") for other in layers.others)


def new_numbers(kept: Sequence[int], num_layers: int, heads: Iterable[int]) -> dict[int, int]:
    """Old to new number: the layers that stay from 0, then the heads that came after the last."""
    new = {old: index for index, old in enumerate(kept)}
    return new | {head: head - num_layers + len(kept) for head in heads}
