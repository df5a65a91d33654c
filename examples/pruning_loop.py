"""The scorers inside a pruning loop of your own: score, remove one layer, score again.

    python examples/pruning_loop.py --num-layers 4

Layers compound: after one has gone, its neighbours do other work. This loop scores anew after every
removal. Its own hooks feed `simdiff_kernels.RunningScores`; nothing else of this package takes part
in the scoring, and no hidden state outlives its layer.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.evaluation.window_perplexity import perplexity
from simdiff.models.loading import load_model
from simdiff.surgery.layers import remove_layers
from simdiff_kernels import RunningScores, RunningSummary


@torch.inference_mode()
def score_layers(model: PreTrainedModel, batches: list[Tensor]) -> RunningSummary:
    """What every decoder layer does to the hidden states of the batches."""
    layers: nn.ModuleList = model.model.layers
    scores = RunningScores(num_layers=len(layers))

    def hook(layer: int):
        def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            scores.update(layer, args[0] if args else kwargs["hidden_states"], output)

        return after

    handles = [
        layer.register_forward_hook(hook(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        for tokens in batches:
            model.model(tokens, use_cache=False)  # no logits
    finally:
        for handle in handles:
            handle.remove()
    return scores.finish()


def least_important(summary: RunningSummary) -> int:
    """Similarity and difference: mean (1 - cos) + mean ||d|| / ||x||, free of the states' scale."""
    importance = summary["cosine_distance"].mean + summary["relative_difference"].mean
    return int(importance.argmin())


def main(argv: list[str] | None = None) -> list[int]:
    """Returns the removed layers, by their numbers in the dense model."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="demo", help="a directory, a hub name, or demo")
    arguments.add_argument("--text", default="demo", help="a text file, .jsonl, or demo")
    arguments.add_argument("--num-layers", type=int, default=4, help="how many go")
    arguments.add_argument("--windows", type=int, default=4, help="of calibration text")
    arguments.add_argument("--window-length", type=int, default=256, help="in tokens")
    given = arguments.parse_args(argv)

    model, tokenizer = load_model(given.model)
    amount = {"num_windows": given.windows, "window_length": given.window_length}
    calibration = token_windows(given.text, tokenizer, part="calibration", **amount)
    held_out = token_windows(given.text, tokenizer, part="held-out", **amount)

    print(f"dense: perplexity {perplexity(model, held_out.tokens).perplexity:.2f}")
    remaining = list(range(len(model.model.layers)))
    removed = []
    for _ in range(given.num_layers):
        index = least_important(score_layers(model, calibration.batches(4)))
        remove_layers(model, [index])
        removed.append(remaining.pop(index))
        quality = perplexity(model, held_out.tokens)
        print(f"without layers {sorted(removed)}: perplexity {quality.perplexity:.2f}")
    return removed


if __name__ == "__main__":
    main()
