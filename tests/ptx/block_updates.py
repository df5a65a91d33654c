"""Hidden states for one update of all blocks, and what its result must be."""

from __future__ import annotations

import torch
from torch import Tensor

from simdiff_kernels import BLOCK_METRICS
from simdiff_kernels.testing import walk

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # NumPy has no bfloat16: bits are passed


def some_states(
    num_states: int, tokens: tuple[int, int], hidden_size: int, dtype: torch.dtype, gap: int
) -> list[Tensor]:
    """A walk with a massive activation that comes and goes; each state has strides of its own."""
    generator = torch.Generator().manual_seed(hidden_size)
    found = []
    for k, h in enumerate(walk(num_states - 1, (*tokens, hidden_size), 0.2)(generator)):
        if 0 < k < num_states - 1:
            h[..., hidden_size // 3] *= 30
        space = torch.zeros(tokens[0], tokens[1] + k % 3, hidden_size + gap * (k + 1), dtype=dtype)
        space[:, : tokens[1], :hidden_size] = h
        found.append(space[:, : tokens[1], :hidden_size])
    return found


def check_state(
    found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype, short: float
) -> None:
    """Moments and tallies; `short` is the relative error that sums in float32 have."""
    assert torch.equal(found[1], wanted[1])
    limit = 1e-12 if dtype == torch.float64 else 2 * short
    rest = torch.ones_like(wanted[0], dtype=torch.bool)
    for name in ("cosine_distance", "angular_distance"):  # magnified by up to 16
        index = BLOCK_METRICS.index(name)
        rest[..., [index, len(BLOCK_METRICS) + index], :, :] = False
    assert torch.allclose(found[0][rest], wanted[0][rest], rtol=limit, atol=0)
    assert torch.allclose(found[0][~rest], wanted[0][~rest], rtol=16 * limit, atol=0)
