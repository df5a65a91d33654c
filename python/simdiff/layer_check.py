"""What stock classes build from a config, layer by layer, weights left out."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from simdiff.models import find_decoder_layers, text_config

PACKED = re.compile(r"per_layer")
"""Modules outside the layers whose parameters hold the entries of one layer after the other.

Gemma 3n and 4 reshape `embed_tokens_per_layer` and `per_layer_model_projection` to
(..., num_hidden_layers, hidden_size_per_layer_input). What others pack is in unknown order.
"""

INDEX_NAME = re.compile(r"^_?(decoder_)?(layer|block)_?(idx|id|index|number|num)$")
"""Attributes that hold a layer's own index. It must change: it counts the slots of the cache."""

_IGNORED = set(vars(nn.Module())) | {
    "forward", "gradient_checkpointing", "generation_config", "name_or_path",
}  # fmt: skip
_HOOKS = re.compile(r"^_(hf|old|is_hf|gradient)|tied_weights_keys|keys_to_ignore")

State = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One thing that a cut would change. A layer counts from 0 in the model before the cut."""

    layer: int | None
    what: str

    def __str__(self) -> str:
        """For people."""
        return self.what if self.layer is None else f"layer {self.layer} {self.what}"


@dataclass(frozen=True)
class Structure:
    """A model as its classes, parameter shapes and plain attributes, by module."""

    path: str
    layers: list[dict[str, State]]
    outside: dict[str, State] = field(repr=False)


def saved_and_loaded(config: PreTrainedConfig) -> PreTrainedConfig:
    """What stock classes will read from the config.json that this config is written to."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        config.to_json_file(path, use_diff=True)
        loaded = type(config).from_json_file(path)
    loaded._attn_implementation = config._attn_implementation
    return loaded


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The stock model of a config as it will be loaded, without memory for weights."""
    with torch.device("meta"):
        return model_class(saved_and_loaded(config))


def build_cut(
    model_class: type[PreTrainedModel], cut: PreTrainedConfig
) -> PreTrainedModel | Difference:
    """The stock model of a cut config, or why the class refuses it."""
    try:
        return build(model_class, cut)
    except Exception as error:  # whatever a stock class raises on a config that it cannot build
        reason = " ".join(str(error).split())[:200]
        return Difference(None, f"no model at all: {type(error).__name__}: {reason}")


def describe(model: PreTrainedModel) -> Structure:
    """Read a model's structure; weights are not touched."""
    found = find_decoder_layers(model)
    shared = text_config(model)
    layers = [_states(layer, shared) for layer in found.modules]
    inside = found.path + "."
    outside = {
        name: _state(module, shared, public=True)
        for name, module in model.named_modules()
        if name != found.path and not name.startswith(inside)
    }
    return Structure(found.path, layers, outside)


def _states(layer: nn.Module, shared: PreTrainedConfig) -> dict[str, State]:
    return {name: _state(module, shared) for name, module in layer.named_modules()}


def _state(module: nn.Module, shared: PreTrainedConfig, public: bool = False) -> State:
    """The class, the shapes, and every plain attribute that may steer the computation."""
    state: State = {"class": type(module).__qualname__}
    for key, value in vars(module).items():
        if key in _IGNORED or _HOOKS.search(key) or (public and key.startswith("_")):
            continue
        if isinstance(value, PreTrainedConfig):
            if not public and value is not shared:
                state |= {f"config.{name}": own for name, own in _own_entries(value, shared)}
        elif (plain := _plain(value)) is not _NOT_PLAIN:
            state[key] = plain
    for key, parameter in module.named_parameters(recurse=False):
        state[f"shape of {key}"] = tuple(parameter.shape)
    for key, buffer in module.named_buffers(recurse=False):
        state[f"buffer {key}"] = tuple(buffer.shape)
    return state


def _own_entries(config: PreTrainedConfig, shared: PreTrainedConfig) -> list[tuple[str, Any]]:
    """What a layer's own config says otherwise than the model's."""
    return [
        (name, _plain(value))
        for name, value in vars(config).items()
        if not name.startswith("_")
        and _plain(value) is not _NOT_PLAIN
        and vars(shared).get(name) != value
    ]


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """The value in a form that compares by content, or _NOT_PLAIN."""
    if isinstance(value, (bool, int, float, str, type(None), torch.dtype)):
        return value
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape))
    if isinstance(value, functools.partial):
        return ("partial", _plain(value.func), _plain(value.args), _plain(value.keywords))
    if isinstance(value, FunctionType):
        cells = tuple(_plain(cell.cell_contents) for cell in value.__closure__ or ())
        return (value.__qualname__, *(cell for cell in cells if cell is not _NOT_PLAIN))
    if isinstance(value, (list, tuple, set, frozenset)):
        ordered = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        entries = [_plain(entry) for entry in ordered]
        return _NOT_PLAIN if _NOT_PLAIN in entries else tuple(entries)
    if isinstance(value, dict):
        entries = [(str(key), _plain(entry)) for key, entry in value.items()]
        return tuple((key, entry) for key, entry in entries if entry is not _NOT_PLAIN)
    return _NOT_PLAIN


@dataclass(frozen=True)
class Comparison:
    """A dense model beside the one that stock classes build from the cut config."""

    differences: tuple[Difference, ...]
    """Where layer i of the cut model is not layer kept[i] of the dense one."""
    follows: tuple[tuple[str, str, str], ...]
    """(module of the dense model, module of the cut one, attribute): may change with the depth."""
    packed: tuple[tuple[str, str, int], ...]
    """(module, parameter, dimension): holds the same number of entries for every layer."""


