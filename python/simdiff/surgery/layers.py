"""Remove layers from a model in memory, so that it equals what stock classes will load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from simdiff.errors import SimdiffError, SurgeryError
from simdiff.models.config import MTP, text_part
from simdiff.models.layer_indices import check_layers
from simdiff.models.structure import DecoderLayers, find_decoder_layers, text_config
from simdiff.surgery.config import cut_config, refuse, without_mtp
from simdiff.surgery.config_search import Trial
from simdiff.surgery.structure import (
    StructureComparison,
    build_cut,
    describe,
    structural_differences,
)

_PARAMETER_NAMES = {
    "all_tied_weights_keys",
    "_tied_weights_keys",
    "_keys_to_ignore_on_load_unexpected",
    "_keys_to_ignore_on_load_missing",
}
"""Attributes of transformers' models that name parameters."""

__all__ = ["SurgeryError", "layers_removed", "remove_layers"]


def remove_layers(model: PreTrainedModel, layers: Collection[int]) -> PreTrainedModel:
    """Take decoder layers out of a model, in place.

    The kept layers are renumbered (`layer_idx` counts cache slots), the layer count and all
    per-layer entries of the config are cut, and the result is compared with the model that the
    stock class builds from the cut config.

    Args:
        model: a causal language model of transformers.
        layers: indices of the layers to remove, from 0.

    Returns:
        The same model.

    Raises:
        SurgeryError: stock classes would build something else from the cut config; the model
            is unchanged.
        SimdiffError: an index is not a layer, or `layers` is empty or names all layers.
    """
    _cut(model, layers)
    return model


@contextlib.contextmanager
def layers_removed(model: PreTrainedModel, layers: Collection[int]) -> Iterator[PreTrainedModel]:
    """Remove layers inside a with block and put them back at its end.

    See `remove_layers`. No weight of a layer is copied or moved.
    """
    undo = _cut(model, layers)
    try:
        yield model
    finally:
        undo()


def _cut(model: PreTrainedModel, layers: Collection[int]) -> Callable[[], None]:
    found = find_decoder_layers(model)
    num_layers = len(found)
    check_layers(layers, num_layers, "layers to remove")
    if not 0 < len(layers) < num_layers:
        raise SimdiffError(
            f"the layers to remove must be 1 to {num_layers - 1} of {num_layers}, got {len(layers)}"
        )
    kept = [layer for layer in range(num_layers) if layer not in layers]
    trial = Trial(type(model), model.config, kept)
    if not getattr(model, "is_quantized", False):
        _check_stock(type(model).__name__, structural_differences(trial.dense, describe(model)))
    cut = cut_config(model.config, kept, trial=trial).config
    if not any(MTP.search(name) for name, _ in model.named_modules()):
        without_mtp(cut)
    stock = build_cut(type(model), cut)
    compared = trial.compare_model(stock)
    refuse(type(model), model.config, compared.differences, trial.dense, len(layers))
    assert isinstance(stock, PreTrainedModel)  # else it was refused
    edits = _Edits()
    try:
        _follow(model, stock, compared, edits)
        _follow_names(model, stock, edits)
        _slice(model, compared, num_layers, kept, edits)
        _replace_entries(model, text_part(cut), edits)
        _replace_layers(found, kept, edits)
    except BaseException:
        edits.undo()
        raise
    return edits.undo


def _check_stock(name: str, differences: Sequence[str]) -> None:
    if differences:
        raise SurgeryError(
            f"this {name} is not what stock transformers builds from its config, so a cut of it "
            f"could not be loaded: {'; '.join(differences[:3])}"
        )


class _Edits:
    """The changes made to a model, which can be undone in reverse order."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def set(self, entries: dict[str, Any], key: str, value: Any) -> None:
        """Replace an existing entry and remember its old value."""
        old = entries[key]
        entries[key] = value
        self.add(lambda: entries.__setitem__(key, old))

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()


def _follow(
    model: PreTrainedModel, stock: PreTrainedModel, compared: StructureComparison, edits: _Edits
) -> None:
    """Copy indices and counts of layers from the model that the stock class builds."""
    for own, other, key in compared.follows:
        values = vars(stock.get_submodule(other))
        # The rotary frequencies of a layer kind that no longer occurs stay: nothing reads them.
        if key in values:
            edits.set(vars(model.get_submodule(own)), key, values[key])


def _follow_names(model: PreTrainedModel, stock: PreTrainedModel, edits: _Edits) -> None:
    """Copy the names of tied parameters, which contain layer indices, from the stock model."""
    others = dict(stock.named_modules())
    for name, module in model.named_modules():
        other = vars(others[name]) if name in others else {}
        for key in _PARAMETER_NAMES & set(other) & set(vars(module)):
            edits.set(vars(module), key, other[key])


def _slice(
    model: PreTrainedModel,
    compared: StructureComparison,
    num_layers: int,
    kept: Sequence[int],
    edits: _Edits,
) -> None:
    """Slice parameters that hold the entries of one layer after the other."""
    for name, key, dimension in compared.packed:
        module = model.get_submodule(name)
        entries: dict[str, Any] = (
            module._parameters if key in module._parameters else module._buffers
        )
        old = entries[key]
        size = old.shape[dimension] // num_layers
        rows = [row for layer in kept for row in range(layer * size, (layer + 1) * size)]
        new = old.detach().index_select(dimension, torch.tensor(rows, device=old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        edits.set(entries, key, new)


def _replace_entries(model: PreTrainedModel, cut: PreTrainedConfig, edits: _Edits) -> None:
    """Write the cut entries into the model's config and every copy that a module holds."""
    text = text_config(model)
    changed = {
        name: (value, vars(cut)[name])
        for name, value in vars(text).items()
        if name in vars(cut)
        and (not name.startswith("_") or name == "_heterogeneity_spec")
        and not isinstance(value, PreTrainedConfig)
        and value != vars(cut)[name]
    }
    held = [value for module in model.modules() for value in vars(module).values()]
    configs = {id(c): c for c in (text, *held) if isinstance(c, type(text))}
    for config in configs.values():
        for name, (old, new) in changed.items():
            if name in vars(config) and vars(config)[name] == old:
                edits.set(vars(config), name, new)


def _replace_layers(found: DecoderLayers, kept: Sequence[int], edits: _Edits) -> None:
    old = list(found.modules)

    def replace(layers: list[nn.Module]) -> None:
        found.modules._modules.clear()
        found.modules.extend(layers)

    edits.add(lambda: replace(old))
    replace([old[layer] for layer in kept])
