"""The precision of forwards that only guide a correction."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import PreTrainedModel


def precision(model: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """Context manager with the precision of forwards that only guide the correction."""
    if not autocasts(model):
        return contextlib.nullcontext()
    device = model.get_input_embeddings().weight.device
    return torch.autocast(device.type, dtype=torch.bfloat16)


def autocasts(model: PreTrainedModel) -> bool:
    """Whether forwards multiply in bfloat16: for float32 models on devices that support it."""
    device = model.get_input_embeddings().weight.device
    if model.dtype != torch.float32:
        return False
    return device.type == "cuda" or bool(torch.cpu._is_avx512_bf16_supported())
