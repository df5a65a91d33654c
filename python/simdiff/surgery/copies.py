"""Hold a pruned and a dense model in memory with one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.surgery.layers import remove_layers


def sharing_copy(model: PreTrainedModel, removed: Collection[int]) -> PreTrainedModel:
    """Make a second model without some layers whose parameters are the same tensors.

    The dense model stays unchanged unless somebody writes into a shared parameter; see
    `replace_parameter` and `own_parameters`.

    Raises:
        SurgeryError: stock classes cannot express the cut.
        SimdiffError: `removed` are not layers of the model, are none, or are all.
    """
    tensors = (*model.parameters(), *model.buffers())
    twin: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return remove_layers(twin, removed)


def own_parameters(model: nn.Module) -> None:
    """Copy every parameter of a model, so that it may be written to; tied ones stay tied."""
    owned: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in owned:
                owned[id(parameter)] = nn.Parameter(
                    parameter.detach().clone(), parameter.requires_grad
                )
            module._parameters[name] = owned[id(parameter)]


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter, which other models may share, by a new one of the same dtype."""
    old = module._parameters[name]
    assert old is not None, name
    module._parameters[name] = nn.Parameter(
        value.detach().to(dtype=old.dtype, device=old.device), old.requires_grad
    )
