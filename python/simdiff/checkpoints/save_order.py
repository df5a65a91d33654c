"""The names and the order in which `save_pretrained` would write tensors, without any weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

Group = tuple[str, ...]


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names as transformers does: layer 10 comes after layer 9."""
    return sorted(names, key=dot_natural_key)


def record_conversions(model: PreTrainedModel, stored: Collection[str]) -> None:
    """Record on the meta model which weight conversions `from_pretrained` would apply.

    `from_pretrained` stores the conversions that matched a stored name (renamed modules, experts
    fused into one tensor), and `save_pretrained` reverts them. With the record `saved_groups` can
    revert them too.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    own = model.state_dict()
    for name in natural_order(stored):
        rename_source_key(name, renamings, converters, model.base_model_prefix, own)
    model._weight_conversions = [entry for entry in conversions if entry.was_used()]


def plain_conversions(model: PreTrainedModel) -> list[WeightTransform] | None:
    """The conversions that saving a model has to revert, without those of a quantiser.

    Where the kernels of a packed format cannot run, loading unpacks the weights. The conversions
    that it records would pack them again, or give plain tensors the names of packed ones, in a
    checkpoint whose config says nothing of it.
    """
    recorded: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    unpacks = [entry for entry in recorded or () if _of_quantiser(entry)]
    if getattr(model, "hf_quantizer", None) is not None or not unpacks or recorded is None:
        return recorded
    return [
        entry
        for entry in get_model_conversion_mapping(model)
        if any(
            entry._original_target_patterns == used._original_target_patterns
            and set(entry._original_source_patterns) <= set(used._original_source_patterns)
            for used in recorded
        )
    ]


def _of_quantiser(entry: WeightTransform) -> bool:
    operations = getattr(entry, "operations", None) or ()
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)


def saved_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors that `save_pretrained` writes, in its order.

    Args:
        model: a model on the meta device, after `record_conversions`.
    """
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for pattern in model._keys_to_ignore_on_save or ():
        state.pop(pattern, None)
    state = remove_tied_weights_from_state_dict(state, model)
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return reverted


def saved_groups(model: PreTrainedModel) -> dict[Group, list[tuple[int, ...]]]:
    """The names and shapes of `saved_tensors`, in groups.

    The tensors of a group are views of one storage (the fused experts of a layer), which saving
    treats as one when it divides shards.
    """
    state = saved_tensors(model)
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    return {tuple(names): [tuple(state[name].shape) for name in names] for names in groups.values()}


def in_saving_order(groups: Iterable[Group], names: Collection[str]) -> list[Group]:
    """Order and group stored names as `save_pretrained` would.

    If some tensor is not in `groups`, because the stock model does not have it (packed tensors of a
    quantised format, heads that only other engines load), all names are sorted in natural order.
    """
    known = [group for group in groups if all(name in names for name in group)]
    if sum(map(len, known)) == len(names):
        return known
    return [(name,) for name in natural_order(names)]
