"""Batches of token ids, and the keyword arguments that a model's forward takes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from simdiff.errors import SimdiffError

Batch: TypeAlias = Tensor | Mapping[str, Tensor]
"""Token ids `(batch, sequence)`, or a mapping with `input_ids` and perhaps `attention_mask`."""


def model_inputs(batches: Sequence[Batch], caller: str) -> list[dict[str, Tensor]]:
    """Batches as the model takes them: where there is padding, with a mask and positions after it.

    Args:
        batches: token ids, and for padding `attention_mask` `(batch, sequence)`, 0 where it is.
        caller: for messages, such as "score".

    Raises:
        SimdiffError: a batch is not token ids `(batch, sequence)`, or its mask has another shape.
    """
    result = []
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise SimdiffError(
                f"{caller}: input_ids must be integers (batch, sequence), got {ids.dtype} of "
                f"shape {tuple(ids.shape)}"
            )
        inputs = {"input_ids": ids}
        if mask is not None and mask.shape != ids.shape:
            raise SimdiffError(
                f"{caller}: attention_mask must have shape {tuple(ids.shape)} like input_ids, got "
                f"{tuple(mask.shape)}"
            )
        if mask is not None and not bool(mask.all()):
            inputs["attention_mask"] = mask.long()
            if not bool(mask[:, 0].all()):  # padded on the left: positions start at the text
                inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
        result.append(inputs)
    return result


def token_mask(batch: Mapping[str, Tensor]) -> Tensor:
    """The tokens of a batch that are not padding, `(batch, sequence)`, bool."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
