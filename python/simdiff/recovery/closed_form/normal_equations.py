"""Weighted ridge regression from sums over tokens, and the choice of its strength."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simdiff.errors import SimdiffError

# Number of columns of a Gram matrix computed at a time. Only tiles on and above the diagonal are
# computed, 58% of the products for 6 tiles across.
_COLUMNS = 256
# Strengths are compared on this many random sums ± of the outputs, where there are more than twice
# as many: solving for all outputs would take most of the time. The same sums for all strengths, so
# that their order is hardly touched.
_SKETCH = 128


class NormalEquations:
    """The sums from which a weighted linear regression is solved; tokens are not stored.

    For features x_t, residuals r_t and weights w_t ≥ 0 of tokens t:

        G = Σ w x xᵀ,   C = Σ w x rᵀ,   e = Σ w ‖r‖²

    Args:
        num_features, num_outputs: number of features and of residuals of a token.
        device: device of the sums.
        dtype: of products and sums, float32 or float64; G takes 4 or 8 · num_features² bytes.
    """

    def __init__(
        self,
        num_features: int,
        num_outputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        """Start with all sums zero."""
        self.gram = torch.zeros(num_features, num_features, dtype=dtype, device=device)
        self.cross = torch.zeros(num_features, num_outputs, dtype=dtype, device=device)
        self.num_tokens = 0

    def update(self, features: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            features: `(num_tokens, num_features)`.
            residuals: `(num_tokens, num_outputs)`.
            weights: `(num_tokens,)`, not negative.

        Raises:
            SimdiffError: a value is NaN or Inf.
        """
        x, r = _weighted(features, residuals, weights, self.gram.dtype)
        for first in range(0, x.shape[1], _COLUMNS):
            rows = slice(first, first + _COLUMNS)
            self.gram[rows, first:].addmm_(x[:, rows].T, x[:, first:])
        self.cross.addmm_(x.T, r)
        self.num_tokens += len(x)

    def symmetric_gram(self) -> Tensor:
        """G itself, not a copy, with the part below the diagonal filled in; `update` skips it."""
        for first in range(0, self.gram.shape[0], _COLUMNS):
            after = first + _COLUMNS
            self.gram[after:, first:after] = self.gram[first:after, after:].T
        return self.gram


class UnseenTokens:
    """Weighted tokens that are not fitted, stored to measure what a correction leaves of them.

    Args:
        dtype: of products, float32 or float64.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        """Start without tokens."""
        self._dtype = dtype
        self._parts: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Add tokens; arguments and errors are those of `NormalEquations.update`."""
        self._parts.append(_weighted(features, residuals, weights, self._dtype))

    @property
    def energy(self) -> float:
        """The squared error without a correction, Σ w ‖r‖²."""
        return math.fsum(float(r.double().square().sum()) for _, r in self._parts)

    def error(self, correction: Tensor, of_outputs: Tensor | None = None) -> float:
        """The squared error that a correction V leaves, Σ w ‖r − Vᵀ x‖².

        Args:
            correction: V, `(num_features, num_outputs)`.
            of_outputs: a matrix M `(num_outputs, num_sums)`, by which V has been multiplied: the
                error of Mᵀ r.
        """
        wanted = [(x, r if of_outputs is None else r @ of_outputs) for x, r in self._parts]
        return math.fsum(float((r - x @ correction).double().square().sum()) for x, r in wanted)


