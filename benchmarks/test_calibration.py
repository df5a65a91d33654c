"""The calibration pass on a real model and real text, ours and as peers do it, interleaved.

Eight windows of 512 tokens. The bare forward runs the decoder body alone: no logits, no cache.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import Any

import pytest
import ratios
import timing
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.models.loading import load_model
from simdiff.models.structure import find_decoder_layers
from simdiff.scoring.calibration_pass import feed_forward
from simdiff_kernels import RunningScores


@torch.no_grad()
def bare(model: PreTrainedModel, ids: Tensor) -> None:
    model.base_model(input_ids=ids, use_cache=False)


def scored(model: PreTrainedModel, ids: Tensor) -> RunningScores:
    layers = find_decoder_layers(model)
    scores = RunningScores(len(layers))
    feed_forward(model, layers.modules, scores, [{"input_ids": ids}])
    return scores


@torch.no_grad()
def hidden_states_and_cosine(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """All states kept, cosine in their dtype (ShortGPT); logits and cache computed too."""
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    return [1 - functional.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]


@torch.no_grad()
def float32_lists(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """All states of the decoder moved to float32 lists, then scored (PruneMe)."""
    states = model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False)
    kept = [state.float().cpu() for state in states.hidden_states]
    found = []
    for before, after in pairwise(kept):
        cosine = functional.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
        found.append(torch.arccos(cosine).mean() / torch.pi)
    return found


PASSES = {
    "bare": bare,
    "ours": scored,
    "hidden states and cosine": hidden_states_and_cosine,
    "float32 lists": float32_lists,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_calibration_pass(benchmark: Any, dtype: str, device: str, quick: bool) -> None:
    model, tokenizer = load_model("demo", dtype=dtype)
    model.to(device)
    size, length = (2, 32) if quick else (8, 512)
    windows = token_windows("demo", tokenizer, num_windows=size, window_length=length)
    (ids,) = windows.batches(size)
    ids = ids.to(device)
    summary = scored(model, ids).finish()
    theirs = hidden_states_and_cosine(model, ids)
    # All layers but the last, whose state peers take after the final norm.
    for layer, value in enumerate(theirs[:-1]):
        got, limit = (
            summary["cosine_distance"].mean[layer].item(),
            2e-3 if dtype == "float32" else 0.2,
        )
        if not abs(got - value.item()) <= limit * got + (dtype == "bfloat16") * 4e-3:
            pytest.fail(f"not timed: layer {layer}: cosine distance {got}, peers {value.item()}")
    runs = {name: (lambda run=run: run(model, ids)) for name, run in PASSES.items()}
    times = timing.interleaved(runs, device, 1 if quick else 6)
    median = {name: statistics.median(values) for name, values in times.items()}
    benchmark.group = f"calibration pass, {dtype}"
    ratio_to_bare, intervals = ratios.of_rounds(
        {name: values for name, values in times.items() if name != "bare"}, times["bare"]
    )
    benchmark.extra_info.update(
        model="demo",
        dtype=dtype,
        tokens=f"{size} x {length}",
        seconds=median,
        ratio_to_bare=ratio_to_bare,
        interval={"ratio_to_bare": intervals},
    )
    timed = timing.finished(lambda: scored(model, ids), device)
    benchmark.pedantic(timed, rounds=1 if quick else 3)
