"""The solver against lstsq and on paper, and the choice of its strength."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from simdiff.errors import SimdiffError
from simdiff.recovery.closed_form.normal_equations import (
    NormalEquations,
    Ridge,
    UnseenTokens,
    best_ridge,
)


def equations_of(x: Tensor, r: Tensor, w: Tensor, parts: int = 3) -> NormalEquations:
    equations = NormalEquations(x.shape[1], r.shape[1], dtype=x.dtype)
    for rows in torch.arange(len(x)).chunk(parts):
        equations.update(x[rows], r[rows], w[rows])
    return equations


def unseen_of(x: Tensor, r: Tensor, w: Tensor) -> UnseenTokens:
    unseen = UnseenTokens(x.dtype)
    for rows in torch.arange(len(x)).chunk(3):
        unseen.update(x[rows], r[rows], w[rows])
    return unseen


def ridge(equations: NormalEquations, strength: float) -> Tensor:
    return Ridge(equations, strength).solve(equations.cross)


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
    unseen = unseen_of(x, r, w)
    assert unseen.error(found) == pytest.approx(float(error), rel=1e-12)
    assert unseen.energy == pytest.approx(float((w[:, None] * r.square()).sum()), rel=1e-12)
    short = ridge(equations_of(x.float(), r.float(), w.float()), strength)
    assert torch.allclose(short.double(), found, rtol=1e-3, atol=1e-5)


def test_the_strength_is_chosen_on_tokens_that_were_not_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(460, 20, generator=generator, dtype=torch.float64)
    r = x @ truth + 4 * torch.randn(460, 3, generator=generator, dtype=torch.float64)
    ones = torch.ones(460, dtype=torch.float64)
    fitted, unseen = (
        equations_of(x[:60], r[:60], ones[:60]),
        unseen_of(x[60:], r[60:], ones[60:]),
    )
    strengths = (1e-9, 1e-3, 1e-1, 1.0, 1e3)
    fit = best_ridge(fitted, unseen, strengths)
    errors = [unseen.error(ridge(fitted, strength)) / unseen.energy for strength in strengths]
    assert fit.relative_error == pytest.approx(min(errors))
    assert fit.strength == strengths[errors.index(min(errors))]
    assert fit.strength not in (1e-9, 1e3)
    for start in strengths:  # the way downhill leads there from everywhere
        again = best_ridge(fitted, unseen, strengths, start)
        assert again.strength == fit.strength
        assert again.correction is not None
        assert fit.correction is not None
        assert torch.equal(again.correction, fit.correction)
    # Where the unseen residuals have nothing to do with the features no correction is best.
    other = unseen_of(x[60:], -r[60:], ones[60:])
    assert best_ridge(fitted, other, strengths).correction is None
    assert best_ridge(fitted, other, strengths).relative_error == 1


def test_ridge_on_paper() -> None:
    """Two features 1 and 0 and a residual 3, twice: G = diag(2, 0), whose mean is 1."""
    x = torch.tensor([[1.0, 0.0]] * 2)
    equations = equations_of(x, torch.full((2, 1), 3.0), torch.ones(2), parts=1)
    assert equations.num_tokens == 2
    found = ridge(equations, 0.5)
    assert found.flatten().tolist() == pytest.approx([6 / 2.5, 0])
    assert unseen_of(x, torch.full((2, 1), 3.0), torch.ones(2)).error(found) == pytest.approx(
        2 * 0.6**2
    )
    nothing = equations_of(0 * x, torch.full((2, 1), 3.0), torch.ones(2), parts=1)
    assert ridge(nothing, 0.5).tolist() == [[0.0], [0.0]]
    silent = unseen_of(0 * x, torch.full((2, 1), 3.0), torch.ones(2))
    assert best_ridge(nothing, silent, (0.5,)).correction is None
    silent = unseen_of(x, torch.zeros(2, 1), torch.ones(2))
    assert best_ridge(nothing, silent, (0.5,)).relative_error == 1


def test_nan_is_refused() -> None:
    equations = NormalEquations(2, 1)
    with pytest.raises(SimdiffError, match="hidden states must be finite, got NaN or Inf"):
        equations.update(torch.tensor([[1.0, torch.nan]]), torch.ones(1, 1), torch.ones(1))
    with pytest.raises(SimdiffError, match="hidden states must be finite, got NaN or Inf"):
        equations.update(torch.ones(1, 2), torch.full((1, 1), torch.inf), torch.ones(1))
    with pytest.raises(SimdiffError, match="strength must be above 0, got 0"):
        ridge(equations, 0.0)


def test_many_outputs_are_compared_by_sums_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strength is that of the lowest error over all outputs, found with few factorisations."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(30, 400, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 30, generator=generator, dtype=torch.float64)
    r = x @ truth + 9 * torch.randn(200, 400, generator=generator, dtype=torch.float64)
    ones = torch.ones(200, dtype=torch.float64)
    fitted = equations_of(x[:60], r[:60], ones[:60])
    unseen = unseen_of(x[60:], r[60:], ones[60:])
    strengths = tuple(10.0**power for power in range(-6, 4))
    errors = [unseen.error(ridge(fitted, strength)) for strength in strengths]
    factorised: list[float] = []
    first = Ridge.__init__

    def counted(self: Ridge, equations: NormalEquations, strength: float) -> None:
        factorised.append(strength)
        first(self, equations, strength)

    monkeypatch.setattr(Ridge, "__init__", counted)
    best = strengths[errors.index(min(errors))]
    fit = best_ridge(fitted, unseen, strengths, best)
    assert fit.strength == best
    assert fit.relative_error == pytest.approx(min(errors) / unseen.energy)
    assert len(factorised) == 3  # the best and its neighbours
