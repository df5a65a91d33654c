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

import simdiff_kernels
from simdiff_kernels import METRICS, RunningScores, reference

# Our three metrics, for what computes fewer or more.
MEANS = ("cosine_distance", "squared_difference", "absolute_difference")
_PIECE = 1 << 22  # entries of a tensor widened to float64 at once


@dataclass(frozen=True)
class Subject:
    """`run` folds one batch; `means` reads what it returned as float64, by metric."""

    name: str
    run: Callable[[Tensor, Tensor], object]
    means: Callable[[object, int], dict[str, float]]
    tolerance: float  # relative, of a mean over tokens
    roundings: int = 0  # of a cosine near 1 in the states' dtype, half an eps each


def eager(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """The same three metrics in float32, as one would write them: sums over tokens, a maximum."""
    x, y = before.float(), after.float()
    d = y - x
    squared = d.square().sum(-1)
    cosine = 1 - functional.cosine_similarity(x, y, dim=-1)
    return cosine.sum(), squared.sum(), d.abs().mean(-1).sum(), squared.max()


def five_sums(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    """The same as it can be written best for a compiler: all sums in one pass."""
    x, y = before.float(), after.float()
    d = y - x
    xx, xy, yy = (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1)
    squared, absolute = (d * d).sum(-1), d.abs().sum(-1)
    cosine = 1 - xy / (xx.sqrt() * yy.sqrt())
    return cosine.sum(), squared.sum(), absolute.sum() / x.shape[-1], squared.max()


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


def row_sums(backend: str) -> Subject:
    """The four sums of every token, which is all that must be read; one tensor takes them all."""
    hidden_size, kept = 1, dict[torch.Size, Tensor]()

    def run(before: Tensor, after: Tensor) -> Tensor:
        nonlocal hidden_size
        hidden_size = before.shape[-1]
        out = kept.get(before.shape)
        kept[before.shape] = simdiff_kernels.row_sums(before, after, out=out, backend=backend)
        return kept[before.shape]

    def means(result: object, num_tokens: int) -> dict[str, float]:
        assert isinstance(result, Tensor)
        x_squared, y_squared, squared, absolute = result.double().reshape(-1, 4).unbind(1)
        a, b = x_squared.sqrt(), y_squared.sqrt()
        gap = (y_squared - x_squared) / (a + b)
        values = ((squared - gap.square()) / (2 * a * b), squared, absolute / hidden_size)
        found = {name: value.mean().item() for name, value in zip(MEANS, values, strict=True)}
        return found | {"norm_before": a.mean().item(), "norm_after": b.mean().item()}

    return Subject(f"row_sums, {backend}", run, means, 1e-6)


def compiled(run: Callable[[Tensor, Tensor], object], device: str) -> Callable[..., object]:
    """By torch.compile for one shape, on a GPU as thoroughly as it can without graphs."""
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
    return torch.compile(run, mode=mode, dynamic=False)


def one_pass(device: str, compile_too: bool = True) -> list[Subject]:
    """The best form that can be written, compiled and eager, and what one would write first."""
    forms = {", one pass": five_sums, "": eager}
    compiling = [
        Subject(f"torch.compile{form}", compiled(run, device), _of_sums, 1e-3)
        for form, run in forms.items()
    ]
    return [
        *(compiling if compile_too else ()),
        *(Subject(f"eager{form}", run, _of_sums, 1e-3) for form, run in forms.items()),
    ]


def in_pytorch(device: str, compile_too: bool = True) -> list[Subject]:
    """What PyTorch makes of the same, and the peers' formulas."""
    return [
        *one_pass(device, compile_too),
        Subject("float32 cosine", float32_cosine, _of_cosine, 1e-3),
        # Rounded are products, two norms and their product, sum, quotient, and, twice, the mean.
        Subject("block influence", block_influence, _of_cosine, 1e-3, roundings=7),
    ]


def states(
    num_tokens: int, hidden_size: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A pair at a cosine distance of about 0.05, made on the device, one after the other there."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (2, 1, num_tokens, hidden_size)
    before, after = torch.randn(shape, generator=generator, device=device, dtype=dtype).unbind(0)
    return before, after.mul_(0.32).add_(before)


def exact_means(before: Tensor, after: Tensor) -> dict[str, float]:
    """Means over all tokens of every metric, from float64, some tokens at a time.

    On two cores 2 to 4 s for a pair of 256 MB, once for all subjects that are checked with it.
    """
    tokens = max(1, _PIECE // before.shape[-1])
    pieces = zip(before.split(tokens, 1), after.split(tokens, 1), strict=True)
    sums = [reference.token_metrics(x.double(), y.double()).flatten(1).sum(1) for x, y in pieces]
    values = torch.stack(sums).sum(0) / before.shape[1]
    return dict(zip(METRICS, values.tolist(), strict=True))


def check(
    subject: Subject, before: Tensor, after: Tensor, exact: dict[str, float] | None = None
) -> str | None:
    """Why the subject's result over all of these tokens is wrong, or None.

    `exact` is what `exact_means` says of them, computed if it is left out.
    """
    wanted = exact_means(before, after) if exact is None else exact
    rounding = subject.roundings * torch.finfo(before.dtype).eps / 2
    for name, value in subject.means(subject.run(before, after), before.shape[1]).items():
        allowed = subject.tolerance * abs(wanted[name]) + rounding
        if not abs(value - wanted[name]) <= allowed:
            return f"{subject.name}: {name} must be {wanted[name]:.9g}, got {value:.9g}"
    return None
