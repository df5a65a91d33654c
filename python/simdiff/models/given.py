"""A model given as an object: taken out of what wraps it, or refused with what to do."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from simdiff.errors import SimdiffError
from simdiff.models.classes import check_class

_MERGE = "merge it first (model = model.merge_and_unload())"


def given_model(model: Any, function: str) -> PreTrainedModel:
    """The model of transformers that is meant by an object.

    A compiled model and one in DataParallel or DistributedDataParallel stand for the model within.

    Args:
        model: what the user gave.
        function: for messages.

    Raises:
        SimdiffError: it is no causal or vision-language model of transformers, has an adapter, or
            lies in parts on several processes.
    """
    while isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            model = model.module
        else:
            break
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise SimdiffError(
            f"{function}: model must be a model of transformers, a directory, a hub name or "
            f'"demo", got {kind}{_within(model)}'
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise SimdiffError(f"{function}: model must be without adapters, got {kind}: {_MERGE}")
        if name and hasattr(module, "_orig_mod"):
            raise SimdiffError(
                f"{function}: {name} of the model was replaced by its compiled form: give the "
                "model as it was before torch.compile"
            )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise SimdiffError(
            f"{function}: the model's parameters must lie whole in this process, got parts "
            '(DTensor): load it with device_map="auto", or give its directory with device="auto"'
        )
    check_class(model, function)
    if function != "prune" and _without_weights(model):
        raise SimdiffError(
            f"{function}: the model's parameters must have values, got some on the meta device: "
            "load it with from_pretrained"
        )
    return model


def _without_weights(model: PreTrainedModel) -> bool:
    """Whether parameters have no values, nor are fetched from elsewhere by accelerate's hooks."""
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return not hooked and any(parameter.is_meta for parameter in model.parameters())


def _within(model: Any) -> str:
    """What to give instead of an object that is no model of transformers."""
    module = type(model).__module__
    if module.startswith("peft."):
        return f": {_MERGE}"
    if "FullyShardedDataParallel" in type(model).__name__:
        return ": save it whole (save_pretrained), and give the directory"
    for name in ("pretrained_model", "model", "module"):
        if isinstance(getattr(model, name, None), PreTrainedModel):
            return f": give its .{name}"
    return ""
