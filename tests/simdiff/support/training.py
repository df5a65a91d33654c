"""A short training of the tiny model, and weights to compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.recovery.training.data import Examples
from simdiff.recovery.training.loop import FineTuning, fine_tune
from simdiff.recovery.training.lora import LoraOptions
from simdiff.recovery.training.options import PRESETS, FineTuningOptions
from simdiff.surgery.copies import sharing_copy

SMALL = replace(
    PRESETS["distillation"],
    lora=LoraOptions(rank=4, alpha=8.0, dropout=0.1),
    length=24,
    micro_batch_size=3,
    steps=12,
    learning_rate=1e-2,
    warmup_steps=2,
    evaluations=4,
    patience=0,
    compute_dtype="float32",
)


def trained(
    dense: PreTrainedModel,
    text: tuple[Examples, Examples],
    options: FineTuningOptions = SMALL,
    directory: Path | None = None,
) -> tuple[PreTrainedModel, FineTuning]:
    pruned = sharing_copy(dense, (2, 3))
    return pruned, fine_tune(
        pruned, *text, options, teacher=dense, directory=directory, progress=False
    )


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
