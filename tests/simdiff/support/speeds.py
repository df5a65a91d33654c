"""A prompt, a short protocol and the ideal of the tiny LLaMA, for tests of speed."""

from __future__ import annotations

import torch

from simdiff.speed.protocol import Protocol

PROMPT = torch.randint(0, 97, (3, 9), generator=torch.Generator().manual_seed(2))
QUICK = Protocol((1, 2), (5,), new_tokens=4, repeats=3, warm_up=1)


def ideal_by_hand(kept: int, prompt: int, steps: int) -> dict[str, float]:
    """Of the tiny LLaMA with 6 layers and with `kept`, batch 1, counted on paper.

    A layer has 2 32 x 32 + 2 32 x 16 + 3 32 x 48 = 7680 entries of matrices and 64 of norms; keys
    and values of a token are 2 2 8 = 32. A step reads the layer, the cache with the new token, and
    writes the latter; beside the layers it reads the head (97 x 32), the last norm and a row of the
    embedding, and writes 97 logits.
    """
    context = [prompt + step for step in range(1, steps + 1)]
    pairs = prompt * (prompt + 1) // 2

    def entries(layers: int) -> int:
        cached = sum(32 * (tokens + 1) for tokens in context)
        return layers * (steps * (7680 + 64) + cached) + steps * (97 * 32 + 32 + 32 + 97)

    def flops(layers: int) -> int:
        return layers * (prompt * 2 * 7680 + pairs * 4 * 32) + 2 * 97 * 32

    return {"prefill": flops(6) / flops(kept), "decode": entries(6) / entries(kept)}
