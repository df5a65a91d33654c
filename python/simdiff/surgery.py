"""Surgery: layers taken out of a model in memory, so that it is what stock classes will load."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models import DecoderLayers, find_decoder_layers, text_config
from simdiff.selection import check_layers


class SurgeryError(SimdiffError):
    """The cut would leave a model that stock transformers cannot express."""


def remove_layers(model: PreTrainedModel, layers: Collection[int]) -> PreTrainedModel:
    """Take decoder layers out of a model, in place.

    The layers that stay are renumbered (`layer_idx` counts cache slots), the config's layer count
    and every per-layer list in it are cut, and the result is compared with the model that the
    stock class builds from the cut config.

    Args:
        model: a causal language model of transformers.
        layers: indices from 0 in the model as it is.

    Returns:
        The same model.

    Raises:
        SurgeryError: stock classes would build something else from the cut config; the model
            is unchanged.
        SimdiffError: not a layer, all layers, or no layers.
    """
    _cut(model, layers)
    return model


@contextlib.contextmanager
def removed_layers(model: PreTrainedModel, layers: Collection[int]) -> Iterator[PreTrainedModel]:
    """`remove_layers` for the duration of a with block; no weight is copied or moved."""
    restore = _cut(model, layers)
    try:
        yield model
    finally:
        restore()


def _cut(model: PreTrainedModel, layers: Collection[int]) -> Callable[[], None]:
    found = find_decoder_layers(model)
    num_layers = len(found)
    check_layers(layers, num_layers, "layers to remove")
    if not 0 < len(layers) < num_layers:
        raise SimdiffError(
            f"the layers to remove must be 1 to {num_layers - 1} of {num_layers}, got {len(layers)}"
        )
    kept = [layer for layer in range(num_layers) if layer not in layers]
    config = text_config(model)
    old_config, old_layers = copy.copy(config.__dict__), list(found.modules)
    old_indices = _layer_indices(old_layers)

    def restore() -> None:
        config.__dict__.clear()
        config.__dict__.update(old_config)
        _replace(found, old_layers)
        for module, index in old_indices:
            module.layer_idx = index

    try:
        _cut_config(config, num_layers, kept)
        _replace(found, [old_layers[layer] for layer in kept])
        _renumber(found.modules)
        _check_rebuild(model, found.path, kept)
    except BaseException:
        restore()
        raise
    return restore


def _replace(found: DecoderLayers, layers: list[nn.Module]) -> None:
    found.modules._modules.clear()
    found.modules.extend(layers)


def _layer_indices(layers: list[nn.Module]) -> list[tuple[nn.Module, Any]]:
    return [
        (module, module.layer_idx)
        for layer in layers
        for module in layer.modules()
        if hasattr(module, "layer_idx")
    ]


def _renumber(layers: nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        for module, _ in _layer_indices([layer]):
            module.layer_idx = index  # type: ignore[assignment]


def _cut_config(config: Any, num_layers: int, kept: list[int]) -> None:
    """Cut the layer count and every list that has one entry per layer."""
    for name, value in list(config.__dict__.items()):
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            config.__dict__[name] = type(value)(value[layer] for layer in kept)
    config.num_hidden_layers = len(kept)


def _check_rebuild(model: PreTrainedModel, path: str, kept: list[int]) -> None:
    """Compare with what the stock class builds from the config, weights left out."""
    with torch.device("meta"):
        rebuilt = type(model)(copy.deepcopy(model.config))
    differences = _differences(rebuilt.get_submodule(path), model.get_submodule(path), kept)
    if differences:
        raise SurgeryError(
            f"{type(model).__name__} cannot express this cut: what stock transformers builds from "
            f"the cut config differs in {'; '.join(differences[:3])}"
            + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
        )


def _differences(rebuilt: nn.Module, ours: nn.Module, kept: list[int]) -> list[str]:
    theirs, mine = dict(rebuilt.named_modules()), dict(ours.named_modules())
    differences = []
    for name in sorted(set(theirs) | set(mine)):
        place = name
        index, _, rest = name.partition(".")
        if index:
            place = f"layer {kept[int(index)]}" + (f" {rest}" if rest else "")
        if name not in theirs or name not in mine:
            differences.append(f"{place}: only in the {'kept' if name in mine else 'stock'} model")
            continue
        stock, own = _plain_state(theirs[name]), _plain_state(mine[name])
        differences += [
            f"{place}: {key} is {stock.get(key)}, but was {own.get(key)}"
            for key in sorted(set(stock) | set(own))
            if stock.get(key) != own.get(key)
        ]
    return differences


def _plain_state(module: nn.Module) -> dict[str, Any]:
    """The class, the parameter shapes and every plain attribute that may steer the computation."""
    state: dict[str, Any] = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_")
        and key != "training"
        and isinstance(value, (bool, int, float, str, type(None)))
    }
    state["class"] = type(module).__name__
    for key, parameter in module.named_parameters(recurse=False):
        state[f"shape of {key}"] = tuple(parameter.shape)
    return state
