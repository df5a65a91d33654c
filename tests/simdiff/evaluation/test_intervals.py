"""Intervals of mean losses and of ratios, worked out by hand."""

from __future__ import annotations

import math

import pytest

from simdiff.errors import SimdiffError
from simdiff.evaluation.intervals import (
    mean_loss,
    paired_mean_loss,
    perplexity_interval,
    student_quantile,
)


def test_runs_weigh_by_their_tokens() -> None:
    """Losses 2, 6 and 1 over 1, 3 and 4 tokens: mean 9/8, residuals 7/8, 21/8 and -28/8.

    Their squares sum to 1274/64 = 19.90625; times 3 / 2, the root is 5.46437, by 8 tokens 0.683046.
    With two degrees of freedom t is 4.30265.
    """
    found = mean_loss([(2.0, 1), (6.0, 3), (1.0, 4)])
    assert (found.nll, found.standard_error) == pytest.approx((9 / 8, 0.683046), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(9 / 8))
    limits = [math.log(limit) for limit in (found.low, found.high)]
    assert limits == pytest.approx([9 / 8 - 2.938909, 9 / 8 + 2.938909], rel=1e-5)
    alone = mean_loss([(6.0, 3)])
    assert (alone.nll, alone.standard_error, alone.low, alone.high) == (2.0, None, None, None)
    many = 2**24  # tokens of a run; one more nat than tokens is none in float32
    assert mean_loss([(many + 1.0, many)] * 2).nll == pytest.approx(1 + 1 / many, rel=1e-12)


def test_what_a_text_is_hard_for_both_models_cancels() -> None:
    dense = [(3.0, 1), (80.0, 16), (5.0, 4)]
    pruned = [(loss + count / 2, count) for loss, count in dense]
    ratio = paired_mean_loss(pruned, dense)
    found = (ratio.perplexity, ratio.low, ratio.high)
    assert found == pytest.approx((1.64872127,) * 3, rel=1e-8)
    assert mean_loss(pruned).standard_error > 0.1
    with pytest.raises(SimdiffError, match=r"same runs of tokens, got \[1, 16, 4\] and \[1, 16\]"):
        paired_mean_loss(pruned, dense[:-1])
    with pytest.raises(SimdiffError, match=r"got \[\] and \[\]"):
        paired_mean_loss([], [])


def test_intervals() -> None:
    # Losses 2, 3, 4, 5: mean 3.5, standard error sqrt(5/3 / 4) = 0.64550, t of 3 degrees 3.18245;
    # gaps 0.4, 0.6, 0.4, 0.6: mean 0.5, standard error sqrt(0.04/3 / 4) = 0.057735.
    pruned, dense = [2.0, 3, 4, 5], [1.6, 2.4, 3.6, 4.4]
    found = perplexity_interval(pruned, dense)
    assert [math.log(v) for v in (found.perplexity, found.low, found.high)] == pytest.approx(
        [3.5, 3.5 - 2.05426, 3.5 + 2.05426], abs=1e-4
    )
    assert [math.log(v) for v in (found.ratio, found.ratio_low, found.ratio_high)] == pytest.approx(
        [0.5, 0.5 - 0.183739, 0.5 + 0.183739], abs=1e-5
    )
    # Table of Student's distribution, two-sided 95% and 99%.
    for degrees, wanted in (
        (1, 12.7062),
        (2, 4.30265),
        (3, 3.18245),
        (15, 2.13145),
        (120, 1.97993),
    ):
        assert student_quantile(degrees) == pytest.approx(wanted, abs=1e-4)
    assert student_quantile(15, 0.99) == pytest.approx(2.94671, abs=1e-5)
    alone = perplexity_interval([2.0], [1.0])
    assert (alone.perplexity, alone.ratio) == pytest.approx((math.e**2, math.e))
    assert (alone.low, alone.ratio_high) == (None, None)
    with pytest.raises(SimdiffError, match=r"got \[1\] and \[1, 1, 1, 1\]"):
        perplexity_interval([1.0], dense)
