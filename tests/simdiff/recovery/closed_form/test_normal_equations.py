"""The solver against lstsq and on paper, and the choice of its strength."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.recovery.closed_form.normal_equations import NormalEquations, best_ridge, ridge


def equations_of(x: Tensor, r: Tensor, w: Tensor, parts: int = 3) -> NormalEquations:
    equations = NormalEquations(x.shape[1], r.shape[1])
    for rows in torch.arange(len(x)).chunk(parts):
        equations.update(x[rows], r[rows], w[rows])
    return equations


@pytest.mark.parametrize("num_features", [1, 7, 300])  # more than one block of columns
def test_ridge_is_the_least_squares_solution(num_features: int) -> None:
    generator = torch.Generator().manual_seed(num_features)
    x = torch.randn(700, num_features, generator=generator, dtype=torch.float64)
    r = torch.randn(700, 5, generator=generator, dtype=torch.float64)
    w = torch.rand(700, generator=generator, dtype=torch.float64) + 0.1
    equations = equations_of(x, r, w)
    strength = 0.03
    root = w.sqrt()[:, None]
    penalty = (strength * (w[:, None] * x.square()).sum(0).mean()).sqrt()
    design = torch.cat([x * root, penalty * torch.eye(num_features, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(design, torch.cat([r * root, r.new_zeros(num_features, 5)]))
    found = ridge(equations, strength)
    assert torch.allclose(found, wanted.solution, rtol=1e-10, atol=1e-12)
    error = (w[:, None] * (r - x @ found).square()).sum()
    assert equations.error(found) == pytest.approx(float(error), rel=1e-12)
    assert equations.energy == pytest.approx(float((w[:, None] * r.square()).sum()), rel=1e-12)


def test_the_strength_is_chosen_on_tokens_that_were_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(460, 20, generator=generator, dtype=torch.float64)
    r = x @ truth + 4 * torch.randn(460, 3, generator=generator, dtype=torch.float64)
    ones = torch.ones(460, dtype=torch.float64)
    fitted, unseen = (
        equations_of(x[:60], r[:60], ones[:60]),
        equations_of(x[60:], r[60:], ones[60:]),
    )
    strengths = (1e-9, 1e-3, 1e-1, 1.0, 1e3)
    fit = best_ridge(fitted, unseen, strengths)
    errors = [unseen.error(ridge(fitted, strength)) / unseen.energy for strength in strengths]
    assert fit.relative_error == pytest.approx(min(errors))
    assert fit.strength == strengths[errors.index(min(errors))]
    assert fit.strength not in (1e-9, 1e3)
    # Where the unseen residuals have nothing to do with the features no correction is best.
    other = equations_of(x[60:], -r[60:], ones[60:])
    assert best_ridge(fitted, other, strengths).correction is None
    assert best_ridge(fitted, other, strengths).relative_error == 1


def test_ridge_on_paper() -> None:
    """Two features 1 and 0 and a residual 3, twice: G = diag(2, 0), whose mean is 1."""
    x = torch.tensor([[1.0, 0.0]] * 2)
    equations = equations_of(x, torch.full((2, 1), 3.0), torch.ones(2), parts=1)
    assert equations.num_tokens == 2
    found = ridge(equations, 0.5)
    assert found.flatten().tolist() == pytest.approx([6 / 2.5, 0])
    assert equations.error(found) == pytest.approx(2 * 0.6**2)
    nothing = equations_of(0 * x, torch.full((2, 1), 3.0), torch.ones(2), parts=1)
    assert ridge(nothing, 0.5).tolist() == [[0.0], [0.0]]
    assert best_ridge(nothing, nothing, (0.5,)).correction is None


def test_nan_is_refused() -> None:
    equations = NormalEquations(2, 1)
    with pytest.raises(SimdiffError, match="hidden states must be finite, got NaN or Inf"):
        equations.update(torch.tensor([[1.0, torch.nan]]), torch.ones(1, 1), torch.ones(1))
    with pytest.raises(SimdiffError, match="hidden states must be finite, got NaN or Inf"):
        equations.update(torch.ones(1, 2), torch.full((1, 1), torch.inf), torch.ones(1))
    with pytest.raises(SimdiffError, match="strength must be above 0, got 0"):
        ridge(equations, 0.0)
