"""What `save_pretrained` would write: names of tensors and their order, told without weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

Group = tuple[str, ...]


def natural_order(names: Iterable[str]) -> list[str]:
    """Names as transformers sorts them: layer 10 after layer 9."""
    return sorted(names, key=dot_natural_key)


def use_conversions(model: PreTrainedModel, stored: Collection[str]) -> None:
    """Let a model on the meta device remember how stored tensors become its own, as loading does.

    `from_pretrained` keeps the conversions that matched a stored tensor (renamed modules, experts
    fused into one tensor), and `save_pretrained` reverts these; so does `saved_groups`.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    for name in stored:
        rename_source_key(name, renamings, converters, model.base_model_prefix, own)
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]


def saved_groups(model: PreTrainedModel) -> dict[Group, list[tuple[int, ...]]]:
    """The tensors that saving a model writes, in its order, and their shapes.

    Tensors of a group are views of one storage (the experts of a layer, once fused): saving counts
    them as one when it cuts shards.

    Args:
        model: on the meta device, after `use_conversions`.
    """
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for pattern in model._keys_to_ignore_on_save or ():
        state.pop(pattern, None)
    state = remove_tied_weights_from_state_dict(state, model)
    state = revert_weight_conversion(model, state)
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    return {tuple(names): [tuple(state[name].shape) for name in names] for names in groups.values()}


def in_saving_order(groups: Iterable[Group], names: Collection[str]) -> list[Group]:
    """Order and group stored names as saving would.

    Tensors that the stock model does not have (packed ones of a quantised format, heads that only
    other engines load) have no place in `groups`; then all names are in natural order.
    """
    known = [group for group in groups if all(name in names for name in group)]
    if sum(map(len, known)) == len(names):
        return known
    return [(name,) for name in natural_order(names)]
