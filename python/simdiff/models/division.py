"""Which decoder layer each stored tensor of a checkpoint is of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from simdiff.errors import SimdiffError
from simdiff.io.safetensors_header import StoredTensor, read_header
from simdiff.models.quantised import check_streams
from simdiff.models.structure import find_decoder_layers
from simdiff.models.tensor_reader import DTYPES


@dataclasses.dataclass(frozen=True)
class Division:
    """Which part of a model the stored tensors are of."""

    stages: dict[int, list[StoredTensor]]
    resident: list[StoredTensor]
    """What stays in memory."""
    casts: dict[str, torch.dtype]
    """The dtype that the model has each tensor in."""
    names: dict[str, str]
    """Of tensors in layers that the loader takes as they are: name in the files, in the model."""


def divided(
    model: PreTrainedModel,
    stored: Iterable[StoredTensor],
    config: Any,
    own: Mapping[str, torch.dtype],
) -> Division:
    """Divide the tensors of a checkpoint.

    Args:
        model: on the meta device.
        stored: all tensors of its files.
        config: how the stock loader loads them.
        own: the dtypes of all tensors of the model by their names.
    """
    mapping = config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, dict.fromkeys(own)
    layers = find_decoder_layers(model)
    head = _own_head(model)
    found = Division({}, [], {}, {})
    for tensor in stored:
        name, converted = rename_source_key(tensor.name, renamings, converters, prefix, state)
        if name not in own and tensor.name in own:  # as the stock loader does
            name, converted = rename_source_key(tensor.name, [], [], prefix, state)
        if name not in own:
            continue  # nobody's: the report names it
        found.casts[tensor.name] = own[name]
        if name.startswith(layers.path + "."):
            index = int(name[len(layers.path) + 1 :].split(".")[0])
            found.stages.setdefault(index, []).append(tensor)
            if converted is None:
                found.names[tensor.name] = name
        elif name in head:
            found.stages.setdefault(len(layers), []).append(tensor)
        else:
            found.resident.append(tensor)
    for group in found.stages.values():  # read in the order of their bytes
        group.sort(key=lambda tensor: (str(tensor.path), tensor.start))
    return found


def _own_head(model: PreTrainedModel) -> set[str]:
    """Names of the tensors of a language-model head that shares none with anything else."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        return set()
    names = {f"{path}.{name}" for name in head.state_dict()}
    tied = model.all_tied_weights_keys
    return set() if names & ({*tied} | {*tied.values()}) else names


def stored_tensors(files: Sequence[str] | None, config: Any, what: str) -> list[StoredTensor]:
    """All tensors of the files, if they can be streamed."""
    if config.hf_quantizer is not None:
        check_streams(config.hf_quantizer, what)
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise SimdiffError(f"{what}: weights must be safetensors files to be streamed")
    stored = [tensor for file in files for tensor in read_header(Path(file))[1]]
    for tensor in stored:
        if tensor.dtype not in DTYPES:
            raise SimdiffError(f"{what}: {tensor.name} is {tensor.dtype}, which torch has not")
    return stored


def check_apart(model: PreTrainedModel, what: str) -> None:
    """Refuse layers that share weights."""
    owners: dict[int, int] = {}
    for index, layer in enumerate(find_decoder_layers(model).modules):
        for name, parameter in layer.named_parameters():
            if owners.setdefault(id(parameter), index) != index:
                raise SimdiffError(
                    f"{what}: layers {owners[id(parameter)]} and {index} share {name}, so that no "
                    "layer can be loaded alone: load the model whole"
                )
