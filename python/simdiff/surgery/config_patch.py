"""Write a changed config in the words of the config.json that it came from.

transformers 5 reads a config of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) but
writes its own form, which transformers 4 and engines built on it do not understand. So the source's
entries are kept as they are, unknown ones too, and only those that the change concerns are written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from simdiff.models.config import DEPTH_NAMES, text_part
from simdiff.surgery.config_entries import (
    FIRST_LAYERS,
    LAST_INDEX,
    LAST_LAYERS,
    LAYERISH,
    MTP,
    Depth,
    cut_entry,
)
from simdiff.surgery.config_search import PER_LAYER

Entries = dict[str, Any]
Path = tuple[str, ...]

_GONE = object()
_APART = {
    "architectures",
    "compression_config",
    "dtype",
    "model_type",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
}
"""Entries that are no business of a cut: written apart, or never changed."""

_ROPE = ("rope_scaling", "rope_theta")
"""Entries of transformers 4 that take the place of `rope_parameters`."""

_NAMES_OF_LAYERS = (PER_LAYER, LAYERISH, FIRST_LAYERS, LAST_LAYERS, LAST_INDEX)


def patched_config(
    source: Mapping[str, Any], before: PreTrainedConfig, wanted: PreTrainedConfig, depth: Depth
) -> Entries:
    """The entries of `source` with those changed in which two configs differ.

    Entries that the source does not have, because their class derives them from others, are added
    only where the class would derive another value.

    Args:
        source: the content of config.json.
        before: the config that its stock class reads from it.
        wanted: the config that the class shall read from the result.
        depth: the cut, for entries that the class does not keep.
    """
    new = copy.deepcopy(dict(source))
    target = _plain(wanted)
    apart = set(DEPTH_NAMES) if text_part(before) is not before else set()

    def differences(config: PreTrainedConfig) -> list[tuple[Path, Any, Any]]:
        found = _differences(_plain(config), target)
        return [entry for entry in found if len(entry[0]) > 1 or entry[0][0] not in apart]

    def cut(name: str, old: Any, value: Any, stored: Any) -> Any:
        # What the class translates (mamba in transformers 4 is linear_attention in 5) is cut
        # in the source's words.
        return value if stored == old else cut_entry(name, stored, depth)

    for path, old, value in differences(before):
        _set(new, path, value, before, partial(cut, path[-1], old, value))
    _cut_unread(new, before, depth)
    for _ in range(2):
        rest = differences(read_config(type(before), new))
        if not rest:
            return new
        for path, _, value in rest:
            _set(new, path, value, before)
    if not differences(read_config(type(before), new)):
        return new
    # No words of the source say it: the form of today's transformers, beside what is unknown to it.
    return new | json.loads(wanted.to_json_string(use_diff=True))


def read_config(kind: type[PreTrainedConfig], entries: Mapping[str, Any]) -> PreTrainedConfig:
    """The config that a stock class reads from the content of a config.json."""
    decoded = kind._decode_special_floats(copy.deepcopy(dict(entries)))
    config: PreTrainedConfig = kind.from_dict(decoded)
    return config


def set_dtype(entries: Entries, dtype: str) -> None:
    """Write the dtype of the weights in the source's word for it, in every part that has one."""
    if not _set_dtypes(entries, dtype):
        entries["dtype" if "rope_parameters" in entries else "torch_dtype"] = dtype


def _set_dtypes(entries: Entries, dtype: str) -> bool:
    found = False
    for name, value in entries.items():
        if name in ("dtype", "torch_dtype"):
            entries[name], found = dtype, True
        elif isinstance(value, dict) and name.endswith("_config") and name not in _APART:
            _set_dtypes(value, dtype)
    return found


def text_entries(entries: Entries, config: PreTrainedConfig) -> Entries:
    """The part of the entries that describes the decoder; the same dict, not a copy."""
    part = entries
    for name in _text_path(config):
        part = part[name] if isinstance(part.get(name), dict) else part
    return part


def _plain(config: PreTrainedConfig) -> Entries:
    content: Entries = json.loads(config.to_json_string(use_diff=False))
    return content


def _differences(old: Any, new: Any, path: Path = ()) -> Iterator[tuple[Path, Any, Any]]:
    """Yield path, old and new value of entries that differ; _GONE where there is none."""
    for name in sorted({*old, *new}):
        if name.startswith("_") or name in _APART:
            continue
        before, after = old.get(name, _GONE), new.get(name, _GONE)
        if isinstance(before, dict) and isinstance(after, dict) and before and after:
            yield from _differences(before, after, (*path, name))
        elif before != after:
            yield (*path, name), before, after


def _set(
    entries: Entries,
    path: Path,
    value: Any,
    config: Any,
    change: Callable[[Any], Any] | None = None,
) -> None:
    """Write an entry under each of its names in the source, or add it under its own.

    With `change`, which makes the new value of the stored one, nothing is added.
    """
    add = change is None
    *parents, name = path
    for parent in parents:
        config = getattr(config, parent, None)
        # A part that the source has not is spelled out in the part above it, as in Qwen2-VL.
        if isinstance(entries.get(parent), dict):
            entries = entries[parent]
        elif not isinstance(config, PreTrainedConfig):
            if not add:
                return
            entries = entries.setdefault(parent, {})
    aliases = getattr(config, "attribute_map", {}) if isinstance(config, PreTrainedConfig) else {}
    present = [key for key in (name, *(a for a in aliases if aliases[a] == name)) if key in entries]
    if value is _GONE:
        for key in present:
            del entries[key]
        return
    for key in present or ([name] if add else []):
        entries[key] = copy.deepcopy(value if change is None else change(entries[key]))
    if add and (name == "rope_parameters" or "rope_parameters" in parents):
        for key in _ROPE:
            entries.pop(key, None)


def _cut_unread(entries: Entries, config: PreTrainedConfig, depth: Depth) -> None:
    """Cut entries of layers that the class reads and drops, and copies of the number of layers."""
    text = text_part(config)
    part = text_entries(entries, config)
    known = {*vars(text), *text.attribute_map}
    for name, value in list(part.items()):
        if name in known or name in _APART or MTP.search(name):
            continue
        if any(pattern.search(name) for pattern in _NAMES_OF_LAYERS):
            part[name] = cut_entry(name, value, depth)
    for name, where in stale_counts(entries, config, depth):
        where[name] = len(depth.kept)


def stale_counts(
    entries: Entries, config: PreTrainedConfig, depth: Depth
) -> list[tuple[str, Entries]]:
    """Numbers of layers that are still those of the dense model, each with the part it stands in.

    A composite config may repeat the number beside the decoder's part.
    """
    part = text_entries(entries, config)
    if "decoder_layers" in part:
        return []  # the other numbers count the encoder's
    return [
        (name, where)
        for name in DEPTH_NAMES
        for where in ([entries] if part is entries else [entries, part])
        if where.get(name) == depth.num_layers and (where is part or name in part)
    ]


def _text_path(config: PreTrainedConfig) -> Path:
    """The names of the parts that lead to the decoder's."""
    text = text_part(config)
    if text is config:
        return ()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            if value is text:
                return (name,)
            if text_part(value) is text:
                return (name, *_text_path(value))
    return ()
