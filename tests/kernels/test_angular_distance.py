"""The polynomial of the angular distance: where its coefficients come from, and that all agree."""

from __future__ import annotations

import re
from pathlib import Path

import mpmath
import pytest
import torch

from simdiff_kernels import RunningBlockScores
from simdiff_kernels.testing import check_angles

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "common" / "angular_distance.h"


def header_coefficients() -> list[float]:
    text = HEADER.read_text()
    (inside,) = re.findall(r"coefficients\[kAngleTerms\] = \{(.*?)\}", text, re.DOTALL)
    return [float(number) for number in inside.split(",")]


def ratio(m: mpmath.mpf) -> mpmath.mpf:
    """f of the header: the angle over pi, divided by sqrt(m)."""
    return 2 * mpmath.asin(mpmath.sqrt(m / 2)) / (mpmath.pi * mpmath.sqrt(m))


def chebyshev(count: int) -> list[mpmath.mpf]:
    """Coefficients of f's series on [0, 1], from its values at 64 Chebyshev points."""
    angles = [mpmath.pi * (k + mpmath.mpf(0.5)) / 64 for k in range(64)]
    values = [ratio((1 + mpmath.cos(angle)) / 2) for angle in angles]
    found = [
        sum(value * mpmath.cos(n * angle) for value, angle in zip(values, angles, strict=True))
        / (32 if n else 64)
        for n in range(count)
    ]
    return found


def powers_of(series: list[mpmath.mpf]) -> list[mpmath.mpf]:
    """The same polynomial in powers of m, by T_n+1 = 2 (2m - 1) T_n - T_n-1."""
    before, current = [mpmath.mpf(1)], [mpmath.mpf(-1), mpmath.mpf(2)]
    total = [mpmath.mpf(0)] * len(series)
    for coefficient in series:
        for power, value in enumerate(before):
            total[power] += coefficient * value
        following = [-2 * value for value in current] + [mpmath.mpf(0)]
        for power, value in enumerate(current):
            following[power + 1] += 4 * value
        for power, value in enumerate(before):
            following[power] -= value
        before, current = current, following
    return total


def test_coefficients_are_those_of_the_chebyshev_series() -> None:
    with mpmath.workdps(40):
        series = chebyshev(30)
        assert all(coefficient > 0 for coefficient in series)  # the error bound rests on it
        kept = header_coefficients()
        assert kept == [float(value) for value in powers_of(series[: len(kept)])]
        cut_off = mpmath.mpf(0.5) - sum(series[: len(kept)])  # at m = 1, where it is largest
        assert 0 < cut_off < 6e-17


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_angles_of_every_size(dtype: torch.dtype) -> None:
    """From 1e-7 to pi - 1e-7, where the cosine tells nothing, with a massive activation or not."""
    generator = torch.Generator().manual_seed(3)
    x, rest = torch.randn(2, 200, generator=generator, dtype=torch.float64).unbind(0)
    for massive in (1.0, 300.0):
        x[7] *= massive
        rest = rest - (rest @ x) / (x @ x) * x
        rest = rest * x.norm() / rest.norm()
        for exponent in range(8):
            angle = torch.tensor(1.2 * 10.0**-exponent, dtype=torch.float64)
            for sign in (1, -1):
                states = [x, sign * (angle.cos() * x + angle.sin() * rest)]
                before, after = (state.to(dtype)[None] for state in states)
                for backend in ("reference", "cpu"):
                    scores = RunningBlockScores(1, backend=backend)
                    scores.update([before, after])
                    got = scores.finish().angular_distance[0, 1]
                    short = backend != "reference"
                    check_angles(got[None], before, after, short_sums=short)
