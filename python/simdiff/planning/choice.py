"""Tell how sure a choice by perplexity is, by making it again on draws of the text it read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from simdiff.planning.names import NUM_RESAMPLES

Plan = tuple[int, ...]

# Length of the runs of tokens that are drawn, since losses of neighbours are not independent.
RUN_OF_TOKENS = 32
# Least number of runs in a window; the runs of a short window are shorter.
_FEWEST_RUNS = 8


def standard_error(gain: Tensor) -> float:
    """Standard error of the mean of `gain` over tokens."""
    return float(gain.std()) / math.sqrt(gain.numel())


def choice_agreement(
    losses: Mapping[Plan, Sequence[Tensor]],
    candidates: Collection[Plan],
    chosen: Plan,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> float:
    """The share of draws of the text in which the rules of the search choose the same plan.

    In each window, runs of `RUN_OF_TOKENS` tokens are drawn with replacement, the same runs for all
    plans. On their mean losses the rules of `simdiff.planning.exchange` choose again among the
    plans that were tried, in their order: the candidate of lowest loss; each exchange that gains
    more than a standard error; if some plans have read a second window, the plan of lowest loss
    over both. Plans that another choice would have led to were never read, so the share tells only
    how much the choice among the tried plans depends on the text.

    Args:
        losses: for each plan with a finite loss, in the order of trial, the losses of all tokens of
            each window.
        candidates: the plans that the search began with.
        chosen: the plan that the search chose.
        num_resamples: number of draws.
        seed: seed of the draws.

    Source: Kuensch, "The jackknife and the bootstrap for general stationary observations" (1989),
    for drawing runs; Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), Chapter 6.
    """
    plans = list(losses)
    generator = torch.Generator().manual_seed(seed)
    first = _drawn([losses[plan][0] for plan in plans], num_resamples, generator)
    finalists = [index for index, plan in enumerate(plans) if len(losses[plan]) > 1]
    both = first[:, finalists]
    if finalists:
        second = [losses[plans[index]][1] for index in finalists]
        both = both + _drawn(second, num_resamples, generator)
    errors = {
        (a, b): standard_error(losses[plans[b]][0] - losses[plans[a]][0])
        for a in range(len(plans))
        for b in range(len(plans))
    }
    started = [index for index, plan in enumerate(plans) if plan in candidates]
    moves = [index for index in range(len(plans)) if index not in started]
    same = 0
    for mean, mean_of_both in zip(first.tolist(), both.tolist(), strict=True):
        best = min(started or moves, key=mean.__getitem__)
        for move in moves:
            if mean[best] - mean[move] > errors[move, best]:
                best = move
        if best in finalists:
            best = finalists[mean_of_both.index(min(mean_of_both))]
        same += plans[best] == chosen
    return same / num_resamples


def kept_choice(
    gains: Sequence[Mapping[int, Tensor]],
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> float | None:
    """The share of draws of the text in which no other plan is better than the chosen one.

    Of each window as many runs are drawn, with replacement, as it has, the same runs for all plans;
    plans are compared on the windows that both have read, by the mean over what was drawn.

    Args:
        gains: for each other plan, by window, what it adds to the loss of the chosen one, a mean
            for each run of tokens; the runs of a window are the same for all plans.
        num_resamples: number of draws.
        seed: seed of the draws.

    Returns:
        The share; None where there was no other plan.
    """
    if not gains:
        return None
    generator = torch.Generator().manual_seed(seed)
    sizes = {w: runs.numel() for found in gains for w, runs in found.items()}
    drawn = {
        w: torch.randint(sizes[w], (num_resamples, sizes[w]), generator=generator)
        for w in sorted(sizes)
    }
    kept = torch.ones(num_resamples, dtype=torch.bool)
    for found in gains:
        total = sum(runs[drawn[w]].sum(1) for w, runs in found.items())
        kept &= torch.as_tensor(total) >= 0
    return float(kept.double().mean())


def _drawn(losses: Sequence[Tensor], num_resamples: int, generator: torch.Generator) -> Tensor:
    """Mean losses of one window for each draw, `(draws, plans)`; a last partial run is left out."""
    tokens = torch.stack(list(losses)).double()
    length = max(1, min(RUN_OF_TOKENS, tokens.shape[1] // _FEWEST_RUNS))
    count = tokens.shape[1] // length
    runs = tokens[:, : count * length].unflatten(1, (count, length)).mean(2)
    drawn = torch.randint(count, (num_resamples, count), generator=generator)
    return runs.T[drawn].mean(1)
