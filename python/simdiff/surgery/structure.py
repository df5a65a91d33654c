"""Describe a model as plain data, layer by layer and without weights, and compare two models."""

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

from simdiff.models.structure import find_decoder_layers, text_config

PACKED = re.compile(r"per_layer")
"""Names of modules outside the layers whose parameters hold the entries of all layers in order.

Gemma 3n and 4 reshape `embed_tokens_per_layer` and `per_layer_model_projection` to
(..., num_hidden_layers, hidden_size_per_layer_input). The order in other modules is unknown.
"""

RUN_TIME = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
"""Config entries and properties that the forward of a model looks up by layer index."""

INDEX_NAME = re.compile(r"^_?(decoder_)?(layer|block)_?(idx|id|index|number|num)$")
"""Names of attributes that hold a layer's own index, which changes: it counts cache slots."""

_IGNORED = set(vars(nn.Module())) | {
    "forward",
    "gradient_checkpointing",
    "generation_config",
    "name_or_path",
}
_HOOKS = re.compile(r"^_(hf|old|is_hf|gradient)|tied_weights_keys|keys_to_ignore")

State = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One difference that a cut would cause; layers are counted from 0 before the cut."""

    layer: int | None
    what: str

    def __str__(self) -> str:
        """The difference in words."""
        return self.what if self.layer is None else f"layer {self.layer} {self.what}"


@dataclass(frozen=True)
class Structure:
    """The classes, parameter shapes and plain attributes of a model, by module."""

    path: str
    layers: list[dict[str, State]]
    outside: dict[str, State] = field(repr=False)
    kinds: dict[str, tuple[Any, ...]]
    """Lists in the config by which masks, rotary embeddings and caches are chosen at run time."""


def saved_and_loaded(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config as stock classes read it back from the config.json that it is saved to."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        config.to_json_file(path, use_diff=True)
        loaded = type(config).from_json_file(path)
    loaded._attn_implementation = config._attn_implementation
    return loaded


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build the stock model of a config as loading builds it, without memory for weights."""
    with torch.device("meta"):
        return model_class(saved_and_loaded(config))


def build_cut(
    model_class: type[PreTrainedModel], cut: PreTrainedConfig
) -> PreTrainedModel | Difference:
    """Build the stock model of a cut config; return a Difference if the class refuses it."""
    try:
        return build(model_class, cut)
    except Exception as error:  # stock classes raise anything on a config that they cannot build
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
    kinds = {name: getattr(shared, name, None) for name in RUN_TIME}
    lists = {
        name: tuple(value)
        for name, value in kinds.items()
        if isinstance(value, (list, tuple)) and len(value) == len(layers)
    }
    return Structure(found.path, layers, outside, lists)


def _states(layer: nn.Module, shared: PreTrainedConfig) -> dict[str, State]:
    return {name: _state(module, shared) for name, module in layer.named_modules()}


def _state(module: nn.Module, shared: PreTrainedConfig, public: bool = False) -> State:
    """The class, the parameter shapes and all plain attributes that may steer the computation."""
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
    """Entries in which a layer's own config differs from the model's."""
    return [
        (name, _plain(value))
        for name, value in vars(config).items()
        if not name.startswith("_")
        and _plain(value) is not _NOT_PLAIN
        and vars(shared).get(name) != value
    ]


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    """Convert a value to a form that compares by content; _NOT_PLAIN if it has none."""
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
class StructureComparison:
    """The comparison of a dense model with the model that stock classes build from a cut config."""

    differences: tuple[Difference, ...]
    """Places where layer i of the cut model is not layer kept[i] of the dense model."""
    follows: tuple[tuple[str, str, str], ...]
    """Attributes that may change with the depth: (dense module, cut module, attribute)."""
    packed: tuple[tuple[str, str, int], ...]
    """Parameters with equally many entries for every layer: (module, parameter, dimension)."""


def compare_structures(
    dense: Structure, cut: Structure, kept: Sequence[int]
) -> StructureComparison:
    """Compare layer i of the cut model with layer kept[i] of the dense model, and the rest.

    Only a layer's own index, lists with one entry per layer and, outside the layers, counts of
    layers and parameters that hold entries of every layer may change.
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
    for name, kinds in dense.kinds.items():
        differences += [
            Difference(layer, f"{name} was {kinds[layer]}, would be {new}")
            for layer, new in zip(kept, cut.kinds.get(name, ()), strict=False)
            if kinds[layer] != new
        ]
    return StructureComparison(tuple(differences), tuple(follows), tuple(packed))


def structural_differences(stock: Structure, live: Structure) -> list[str]:
    """List where a model in memory has other classes or parameter shapes than the stock model."""
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
    """Yield (module, attribute, old, new); attribute is None where one side lacks the module."""
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
        return True  # such as the rotary frequencies of a layer kind that no longer occurs
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
    """Whether a list changed as entries per layer, layer indices or occurring layer kinds do."""
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
    """Find the one dimension with equally many entries for every layer; None if there is none."""
    if not key.startswith("shape of ") or not PACKED.search(name) or len(old) != len(new):
        return None
    differing = [d for d, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]]
    if len(differing) != 1:
        return None
    before, after = old[differing[0]], new[differing[0]]
    if before % num_layers or before // num_layers * len(kept) != after:
        return None
    return name, key.removeprefix("shape of "), differing[0]
