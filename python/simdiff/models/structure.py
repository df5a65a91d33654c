"""Find the decoder layers in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    PreTrainedModel,
)

from simdiff.errors import SimdiffError
from simdiff.models.config import layer_counts, text_part


@dataclass(frozen=True)
class DecoderLayers:
    """The decoder layers of a model, with the module and the path that hold their list."""

    path: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.modules)


def text_config(model: PreTrainedModel) -> Any:
    """The part of a model's config that describes the decoder; the object itself, not a copy.

    Raises:
        SimdiffError: what is given is no model, such as the name of one.
    """
    if not isinstance(model, nn.Module):
        raise SimdiffError(
            f"a model must be an object of transformers, got {type(model).__name__}: load it first"
        )
    return text_part(model.config)


def find_decoder_layers(model: PreTrainedModel) -> DecoderLayers:
    """Find the list of decoder layers by its length.

    It is the outermost `nn.ModuleList` whose length is the config's number of layers. If a vision
    or audio tower has a list of that length too, it is the one in the module with the text config.

    Raises:
        SimdiffError: the config has no number of layers, there is no such list, or more than one.
    """
    text = text_config(model)
    counts = layer_counts(text)
    lists = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    candidates = [path for path, module in lists.items() if len(module) in counts.values()]
    # A list inside a layer (of experts, say) may happen to have the same length.
    outermost = [
        path
        for path in candidates
        if not any(path.startswith(other + ".") for other in lists if other != path)
    ]
    if len(outermost) > 1:
        outermost = [path for path in outermost if _owner_config(model, path) is text]
    if len(outermost) != 1:
        found = ", ".join(f"{path} ({len(module)})" for path, module in lists.items()) or "none"
        wanted = " or ".join(f"{count} decoder layers ({name})" for name, count in counts.items())
        raise SimdiffError(
            f"{type(model).__name__} must have one list of {wanted} like its config; "
            f"lists found: {found}"
        )
    return DecoderLayers(outermost[0], lists[outermost[0]])


def _owner_config(model: PreTrainedModel, path: str) -> Any:
    """The config of the innermost module on a path that has a config."""
    names = path.split(".")
    for length in range(len(names) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(names[:length])), "config", None)
        if config is not None:
            return config
    return None


def decoder_body(model: PreTrainedModel) -> nn.Module:
    """The model without its language-model head, so that no logits are computed."""
    path = find_decoder_layers(model).path
    body = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    inside = any(module is model.get_submodule(path) for module in body.modules())
    return body if inside else model.base_model
