"""Ratios of rounds and their intervals."""

from __future__ import annotations

import ratios


def test_ratios_are_those_of_the_rounds() -> None:
    """Nine rounds: between the second and the eighth of the ratios with probability 0.961."""
    below = [1.0, 2.0, 4.0, 8.0, 1.0, 1.0, 1.0, 1.0, 10.0]
    times = [ratio * of for ratio, of in zip([5, 1, 9, 2, 8, 3, 7, 4, 6], below, strict=True)]
    found, intervals = ratios.of_rounds({"eager": times}, below)
    assert found == {"eager": 5}  # the ratio of the medians is 7
    assert intervals == {"eager": {"low": 2, "high": 8, "coverage": 1 - 2 * 10 / 512}}
    assert ratios.shown(5, intervals["eager"]) == "5.00 [2.00, 8.00]"
    assert ratios.shown(0.01234, {"low": 0.012, "high": 0.1}, "percent") == "1.23% [1.20%, 10.00%]"
    assert ratios.shown(31.25, {"low": 9.996, "high": 114.4}) == "31.2 [10.00, 114]"
    assert ratios.shown(10.0, {"low": 10.5, "high": 100.0}) == "10.0 [10.5, 100]"
    assert ratios.shown(1.0049, None, 3) == "1.005"
    assert ratios.shown(None, None) == ""
