"""All blocks of a model from one batch of its hidden states, on real text.

Eight windows of 512 tokens: with 30 layers of hidden size 576, 465 pairs and 1.1e9 pairs of
entries. Ours, the same in eager PyTorch and the bare decoder forward (no logits, no cache) in
float32 and bfloat16 run interleaved.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import ratios
import timing
import torch
from overhead import peak_resident_bytes
from test_calibration import bare
from torch import Tensor
from transformers import PreTrainedModel

from simdiff.data.text import token_windows
from simdiff.models.loading import load_model
from simdiff.models.structure import find_decoder_layers
from simdiff_kernels import BLOCK_METRICS, RunningBlockScores

DTYPES = ("float32", "bfloat16")
MEANS = tuple(name for name in BLOCK_METRICS if name != "absolute_difference")


def hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What enters each layer, and what leaves the last one, before any final norm."""
    states: list[Tensor] = []

    def keep(module: object, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        states.append(inputs[0] if inputs else keywords["hidden_states"])

    def keep_last(module: object, inputs: object, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    layers = find_decoder_layers(model).modules
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(keep_last))
    bare(model, ids)
    for hook in hooks:
        hook.remove()
    return states


def eager(states: Tensor) -> list[tuple[Tensor, ...]]:
    """All pairs in float32 as one would write them: with h_i, all later states at once.

    `states` is `(L + 1, tokens, hidden_size)`. Norms are reduced without a copy of what they are
    of; the mean over tokens of `MEANS`, then the maximum.
    """
    found = []
    norms = torch.linalg.vector_norm(states, dim=-1)
    for i in range(len(states) - 1):
        x, later = states[i], states[i + 1 :]
        d = later - x
        length = torch.linalg.vector_norm(d, dim=-1)
        squared = length.square()
        similarity = (later * x).sum(-1) / (norms[i] * norms[i + 1 :])
        angle = similarity.clamp(-1, 1).arccos() / torch.pi
        tokens = (1 - similarity, squared, length / norms[i], angle)
        means = [metric.mean(-1) for metric in tokens]
        found.append((*means, squared.amax(-1)))
    return found


def batched_matmul(states: Tensor) -> tuple[Tensor, ...]:
    """The same from one product for each token: all inner products of its states, in float32.

    The fastest form that PyTorch has. ||y - x||^2 = ||x||^2 + ||y||^2 - 2 x.y cancels where states
    are near each other or one entry is massive, and it has no other way to the differences.
    """
    tokens = states.transpose(0, 1)
    products = tokens @ tokens.mT
    squared_norms = products.diagonal(dim1=1, dim2=2)
    norms = squared_norms.sqrt()
    squared = squared_norms[:, :, None] + squared_norms[:, None, :] - 2 * products
    squared = squared.clamp_min(0)
    similarity = products / (norms[:, :, None] * norms[:, None, :])
    angle = similarity.clamp(-1, 1).arccos() / torch.pi
    relative = squared.sqrt() / norms[:, :, None]
    means = [metric.mean(0) for metric in (1 - similarity, squared, relative, angle)]
    return (*means, squared.amax(0))


def worst_error_of_matmul(states: Tensor) -> dict[str, float]:
    """Of each matrix of `batched_matmul` on these states, relative, against ours."""
    scores = RunningBlockScores(len(states) - 1)
    scores.update(list(states.unsqueeze(1)))
    summary = scores.finish()
    names = [name for name in BLOCK_METRICS if name != "absolute_difference"]
    above = torch.ones(len(states), len(states), dtype=torch.bool).triu(1)
    found = {}
    for name, matrix in zip(
        (*names, "squared_difference_maximum"), batched_matmul(states), strict=True
    ):
        wanted = getattr(summary, name)[above]
        found[name] = float(((matrix.double().cpu()[above] - wanted) / wanted).abs().max())
    return found


def problem(states: Sequence[Tensor], backend: str | None) -> str | None:
    """Why our matrices are wrong on the first tokens, compared with the specification, or None.

    On the CPU a cosine distance is a sixteenth or more of sums that are off by some 1e-7.
    """
    first = [state[:, :12] for state in states]
    ours, wanted = (RunningBlockScores(len(first) - 1, backend=b) for b in (backend, "reference"))
    for scores in (ours, wanted):
        scores.update(first)
    got, exact = ours.finish(), wanted.finish()
    for name in (*MEANS, "squared_difference_maximum"):
        error = (getattr(got, name) / getattr(exact, name) - 1).nan_to_num(0).abs().max().item()
        if not error <= 4e-6:
            return f"{name}: relative error {error:.2e}"
    return None


def problem_of_eager(states: Tensor) -> str | None:
    """Why the eager matrices are not what ours are, or None; cosine in float32 is coarse."""
    scores = RunningBlockScores(len(states) - 1)
    scores.update(list(states.unsqueeze(1)))
    summary = scores.finish()
    for i, values in enumerate(eager(states)):
        for name, value in zip((*MEANS, "squared_difference_maximum"), values, strict=True):
            wanted = getattr(summary, name)[i, i + 1 :]
            # arccos of a rounded cosine is off by up to 1e-4 near 1.
            atol = 1e-4 if name == "angular_distance" else 1e-5
            if not torch.allclose(value.double().cpu(), wanted, rtol=1e-3, atol=atol):
                return f"{name} with h_{i}: got {value}, wanted {wanted}"
    return None


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_blocks(benchmark: Any, dtype: str, device: str, quick: bool) -> None:
    models = {}
    for name in DTYPES:
        models[name], tokenizer = load_model("demo", dtype=name)
        models[name].to(device)
    size, length = (2, 32) if quick else (8, 512)
    windows = token_windows("demo", tokenizer, num_windows=size, window_length=length)
    (ids,) = windows.batches(size)
    ids = ids.to(device)
    states = hidden_states(models[dtype], ids)
    stacked = torch.stack(states).float().flatten(1, 2)
    if wrong := problem(states, None) or problem_of_eager(stacked):
        pytest.fail(f"not timed: {wrong}")
    scores = RunningBlockScores(len(states) - 1)
    memory = None
    if device == "cpu":
        idle = peak_resident_bytes(lambda: None)
        memory = peak_resident_bytes(lambda: scores.update(states)) - idle
    compiled = torch.compile(batched_matmul, dynamic=False)
    compiled(stacked)  # not timed
    runs: dict[str, Any] = {
        "ours": lambda: scores.update(states),
        "eager": lambda: eager(stacked),
        "batched matmul": lambda: batched_matmul(stacked),
        "compiled matmul": lambda: compiled(stacked),
        **{f"{n} forward": lambda model=model: bare(model, ids) for n, model in models.items()},
    }
    times = timing.interleaved(runs, device, 1 if quick else 6)
    median = {name: statistics.median(values) for name, values in times.items()}
    forwards = {name: times[f"{name} forward"] for name in DTYPES}
    others = {name: times[name] for name in ("eager", "batched matmul", "compiled matmul")}
    shares = {name: ratios.of_rounds({name: times["ours"]}, of) for name, of in forwards.items()}
    times_faster, intervals = ratios.of_rounds(others, times["ours"])
    num_pairs = len(states) * (len(states) - 1) // 2
    benchmark.group = f"all blocks, {dtype}"
    benchmark.extra_info.update(
        model="demo",
        dtype=dtype,
        tokens=f"{size} x {length}",
        pairs=num_pairs,
        hidden_size=states[0].shape[-1],
        bytes=sum(state.nbytes for state in states),
        seconds=median,
        memory=memory,
        element_pairs_per_second=num_pairs * states[0].numel() / median["ours"],
        share_of_forward={name: share[name] for name, (share, _) in shares.items()},
        times_faster=times_faster,
        interval={
            "share_of_forward": {name: ends[name] for name, (_, ends) in shares.items()},
            "times_faster": intervals,
        },
        error_of_matmul=worst_error_of_matmul(stacked),
    )
    timed = timing.finished(lambda: scores.update(states), device)
    benchmark.pedantic(timed, rounds=1 if quick else 15, warmup_rounds=1)
