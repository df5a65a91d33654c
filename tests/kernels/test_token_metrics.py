"""Every backend on the common list of cases, against an independent exact computation."""

from __future__ import annotations

import pytest
import torch

from simdiff_kernels import METRICS, TokenMetrics, angular_distance, token_metrics
from simdiff_kernels.metrics import result_dtype
from simdiff_kernels.testing import (
    Case,
    cases,
    check_metrics,
    exact_metrics,
    near,
    with_strides,
)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_against_exact(case: Case, backend: str, device: str) -> None:
    before, after = case.states()
    on_device = (with_strides(states, device) for states in (before, after))
    result = token_metrics(*on_device, backend=backend)
    for values in result:
        assert values.shape == before.shape[:-1]
        assert values.dtype == result_dtype(case.dtype)
    on_host = TokenMetrics(*(values.cpu() for values in result))
    check_metrics(on_host, before, after, short_sums=backend != "reference")


@pytest.mark.parametrize("exponent", range(8))
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_cosine_distance_bound(exponent: int, scale: float, backend: str, device: str) -> None:
    """Down to 1e-7, with a massive channel: 4e-7 (README), for the reference its rounding."""
    before, after = near((16, 1024), 10.0**-exponent, scale=scale, massive=True)(
        torch.Generator().manual_seed(exponent)
    )
    got = token_metrics(before.to(device), after.to(device), backend=backend)
    exact = exact_metrics(before, after)
    for name in ("cosine_distance", "squared_difference", "absolute_difference"):
        wanted = getattr(exact, name)
        error = (getattr(got, name).cpu().double() - wanted).abs() / wanted
        assert error.max() <= (6e-8 if backend == "reference" else 4e-7), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["before", "after"])
def test_nonfinite_states_never_look_finite(
    value: float, which: str, backend: str, device: str
) -> None:
    states = {name: torch.randn(3, 40) for name in ("before", "after")}
    states[which][1, 37] = value
    result = token_metrics(states["before"].to(device), states["after"].to(device), backend=backend)
    for name in ("cosine_distance", "squared_difference", "absolute_difference"):
        values = getattr(result, name)
        assert not values[1].isfinite(), name
        assert values[[0, 2]].isfinite().all(), name


def test_documented_zero_vectors(backend: str, device: str) -> None:
    before = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], device=device)
    after = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], device=device)
    result = token_metrics(before, after, backend=backend)
    assert result.cosine_distance.tolist() == [0, 1, 1]
    assert result.relative_difference.tolist() == [0, 1, 1]
    assert result.squared_difference.tolist() == [0, 25, 25]
    assert result.absolute_difference.tolist() == [0, 3.5, 3.5]


def test_inputs_stay_as_they_were(backend: str, device: str) -> None:
    before, after = torch.randn(2, 5, 33, device=device), torch.randn(2, 5, 33, device=device)
    copies = before.clone(), after.clone()
    token_metrics(before, after, backend=backend)
    assert torch.equal(before, copies[0])
    assert torch.equal(after, copies[1])


def test_not_differentiable() -> None:
    before = torch.randn(4, 8, requires_grad=True)
    assert not token_metrics(before, before * 2).cosine_distance.requires_grad


@pytest.mark.parametrize(
    ("before", "after", "error", "wanted"),
    [
        (torch.ones(4, 8), torch.ones(4, 7), ValueError, r"after must have shape \(4, 8\).*\(4, 7"),
        (torch.ones(4, 8).int(), torch.ones(4, 8).int(), TypeError, "float32.*got torch.int32"),
        (torch.ones(4, 8), torch.ones(4, 8).half(), ValueError, "float32 like before.*float16"),
        (torch.ones(0, 8), torch.ones(0, 8), ValueError, r"at least one token.*\(0, 8\)"),
        (torch.ones(4, 0), torch.ones(4, 0), ValueError, r"one hidden entry.*\(4, 0\)"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, "scalar"),
        ([1.0], torch.ones(1), TypeError, "before must be a tensor, got list"),
        (torch.ones(4, 8), torch.ones(4, 8, device="meta"), ValueError, "on cpu like before"),
    ],
)
def test_bad_input(before: object, after: object, error: type[Exception], wanted: str) -> None:
    with pytest.raises(error, match=wanted):
        token_metrics(before, after)  # type: ignore[arg-type]


def test_unknown_and_unusable_backends() -> None:
    states = torch.ones(4, 8)
    with pytest.raises(ValueError, match="one of reference, cpu, triton, cuda, got 'gpu'"):
        token_metrics(states, states, backend="gpu")
    meta = states.to("meta")
    with pytest.raises(ValueError, match="backend 'cpu' cannot run on meta tensors"):
        token_metrics(meta, meta, backend="cpu")


def test_angular_distance_keeps_its_digits() -> None:
    angles = torch.tensor([1e-7, 1e-4, 0.1, torch.pi / 2, torch.pi], dtype=torch.float64)
    distances = 2 * (angles / 2).sin().square()
    assert torch.allclose(angular_distance(distances) * torch.pi, angles, rtol=1e-14, atol=0)
    assert METRICS[0] == "cosine_distance"
