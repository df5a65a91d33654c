"""What closed-form recovery is tried on."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from support.own_text import decided

KEPT = [0, 2, 3, 5]


def tokens(num_windows: int, length: int = 12, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (num_windows, length), generator=generator)


def larger(model: PreTrainedModel) -> PreTrainedModel:
    """Layers that do something, in float64."""
    return decided(model).double()
