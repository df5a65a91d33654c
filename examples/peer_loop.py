"""The loop of other pruning code, and ten lines of ours in its place.

    python examples/peer_loop.py --num-layers 4

`theirs` is how published code for block influence goes about it: every batch with
`output_hidden_states=True`, cosines of all neighbouring states, the layers of the lowest means out
of the `ModuleList`. `ours` plans on the same windows with the same criterion, and cuts with caches,
config and all. Both must remove the same layers; ours says besides how sure the choice is.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import simdiff
from simdiff.data.text import token_windows
from simdiff.models.loading import load_model


@torch.inference_mode()
def theirs(model: PreTrainedModel, batches: list[Tensor], count: int) -> list[int]:
    """The layers of lowest block influence, as scripts find them."""
    norm, model.model.norm = model.model.norm, nn.Identity()  # else the last state is normed
    influence = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for tokens in batches:
        states = model.model(tokens, use_cache=False, output_hidden_states=True).hidden_states
        for layer in range(len(influence)):
            before, after = states[layer].double(), states[layer + 1].double()
            influence[layer] += (1 - torch.cosine_similarity(before, after, dim=-1)).sum()
    model.model.norm = norm
    return sorted(influence.argsort()[:count].tolist())


def ours(model: PreTrainedModel, tokens: Tensor, count: int) -> tuple[list[int], list[str]]:
    """The same layers, and what is to be known of the choice; the model has lost them."""
    scores = simdiff.score(model, tokens)
    plan = simdiff.plan(scores, num_layers=count, criterion="block-influence")
    simdiff.prune(model, plan)
    return sorted(plan.removed), list(plan.notes)


def main(argv: list[str] | None = None) -> tuple[list[int], list[int]]:
    """Returns the layers that each way removes."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="demo", help="a directory, a hub name, or demo")
    arguments.add_argument("--text", default="demo", help="a text file, .jsonl, or demo")
    arguments.add_argument("--num-layers", type=int, default=4, help="how many go")
    arguments.add_argument("--windows", type=int, default=8, help="of calibration text")
    arguments.add_argument("--window-length", type=int, default=256, help="in tokens")
    given = arguments.parse_args(argv)

    model, tokenizer = load_model(given.model)
    windows = token_windows(
        given.text, tokenizer, num_windows=given.windows, window_length=given.window_length
    )
    found = theirs(model, windows.batches(4), given.num_layers)
    mine, notes = ours(model, windows.tokens, given.num_layers)
    print(f"theirs: {found}\nours:   {mine}", *notes, sep="\n")
    return found, mine


if __name__ == "__main__":
    main()
