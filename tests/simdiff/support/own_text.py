"""Text drawn from a tiny model itself, which it predicts better than any other model does."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def decided(model: PreTrainedModel, factor: float = 4) -> PreTrainedModel:
    """The model with larger weights: its layers matter, and next tokens are not equally likely."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_tokens" not in name:
            parameter.data *= factor
    return model


@torch.no_grad()
def drawn(model: PreTrainedModel, num_windows: int, length: int, seed: int = 3) -> Tensor:
    """Token ids `(num_windows, length)`, each drawn from what the model predicts after the last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (num_windows, 1), generator=generator)
    for _ in range(length - 1):
        likely = model(input_ids=ids, use_cache=False).logits[:, -1].double().softmax(-1)
        ids = torch.cat([ids, likely.multinomial(1, generator=generator)], dim=1)
    return ids
