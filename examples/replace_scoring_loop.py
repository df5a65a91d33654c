"""The scoring loops of other pruning code, and the same numbers from one pass of ours.

    python examples/replace_scoring_loop.py

ShortGPT's block influence, the angular distances of Gromov et al. at the last token, and the cosine
of LLM-Streamline's blocks are written below as such code is usually written: all hidden states are
kept, and each criterion walks over them. `simdiff.score` gives all of them from one pass that keeps
none. Both are timed and compared.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

import simdiff
from simdiff.data.text import token_windows
from simdiff.models.loading import load_model
from simdiff.models.structure import find_decoder_layers
from simdiff.planning.criteria import importance


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """The state before every layer and after the last one, in float64.

    `output_hidden_states=True` would give the last one after the final norm, which no layer wrote.
    """
    states: list[Tensor] = []
    layers = find_decoder_layers(model).modules

    def before(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).double())

    def after(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        states.append(output.double())

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(after))
    try:
        model.model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def block_influence(states: list[Tensor]) -> Tensor:
    """ShortGPT, arXiv 2403.03853, Eq. 1: one minus the mean cosine of what enters and leaves."""
    return torch.stack(
        [
            1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
            for before, after in itertools.pairwise(states)
        ]
    )


def angular_distances(states: list[Tensor], num_layers: int) -> Tensor:
    """Gromov et al., arXiv 2403.17887, Eq. 7: blocks of n layers, at the last token, over pi."""
    ends = zip(states, states[num_layers:], strict=False)
    cosines = [
        torch.nn.functional.cosine_similarity(before[:, -1], after[:, -1], dim=-1)
        for before, after in ends
    ]
    return torch.stack([(cosine.clamp(-1, 1).arccos() / torch.pi).mean() for cosine in cosines])


def block_cosines(states: list[Tensor], num_layers: int) -> Tensor:
    """LLM-Streamline, arXiv 2403.19135, Eq. 2: the mean cosine across blocks of n layers."""
    return torch.stack(
        [
            torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()
            for before, after in zip(states, states[num_layers:], strict=False)
        ]
    )


def exact(values: Sequence[float]) -> Tensor:
    """As a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the largest difference of each criterion between the loops and ours."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--model", default="demo", help="a directory, a hub name, or demo")
    arguments.add_argument("--text", default="demo", help="a text file, .jsonl, or demo")
    arguments.add_argument("--block", type=int, default=4, help="layers in a block")
    arguments.add_argument("--windows", type=int, default=4, help="of calibration text")
    arguments.add_argument("--window-length", type=int, default=256, help="in tokens")
    given = arguments.parse_args(argv)
    model, tokenizer = load_model(given.model)
    tokens = token_windows(
        given.text, tokenizer, num_windows=given.windows, window_length=given.window_length
    ).tokens

    start = time.perf_counter()
    states = hidden_states(model, tokens)
    forward = time.perf_counter() - start
    theirs = {
        "block influence": block_influence(states),
        "angular distance": angular_distances(states, given.block),
        "cosine of blocks": block_cosines(states, given.block),
    }
    loops = time.perf_counter() - start - forward
    kept = sum(state.numel() * model.dtype.itemsize for state in states)

    start = time.perf_counter()
    scores = simdiff.score(model, tokens, batch_size=len(tokens), progress=False)
    ours_in_all = time.perf_counter() - start
    firsts = range(scores.num_layers - given.block + 1)
    angles, cosines = scores.last_token_angles, scores.blocks.metrics["cosine_distance"]
    ours = {
        "block influence": exact(importance(scores, "block-influence").values),
        "angular distance": exact([angles[i][i + given.block] for i in firsts]),
        "cosine of blocks": 1 - exact([cosines[i][i + given.block] for i in firsts]),
    }

    print(f"loops: forward {forward:.2f} s, scoring {loops:.2f} s, states kept {kept / 1e6:.0f} MB")
    print(f"ours:  forward and scoring {ours_in_all:.2f} s, every block of every length")
    differences = {}
    for name, values in theirs.items():
        differences[name] = float((values - ours[name]).abs().max())
        same = bool((values.argsort() == ours[name].argsort()).all())
        print(f"{name}: largest difference {differences[name]:.1e}, same order: {same}")
    return differences


if __name__ == "__main__":
    main()