def compare(dense: Structure, cut: Structure, kept: Sequence[int]) -> Comparison:
    """Compare layer i of the cut model with layer kept[i] of the dense one, and the rest.

    Nothing may change but a layer's own index, lists with one entry per layer and, outside the
    layers, counts of them and parameters that pack something for every layer.
    """
    num_layers = len(dense.layers)
    differences = []
    if len(cut.layers) != len(kept):
        differences.append(
            Difference(None, f"{len(cut.layers)} decoder layers instead of {len(kept)}")
        )
    follows, packed = [], []
    pairs: list[tuple[int | None, str, str, dict[str, State], dict[str, State]]] = [
        (layer, f"{dense.path}.{layer}", f"{cut.path}.{index}", dense.layers[layer], states)
        for index, (layer, states) in enumerate(zip(kept, cut.layers, strict=False))
    ]
    pairs.append((None, "", "", dense.outside, cut.outside))
    for layer, old_path, new_path, before, after in pairs:
        for name, key, old, new in _unequal(before, after):
            place = f"{name}: " if name else ""
            if key is None:
                side = "dense" if name in before else "cut"
                differences.append(Difference(layer, f"{place}only in the {side} model"))
            elif _follows(key, old, new, num_layers, kept, layer):
                follows.append((_join(old_path, name), _join(new_path, name), key))
            elif layer is None and (found := _packed(name, key, old, new, num_layers, kept)):
                packed.append(found)
            else:
                differences.append(Difference(layer, f"{place}{key} was {old}, would be {new}"))
    return Comparison(tuple(differences), tuple(follows), tuple(packed))


def unlike(stock: Structure, live: Structure) -> list[str]:
    """Where a model in memory has other classes or parameter shapes than the stock one."""
    found = []
    pairs = [("", stock.outside, live.outside)]
    pairs += [
        (f"layer {layer} ", *states)
        for layer, states in enumerate(zip(stock.layers, live.layers, strict=False))
    ]
    for place, before, after in pairs:
        for name, key, old, new in _unequal(before, after):
            if key is None:
                side = "stock" if name in before else "given"
                found.append(f"{place}{name} is only in the {side} model")
            elif key == "class" or key.startswith("shape of "):
                found.append(f"{place}{name}: {key} is {new}, stock has {old}")
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _unequal(
    before: dict[str, State], after: dict[str, State]
) -> Iterator[tuple[str, str | None, Any, Any]]:
    """(module, attribute, old, new); no attribute where one side lacks the module."""
    for name in sorted(set(before) | set(after)):
        if name not in before or name not in after:
            yield name, None, None, None
            continue
        old, new = before[name], after[name]
        for key in sorted(set(old) | set(new)):
            if old.get(key) != new.get(key):
                yield name, key, old.get(key), new.get(key)


def _follows(
    key: str, old: Any, new: Any, num_layers: int, kept: Sequence[int], layer: int | None
) -> bool:
    """Whether an attribute changes only because there are fewer layers."""
    if layer is not None and INDEX_NAME.match(key):
        return True
    if key.startswith("shape of ") or old is None:
        return False
    if layer is None and new is None:
        return True  # such as the rotary frequencies of a kind of layer that is gone
    if new is None:
        return False
    if isinstance(old, tuple):
        return _list_follows(old, new, num_layers, kept)
    if not isinstance(old, int) or not isinstance(new, int):
        return False
    if layer is not None:
        return (old, new) == (num_layers, len(kept)) and "layer" in key
    if "layer" in key and new == sum(layer < old for layer in kept):
        return True  # the index of a first layer, like Gemma 4's first_kv_shared_layer_idx
    return old % num_layers == 0 and old // num_layers * len(kept) == new


def _list_follows(old: tuple[Any, ...], new: Any, num_layers: int, kept: Sequence[int]) -> bool:
    """One entry per layer, indices of layers, or the kinds of layers that there are."""
    if len(old) == num_layers and new == tuple(old[layer] for layer in kept):
        return True
    if not isinstance(new, tuple):
        return False
    if all(isinstance(entry, int) for entry in old):
        return new == tuple(index for index, layer in enumerate(kept) if layer in old)
    if all(isinstance(entry, tuple) and str(entry[0]).isdigit() for entry in old if entry):
        index = {str(layer): str(place) for place, layer in enumerate(kept)}
        return new == tuple((index[key], *rest) for key, *rest in old if key in index)
    gone = [entry for entry in old if entry not in new]
    kinds = [entry[0] if isinstance(entry, tuple) and entry else entry for entry in gone]
    return all(str(kind).endswith(("attention", "conv")) for kind in kinds) and new == tuple(
        entry for entry in old if entry in new
    )


def _packed(
    name: str, key: str, old: Any, new: Any, num_layers: int, kept: Sequence[int]
) -> tuple[str, str, int] | None:
    """The one dimension that holds the same number of entries for every layer, if there is one."""
    if not key.startswith("shape of ") or not PACKED.search(name) or len(old) != len(new):
        return None
    differing = [d for d, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    if len(differing) != 1:
        return None
    before, after = old[differing[0]], new[differing[0]]
    if before % num_layers or before // num_layers * len(kept) != after:
        return None
    return name, key.removeprefix("shape of "), differing[0]
