"""How sure a choice by perplexity is, held to probabilities worked out by hand."""

from __future__ import annotations

import pytest
import torch

from simdiff.planning.blocks import BlockCosts
from simdiff.planning.choice import RUN_OF_TOKENS, choice_agreement, kept_choice, standard_error
from simdiff.planning.confidence import PlanConfidence
from simdiff.planning.exchange import exchange_search
from simdiff.planning.shortlist import Candidate

A, B, C = (0, 1), (2, 3), (1, 2)
DRAWS = 20_000


def runs(*means: float) -> torch.Tensor:
    """A window of so many runs of equal losses, and a few tokens that fill none."""
    return torch.cat([torch.tensor(means).repeat_interleave(RUN_OF_TOKENS), torch.full((5,), 99.0)])


def test_standard_error() -> None:
    """1, 2, 3, 4: variance 5/3, so the mean's is 5/12."""
    assert standard_error(torch.tensor([1.0, 2, 3, 4])) == pytest.approx((5 / 12) ** 0.5)


def test_two_candidates() -> None:
    """A is ahead by 3 in one run of eight and behind by 0.2 in seven: ahead wherever that one is
    drawn, of eight draws at least once, 1 - (7/8)^8 = 0.656.
    """
    losses = {A: [runs(0, *[2.2] * 7)], B: [runs(3, *[2.0] * 7)]}
    wanted = 1 - (7 / 8) ** 8
    error = 3 * (wanted * (1 - wanted) / DRAWS) ** 0.5
    for chosen, share in ((A, wanted), (B, 1 - wanted), (C, 0)):
        found = choice_agreement(losses, {A, B}, chosen, num_resamples=DRAWS)
        assert found == pytest.approx(share, abs=error)
    again = [choice_agreement(losses, {A, B}, A, seed=seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_an_exchange_must_gain_its_standard_error() -> None:
    """B gains 1 everywhere in the mean of two runs, 0 or 2: taken where the draw gains more.

    Eight runs gain 0 four times and 2 four times, standard error over 261 tokens 1/16.1. Drawn,
    the gain is 2 k / 8 with k of 8 at 1/2 each: above 0.062 unless k = 0, 1 - 1/256.
    """
    losses = {A: [runs(*[2.0] * 8)], B: [runs(2, 0, 2, 0, 2, 0, 2, 0)]}
    share = choice_agreement(losses, {A}, B, num_resamples=DRAWS)
    assert share == pytest.approx(255 / 256, abs=0.0015)
    # A gain of 1/4 at a standard error of more than that, 4 everywhere in 261 tokens at random.
    noise = torch.randn(261, generator=torch.Generator().manual_seed(0)) * 8
    noise -= noise[:256].mean()
    losses = {A: [torch.zeros(261)], B: [noise - 0.25]}
    assert standard_error(noise) > 0.25
    assert choice_agreement(losses, {A}, A) > 0.5


def test_finalists_are_held_to_both_windows() -> None:
    """By the first window B is ahead by 1, by the second A by 3; C has read one window alone."""
    losses = {
        A: [runs(*[2.0] * 8), runs(*[1.0] * 8)],
        B: [runs(*[1.0] * 8), runs(*[4.0] * 8)],
        C: [runs(*[3.0] * 8)],
    }
    assert choice_agreement(losses, {A, B}, A) == 1
    losses[C] = [runs(*[0.0] * 8)]
    assert choice_agreement(losses, {A, B}, A) == 0
    assert choice_agreement(losses, {A, B}, C) == 1


def test_the_search_tells_it() -> None:
    """Of two candidates that differ by noise either may win, of two far apart one."""
    costs = BlockCosts("", "", ((1.0,) * 5,) * 5)
    noise = torch.randn(320, generator=torch.Generator().manual_seed(1))
    for gap, sure in ((0.0, False), (3.0, True)):
        losses = {A: torch.zeros(320), B: noise - noise.mean() + gap}

        def of(plan: tuple[int, ...], window: int, of: dict = losses) -> torch.Tensor:
            return of[plan]

        _, _, agreement = exchange_search(
            of, [Candidate(A, "a"), Candidate(B, "b")], costs, max_reads=0, num_windows=1
        )
        assert (agreement == 1) is sure
        assert agreement > 0


def test_the_note_says_of_which_plan() -> None:
    known = PlanConfidence((1, 2), (0, 1, 1, 0), 0.93, (0,) * 4, (0,) * 4, 500, 0, 16, 16, 0)
    assert "93% give their plan, 1, 2; " in known.note([2, 1])
    assert "93% give their plan, 1, 2, which is NOT this one; " in known.note([0, 1])


def test_a_choice_that_no_other_of_the_last_race_beats() -> None:
    """B would add 3 in one run of eight and take 0.2 from seven: worse where that is drawn."""
    gains = torch.tensor([3.0] + [-0.2] * 7)
    wanted = 1 - (7 / 8) ** 8
    error = 3 * (wanted * (1 - wanted) / DRAWS) ** 0.5
    assert kept_choice([{0: gains}], num_resamples=DRAWS) == pytest.approx(wanted, abs=error)
    # A third plan that is always worse changes nothing, one that is better everywhere all.
    worse, better = torch.ones(8), -torch.ones(8)
    alone = kept_choice([{0: gains}])
    assert kept_choice([{0: gains}, {0: worse}]) == alone
    assert kept_choice([{0: gains}, {0: better}]) == 0
    # Over two windows: 3 in a window outweighs what B takes in both.
    assert kept_choice([{0: gains, 1: 3 * worse}]) == 1
    assert kept_choice([{0: gains, 1: 3 * worse}, {1: better}]) == 0
    assert kept_choice([]) is None
