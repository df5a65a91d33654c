"""Room on the disk for what a job writes at its end, known before the model runs."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from simdiff.checkpoints.shards import check_space
from simdiff.models.structure import find_decoder_layers


def check_room(output: Path, model: PreTrainedModel, num_remove: int) -> None:
    """Refuse an output directory on a disk that has no space for the smaller model.

    Args:
        output: the directory that will be written; its parent exists.
        model: the dense model as it is in memory, which has the dtype of what is written.
        num_remove: how many layers go; where they differ in size, the largest are taken to go.

    Raises:
        SimdiffError: tells the bytes needed and free.
    """
    layers = sorted(map(_num_bytes, find_decoder_layers(model).modules), reverse=True)
    check_space(output.absolute().parent, _num_bytes(model) - sum(layers[:num_remove]))


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
