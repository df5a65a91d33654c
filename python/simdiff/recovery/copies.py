"""A pruned model beside the dense one, both in memory, with one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.surgery import removed_layers


def pruned_copy(model: PreTrainedModel, layers: Collection[int]) -> PreTrainedModel:
    """The model without some layers as a model of its own, whose parameters are the same objects.

    Only what is not a parameter is copied. The dense model stays as it is, as long as nobody
    writes into a shared parameter: see `replace_parameter` and `own_parameters`.

    Raises:
        SurgeryError: stock classes cannot express the cut.
        SimdiffError: not layers of the model, none, or all.
    """
    with removed_layers(model, layers):
        shared = {id(parameter): parameter for parameter in model.parameters()}
        return copy.deepcopy(model, dict(shared))


def own_parameters(model: nn.Module) -> None:
    """Copy every parameter, so that it can be written into; tied ones stay tied."""
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
    """Put a new parameter of the same dtype in the place of one that others may share."""
    old = module._parameters[name]
    assert old is not None, name
    module._parameters[name] = nn.Parameter(
        value.detach().to(dtype=old.dtype, device=old.device), old.requires_grad
    )
