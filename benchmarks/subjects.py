"""What is timed against what: our scorers, the same in PyTorch, and what peers compute.

Every subject takes the hidden states of one batch before and after a layer and folds them into
numbers for the layer. `check` compares them with float64 before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from simdiff_kernels import METRICS, RunningScores, reference

# Our three metrics, for what computes fewer or more.
MEANS = ("cosine_distance", "squared_difference", "absolute_difference")


@dataclass(frozen=True)
class Subject:
    """`run` folds one batch; `means` reads what it returned as float64, by metric."""

    name: str
    run: Callable[[Tensor, Tensor], object]
    means: Callable[[object, int], dict[str, float]]
    tolerance: float  # relative, of a mean over tokens


def eager(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """The same three metrics in float32, as one would write them: sums over tokens, a maximum."""
    x, y = before.float(), after.float()
    d = y - x
    squared = d.square().sum(-1)
    cosine = 1 - functional.cosine_similarity(x, y, dim=-1)
    return cosine.sum(), squared.sum(), d.abs().mean(-1).sum(), squared.max()


def float32_cosine(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """Cosine alone, in float32 (Model-Optimizer's hook)."""
    return (1 - functional.cosine_similarity(before.float(), after.float(), dim=-1).mean(),)


def block_influence(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """Cosine alone, in the states' dtype, norms and products written out (ShortGPT)."""
    norms = before.norm(dim=-1) * after.norm(dim=-1)
    return ((1 - (before * after).sum(-1) / norms).sum() / norms.numel(),)


def _of_sums(result: object, num_tokens: int) -> dict[str, float]:
    assert isinstance(result, tuple)
    sums = [value.double().item() / num_tokens for value in result[:3]]
    return dict(zip(MEANS, sums, strict=True))


def _of_cosine(result: object, num_tokens: int) -> dict[str, float]:
    assert isinstance(result, tuple)
    return {"cosine_distance": result[0].double().item()}


def ours(backend: str) -> Subject:
    """One update of running scores; the state is kept between calls, as in a calibration pass."""
    scores = RunningScores(1, backend=backend)

    def run(before: Tensor, after: Tensor) -> RunningScores:
        scores.update(0, before, after)
        return scores

    def means(result: object, num_tokens: int) -> dict[str, float]:
        summary = scores.finish()
        return {name: summary[name].mean.item() for name in MEANS}

    return Subject(backend, run, means, 1e-6)


def in_pytorch(device: str) -> list[Subject]:
    """Eager, compiled, and the peers' formulas."""
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
    compiled = torch.compile(eager, mode=mode, dynamic=False)
    return [
        Subject("eager", eager, _of_sums, 1e-3),
        Subject("torch.compile", compiled, _of_sums, 1e-3),
        Subject("float32 cosine", float32_cosine, _of_cosine, 1e-3),
        # In bfloat16 the means of 1 - cos are off by a multiple of 2^-9: that is what it computes.
        Subject("block influence", block_influence, _of_cosine, 1.0),
    ]


def states(
    num_tokens: int, hidden_size: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A pair at a cosine distance of about 0.05, made on the device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (1, num_tokens, hidden_size)
    before = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    after = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    return before, after.mul_(0.32).add_(before)


def check(subject: Subject, before: Tensor, after: Tensor) -> str | None:
    """Why the subject's result is wrong, or None. Large batches are checked on their first part."""
    before, after = before[:, :4096], after[:, :4096]
    num_tokens = before.shape[1]
    got = subject.means(subject.run(before, after), num_tokens)
    values = reference.token_metrics(before.double(), after.double()).flatten(1).mean(1)
    for name, value in got.items():
        wanted = values[METRICS.index(name)].item()
        if not abs(value - wanted) <= subject.tolerance * abs(wanted):
            return f"{subject.name}: {name} must be {wanted:.9g}, got {value:.9g}"
    return None
