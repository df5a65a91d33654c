"""What counts as accurate: the error bounds of every metric, from error analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks import RunningBlockScores
from ..metrics import BLOCK_METRICS, METRICS, TokenMetrics, angular_distance
from ..running import RunningScores
from ..trust import MOST_MAGNIFIED
from .exact import exact_block_metrics, exact_metrics

# What sums in float32 may be off by, relative. Up to 52 additions follow each other before a sum is
# widened, each rounded by at most half a unit in the last place, 2^-24 of the sum. Spread evenly
# over that, an error has a standard deviation of 2^-24 / sqrt(3); of 52 independent ones the sum
# has sqrt(52 / 3) 2^-24 at most, because the partial sums are below the last. Three of those.
SHORT_SUMS = 3 * math.sqrt(52 / 3) * 2.0**-24


def check_metrics(
    result: TokenMetrics, before: Tensor, after: Tensor, *, short_sums: bool = False
) -> None:
    """Compare with `exact_metrics`, each metric within its error bound.

    Backends sum exact products in float64, so that a sum of n positive terms is off by at most
    n * 2^-53, and round once to the result's dtype (eps / 2). The cosine distance subtracts
    (b - a)^2 from ||d||^2, which magnifies the error of the sums by ||d||^2 / (2 a b v); b - a
    comes from b^2 - a^2, so that it is off by the error of a and b, and its square by 2 |b - a|
    times as much.

    With `short_sums` (the cpu backend below float64; for all blocks every one but the reference)
    some additions are made in float32, and `SHORT_SUMS` is allowed for them. The cosine distance is
    then computed from sums of which (b - a)^2 is at most 15/16 of ||d||^2, or from exact ones.

    Raises:
        AssertionError: which metric of which token, by how much.
    """
    exact = exact_metrics(before, after)
    for name, got, wanted in zip(METRICS, result, exact, strict=True):
        limit = _limit(exact, before, got.dtype, short_sums)
        if name == "cosine_distance":
            limit = _cosine_limit(exact, wanted, before, got.dtype, short_sums)
        largest = torch.finfo(got.dtype).max
        over = wanted > largest
        if bool((over & ~got.isinf()).any()):
            raise AssertionError(f"{name}: a value beyond {largest:.3g} must be inf, got {got}")
        smallest = torch.finfo(got.dtype).tiny  # below it the result's dtype loses digits itself
        # 1 - cos of parallel vectors is 0: what is left is the rounding of the sums.
        floor = smallest + (4 * _summation(before) if name == "cosine_distance" else 0) * (
            wanted < 1e-13
        )
        error = (got.double() - wanted).abs()
        failed = (error > limit * wanted.abs() + floor) & ~over
        if bool(failed.any()):
            index = tuple(failed.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}[{index}]: got {got[index].item()!r}, exact {wanted[index].item()!r}, "
                f"relative error {float(error[index] / wanted[index].abs()):.2e} above "
                f"{float(limit[index]):.2e}"
            )


def _summation(before: Tensor) -> float:
    return (before.shape[-1] + 16) * 2.0**-53


def _short(before: Tensor, short_sums: bool) -> float:
    return SHORT_SUMS if short_sums and before.dtype != torch.float64 else 0.0


def _limit(exact: TokenMetrics, before: Tensor, dtype: torch.dtype, short_sums: bool) -> Tensor:
    bound = torch.finfo(dtype).eps / 2 + 2 * _summation(before) + _short(before, short_sums)
    return torch.full_like(exact.cosine_distance, bound)


def _cosine_limit(
    exact: TokenMetrics, value: Tensor, before: Tensor, dtype: torch.dtype, short_sums: bool
) -> Tensor:
    """Of `value`, which is 1 - cos or 1 + cos: a difference of squares over 2 a b."""
    summation, short = _summation(before), _short(before, short_sums)
    product = 2 * exact.norm_before * exact.norm_after * value
    product = product.where(product > 0, torch.inf)
    magnified = exact.squared_difference / product
    a, b = exact.norm_before, exact.norm_after
    gap = (b - a).abs() * torch.maximum(a, b)
    limit = _limit(exact, before, dtype, short_sums)
    limit = limit + 4 * summation * magnified + short * magnified.clamp(max=MOST_MAGNIFIED)
    return limit + 4 * summation * gap / product


def check_angles(
    angles: Tensor, before: Tensor, after: Tensor, *, short_sums: bool = False
) -> None:
    """Compare float64 angular distances with those of `exact_block_metrics`.

    With v the cosine distance and e the error of it that `check_metrics` allows, an angle may be
    off by as much as those of v - e and v + e differ, and by the 6e-16 of itself of a polynomial.
    Where v > 1, e is the error of 2 - v: sums in float32 are only used where (a + b)^2 is not
    nearly ||d||^2.

    Raises:
        AssertionError: which angle, by how much.
    """
    exact = exact_metrics(before, after)
    wanted = exact_block_metrics(before, after)["angular_distance"]
    v = exact.cosine_distance
    nearest = torch.minimum(v, 2 - v)
    limit = _cosine_limit(exact, nearest, before, torch.float64, short_sums)
    error = limit * nearest + torch.where(nearest < 1e-13, 4 * _summation(before), 0.0)
    lower, upper = (angular_distance((v + e).clamp(0, 2)) for e in (-error, error))
    allowed = upper - lower + 6e-16 * wanted
    failed = ~((angles - wanted).abs() <= allowed)
    if bool(failed.any()):
        index = tuple(failed.nonzero()[0].tolist())
        raise AssertionError(
            f"angular_distance[{index}]: got {angles[index].item()!r}, exact "
            f"{wanted[index].item()!r}, may be off by {float(allowed[index]):.2e}"
        )


def check_token_blocks(
    moments: Tensor, states: Sequence[Tensor], *, short_sums: bool = False, absolute: bool = True
) -> None:
    """Compare the state after one token with the exact metrics of all pairs.

    `states` are its hidden states, `(hidden_size,)` each. The bounds are those of `check_metrics`,
    a block is measured like a layer, and of `check_angles`. Without `absolute` the moments of the
    absolute difference must be zero.

    Raises:
        AssertionError: which metric of which pair, by how much; a sum of squares or a maximum that
            does not belong to its sum; an entry [i, j] with i >= j that is not zero.
    """
    num_metrics = len(BLOCK_METRICS)
    i, j = torch.triu_indices(len(states), len(states), offset=1).unbind(0)
    stacked = torch.stack([state.cpu() for state in states])
    before, after = stacked[i], stacked[j]
    sums, squares, maximum = moments[:num_metrics], moments[num_metrics:-1], moments[-1]
    found = dict(zip(BLOCK_METRICS, sums[:, i, j].unbind(0), strict=True))
    angles = found.pop("angular_distance")
    if not absolute and bool(found.pop("absolute_difference").any()):
        raise AssertionError("the absolute difference was not asked for")
    result = exact_metrics(before, after)._replace(**found)
    check_metrics(result, before, after, short_sums=short_sums)
    check_angles(angles, before, after, short_sums=short_sums)
    if not torch.allclose(squares, sums.square(), rtol=1e-15, atol=0):
        raise AssertionError("sums of squares of one token must be the squares of its sums")
    if not torch.equal(maximum, sums[BLOCK_METRICS.index("squared_difference")]):
        raise AssertionError("the maximum over one token must be its squared difference")
    if bool(moments.tril().any()):
        raise AssertionError("entries [i, j] with i >= j must be zero")


def joined_state(scores: RunningScores | RunningBlockScores) -> dict[str, Tensor]:
    """`moments` and `counts` on the host, the parts of a GPU joined: the same for all backends."""
    moments, counts = scores._on_host()
    return {"moments": moments, "counts": counts}