def _weighted(
    features: Tensor, residuals: Tensor, weights: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Features and residuals times √w, which must be finite."""
    root = weights.to(dtype).sqrt()[:, None]
    x, r = features.to(dtype) * root, residuals.to(dtype) * root
    # A sum of squares is finite if all of them are; one number is cheaper than a flag for each.
    if not (math.isfinite(float(x.square().sum())) and math.isfinite(float(r.square().sum()))):
        raise SimdiffError("recovery: hidden states must be finite, got NaN or Inf")
    return x, r


class Ridge:
    """The regularised equations of one strength, factorised: (G + strength · mean(diag G) · I).

    Args:
        equations: sums over the tokens to fit.
        strength: penalty on ‖V‖² as a share of the mean squared feature, above 0.

    Raises:
        SimdiffError: the strength is not positive, or float64 gives no solution.
    """

    def __init__(self, equations: NormalEquations, strength: float) -> None:
        """Factorise; in float64 where float32 does not suffice."""
        if not strength > 0:
            raise SimdiffError(f"ridge: strength must be above 0, got {strength}")
        gram = equations.symmetric_gram()
        mean = float(gram.diagonal().double().mean())
        self._factor: Tensor | None = None
        if mean == 0:  # all features are zero, so no correction changes anything
            return
        for dtype in dict.fromkeys((gram.dtype, torch.float64)):
            regular = gram.to(dtype, copy=True)
            regular.diagonal().add_(strength * mean)
            self._factor, info = torch.linalg.cholesky_ex(regular)
            if int(info) == 0:
                return
        raise SimdiffError(
            f"ridge: strength {strength} must make the normal equations positive definite in "
            "float64, and does not: give a larger one"
        )

    def solve(self, cross: Tensor) -> Tensor:
        """V = (G + strength · mean(diag G) · I)⁻¹ C for columns C of the equations' cross sums."""
        if self._factor is None:
            return torch.zeros_like(cross)
        return torch.cholesky_solve(cross.to(self._factor.dtype), self._factor).to(cross.dtype)


@dataclass(frozen=True)
class Fit:
    """The correction of lowest error on tokens that it was not fitted to."""

    correction: Tensor | None
    """V, `(num_features, num_outputs)`; None if no correction is best."""
    strength: float | None
    relative_error: float
    """Error on those tokens over the error without a correction, at most 1."""


def best_ridge(
    fitted: NormalEquations,
    unseen: UnseenTokens,
    strengths: Sequence[float],
    start: float | None = None,
) -> Fit:
    """Fit with the strength of lowest error on unseen tokens; no correction is a candidate too.

    The error falls and rises again with the strength: from `start` the search goes downhill to the
    next strength as long as that is better, so that three or four are tried.

    Args:
        fitted: sums over the tokens to fit.
        unseen: other tokens, by which the strength is chosen.
        strengths: candidates in ascending order, see `Ridge`.
        start: the candidate to begin with, the middle one by default.
    """
    energy = unseen.energy
    if energy == 0:
        return Fit(None, None, 1.0)
    sums = _sketch(fitted.cross)
    cross = fitted.cross if sums is None else fitted.cross @ sums
    errors: dict[int, float] = {}
    kept: tuple[float, Ridge] | None = None  # the factorisation of lowest error

    def error(index: int) -> float:
        nonlocal kept
        if not 0 <= index < len(strengths):
            return math.inf
        if index not in errors:
            ridge = Ridge(fitted, strengths[index])
            errors[index] = unseen.error(ridge.solve(cross), sums)
            if kept is None or errors[index] < kept[0]:
                kept = errors[index], ridge
        return errors[index]

    best = strengths.index(start) if start in strengths else len(strengths) // 2
    for step in (-1, 1):
        while error(best + step) < error(best):
            best += step
    assert kept is not None
    correction = kept[1].solve(fitted.cross)
    relative = unseen.error(correction) / energy
    return Fit(correction, strengths[best], relative) if relative < 1 else Fit(None, None, 1.0)


def _sketch(cross: Tensor) -> Tensor | None:
    """Signs ± `(num_outputs, _SKETCH)` over the root of their number; None for few outputs."""
    outputs = cross.shape[1]
    if outputs <= 2 * _SKETCH:
        return None
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (outputs, _SKETCH), generator=generator) * 2 - 1
    return signs.to(cross) / _SKETCH**0.5
