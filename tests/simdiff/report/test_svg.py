"""Scales of charts."""

from __future__ import annotations

import pytest

from simdiff.report.svg import Scale, scale_for


def test_scales() -> None:
    scale = scale_for([1.0, 1000.0], 0, 100)
    assert scale.logarithmic
    assert scale(1000.0) - scale(100.0) == pytest.approx(scale(10.0) - scale(1.0))
    assert scale.ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert not scale_for([-1.0, 1000.0], 0, 100).logarithmic
    assert Scale(0, 10, 200, 100)(2.5) == 175
    assert Scale(0, 1, 0, 1).ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    constant = scale_for([3.0, 3.0], 0, 100)
    assert constant(3.0) == pytest.approx(50)
