"""Streamed layers of quantised checkpoints: what their packages make of a module, and its undoing.

A package changes modules as their weights are loaded: other parameters, attributes, kinds of
tensors. So a layer is put back into one of two states that were noted while nothing was loaded: as
it was built, which its loader expects, and as it is between its turns, on the meta device.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from simdiff.errors import SimdiffError
from simdiff.models.structure import find_decoder_layers

_HOLDERS = ("_parameters", "_buffers")
METHODS = ("bitsandbytes", "compressed-tensors")
"""Quantisations whose modules take their weights one by one."""


def method_of(quantiser: Any) -> str:
    """The name of a quantisation, as in config.json."""
    method = quantiser.quantization_config.quant_method
    return str(getattr(method, "value", method))


def check_streams(quantiser: Any, what: str) -> None:
    """Refuse a quantised model whose layers cannot be loaded one at a time.

    Raises:
        SimdiffError: names the quantisation, and says what to do.
    """
    method = method_of(quantiser)
    if method not in METHODS or not quantiser.pre_quantized:
        raise SimdiffError(
            f"{what}: is quantised as {method!r}, and weights in floating point or of "
            f"{' or '.join(METHODS)} are streamed: score the unquantised model, and prune this "
            "one's files with that plan (simdiff prune MODEL --plan plan.json)"
        )


class _AsStored(ConversionOps):
    """Stands for what a package makes of stored tensors: the parameter is the stored one."""

    def convert(
        self, input_dict: dict[str, Any], *, target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        value = input_dict[target_patterns[0]]
        return {target_patterns[0]: value[0] if isinstance(value, list) else value}


def without_values(quantiser: Any, config: Any) -> Any:
    """How the stock loader is shown tensors without values, of which nothing can be unpacked.

    Args:
        quantiser: of the model.
        config: how the stock loader loads them.
    """
    own = {
        type(operation)
        for converter in quantiser.get_weight_conversions()
        for operation in converter.operations
    }
    mapping = copy.deepcopy(config.weight_mapping or [])
    for entry in mapping:
        if isinstance(entry, WeightConverter) and own & set(map(type, entry.operations)):
            entry.operations = [_AsStored()]
    return dataclasses.replace(config, weight_mapping=mapping)


class Layouts:
    """The modules of each stage as they are built, which is what the loader of weights expects, and
    as they are between their turns, on the meta device.

    Args:
        model: as it was built; nothing is loaded.
        quantiser: of the model.
    """

    def __init__(self, model: PreTrainedModel, quantiser: Any) -> None:
        """Note how the modules are before the loader is shown any tensor."""
        self._quantiser, self._model = quantiser, model
        head = model.get_output_embeddings()
        self._modules = [*find_decoder_layers(model).modules, *([head] if head else [])]
        self._built = [Layout(module) for module in self._modules]
        self._resting: list[Layout] = []

    def shown(self) -> None:
        """Note how they are now that the loader has been shown all tensors."""
        if method_of(self._quantiser) == "compressed-tensors":
            self._quantiser.compressor.remove_decompression_hook(self._model)
            for module in self._modules:
                _as_if_unpacked(module, self._model.dtype)
        self._resting = [Layout(module) for module in self._modules]

    def before(self, stage: int) -> None:
        """Make ready for the weights of a stage."""
        self._built[stage].restore()

    def after(self, stage: int) -> None:
        """Make the weights that were loaded such that the modules can run."""
        if method_of(self._quantiser) == "compressed-tensors":
            base = importlib.import_module("compressed_tensors.compressors.base")
            for module in self._modules[stage].modules():
                base.decompress_module(module, self._quantiser.compressor.force_compression_format)

    def rest(self, stage: int) -> None:
        """Let the weights of a stage go."""
        self._resting[stage].restore()


def _as_if_unpacked(module: nn.Module, dtype: torch.dtype) -> None:
    """Give linear modules on the meta device the weight that is unpacked when they are loaded."""
    for part in module.modules():
        if isinstance(part, nn.Linear) and getattr(part, "quantization_scheme", None) is not None:
            part._parameters.pop("weight_packed", None)
            weight = torch.empty(part.out_features, part.in_features, dtype=dtype, device="meta")
            part.weight = nn.Parameter(weight, requires_grad=False)


class Layout:
    """What a module and those within it hold, apart from their hooks and their forward."""

    def __init__(self, module: nn.Module) -> None:
        """Note how they are now."""
        self._content = [
            (part, {key: _copied(value) for key, value in vars(part).items() if _counts(key)})
            for part in module.modules()
        ]

    def restore(self) -> None:
        """Make them as they were."""
        for part, content in self._content:
            for key in [key for key in vars(part) if _counts(key) and key not in content]:
                delattr(part, key)
            vars(part).update({key: _copied(value) for key, value in content.items()})


def _counts(key: str) -> bool:
    return key in _HOLDERS or not (key.startswith("_") or key in ("forward", "training"))


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else value
