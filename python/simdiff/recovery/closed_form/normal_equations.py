"""Weighted ridge regression from streamed normal equations in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from simdiff.errors import SimdiffError

# Number of columns of a Gram matrix computed at a time. Only tiles on and above the diagonal are
# computed, 58% of the products for 6 tiles across.
_COLUMNS = 256


class NormalEquations:
    """The sums from which a weighted linear regression is solved; tokens are not stored.

    For features x_t, residuals r_t and weights w_t ≥ 0 of tokens t:

        G = Σ w x xᵀ,   C = Σ w x rᵀ,   e = Σ w ‖r‖²

    so that a correction V `(num_features, num_outputs)` leaves the squared error
    Σ w ‖r − Vᵀ x‖² = e − 2 tr(Vᵀ C) + tr(Vᵀ G V).

    Args:
        num_features, num_outputs: number of features and of residuals of a token.
        device: device of the sums, which are float64; G takes `8 · num_features²` bytes.
    """

    def __init__(
        self, num_features: int, num_outputs: int, device: torch.device | str = "cpu"
    ) -> None:
        """Start with all sums zero."""
        shape = {"dtype": torch.float64, "device": device}
        self.gram = torch.zeros(num_features, num_features, **shape)  # type: ignore[call-overload]
        self.cross = torch.zeros(num_features, num_outputs, **shape)  # type: ignore[call-overload]
        self.energy = 0.0
        """The squared error without a correction, Σ w ‖r‖²."""
        self.num_tokens = 0

    def update(self, features: Tensor, residuals: Tensor, weights: Tensor) -> None:
        """Add tokens; products and sums are float64.

        Args:
            features: `(num_tokens, num_features)`.
            residuals: `(num_tokens, num_outputs)`.
            weights: `(num_tokens,)`, not negative.

        Raises:
            SimdiffError: a value is NaN or Inf.
        """
        root = weights.double().sqrt()[:, None]
        x, r = features.double() * root, residuals.double() * root
        energy = float(r.square().sum())
        if not (energy < float("inf") and bool(torch.isfinite(x).all())):
            raise SimdiffError("recovery: hidden states must be finite, got NaN or Inf")
        for first in range(0, x.shape[1], _COLUMNS):
            rows = slice(first, first + _COLUMNS)
            self.gram[rows, first:].addmm_(x[:, rows].T, x[:, first:])
        self.cross.addmm_(x.T, r)
        self.energy += energy
        self.num_tokens += len(x)

    def symmetric_gram(self) -> Tensor:
        """G itself, not a copy, with the part below the diagonal filled in; `update` skips it."""
        for first in range(0, self.gram.shape[0], _COLUMNS):
            after = first + _COLUMNS
            self.gram[after:, first:after] = self.gram[first:after, after:].T
        return self.gram

    def error(self, correction: Tensor, gram: Tensor | None = None) -> float:
        """The squared error of a correction V over the tokens seen, Σ w ‖r − Vᵀ x‖².

        Args:
            correction: V, `(num_features, num_outputs)`.
            gram: `symmetric_gram()`, if it is known already.
        """
        gram = self.symmetric_gram() if gram is None else gram
        change = (correction * (gram @ correction - 2 * self.cross)).sum()
        return self.energy + float(change)


def ridge(equations: NormalEquations, strength: float, gram: Tensor | None = None) -> Tensor:
    """Solve for V = (G + strength · mean(diag G) · I)⁻¹ C, float64 `(num_features, num_outputs)`.

    Args:
        equations: sums over the tokens to fit.
        strength: penalty on ‖V‖² as a share of the mean squared feature, above 0.
        gram: `symmetric_gram()`, if it is known already.

    Raises:
        SimdiffError: the strength is not positive, or float64 gives no solution.
    """
    if not strength > 0:
        raise SimdiffError(f"ridge: strength must be above 0, got {strength}")
    gram = equations.symmetric_gram() if gram is None else gram
    mean = float(gram.diagonal().mean())
    if mean == 0:  # all features are zero, so no correction changes anything
        return torch.zeros_like(equations.cross)
    regular = gram.clone()
    regular.diagonal().add_(strength * mean)
    factor, info = torch.linalg.cholesky_ex(regular)
    if int(info) != 0:
        raise SimdiffError(
            f"ridge: strength {strength} must make the normal equations positive definite in "
            "float64, and does not: give a larger one"
        )
    return torch.cholesky_solve(equations.cross, factor)


@dataclass(frozen=True)
class Fit:
    """The correction of lowest error on tokens that it was not fitted to."""

    correction: Tensor | None
    """V, float64 `(num_features, num_outputs)`; None if no correction is best."""
    strength: float | None
    relative_error: float
    """Error on those tokens over the error without a correction, at most 1."""


def best_ridge(fitted: NormalEquations, unseen: NormalEquations, strengths: Sequence[float]) -> Fit:
    """Fit with the strength of lowest error on unseen tokens; no correction is a candidate too.

    Args:
        fitted: sums over the tokens to fit.
        unseen: sums over other tokens, by which the strength is chosen.
        strengths: candidates, see `ridge`.
    """
    gram, unseen_gram = fitted.symmetric_gram(), unseen.symmetric_gram()
    best = Fit(None, None, 1.0)
    for strength in strengths:
        correction = ridge(fitted, strength, gram)
        error = unseen.error(correction, unseen_gram)
        if unseen.energy > 0 and error / unseen.energy < best.relative_error:
            best = Fit(correction, strength, error / unseen.energy)
    return best
