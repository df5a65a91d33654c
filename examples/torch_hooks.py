"""Layers of any PyTorch model scored by hooks of your own: torch and `simdiff_kernels` alone.

    python examples/torch_hooks.py

`score_layers` is all there is to it. It takes any modules that are called one after the other with
hidden states first; here they are the blocks of a plain `torch.nn.TransformerEncoder`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from simdiff_kernels import RunningScores, RunningSummary


def score_layers(layers: Sequence[nn.Module], run: Callable[[], object]) -> RunningSummary:
    """What each layer does to the hidden states while `run` runs the model."""
    scores = RunningScores(num_layers=len(layers))
    handles = [
        layer.register_forward_hook(
            lambda module, args, output, index=index: scores.update(index, args[0], output)
        )
        for index, layer in enumerate(layers)
    ]
    try:
        with torch.inference_mode():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return scores.finish()


def main() -> Tensor:
    """Returns the cosine distance of every layer."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, nhead=4, dim_feedforward=128, batch_first=True)
    model = nn.TransformerEncoder(block, num_layers=6, enable_nested_tensor=False).train()
    summary = score_layers(model.layers, lambda: model(torch.randn(8, 32, 64)))
    for layer, cosine in enumerate(summary["cosine_distance"].mean.tolist()):
        print(f"layer {layer}: mean(1 - cos) {cosine:.4f}")
    return summary["cosine_distance"].mean


if __name__ == "__main__":
    main()
