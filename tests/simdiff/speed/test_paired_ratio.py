"""Medians, intervals and quartiles on numbers small enough for paper."""

from __future__ import annotations

from simdiff.speed.paired_ratio import paired_ratio, spread


def test_statistics() -> None:
    found = paired_ratio([2, 4, 6, 8, 10, 12, 28], [2, 2, 2, 2, 2, 2, 4])
    assert (found.median, found.low, found.high) == (4, 1, 7)
    assert found.coverage == 1 - 2 / 2**7
    narrow = paired_ratio(range(1, 10), [1] * 9)  # 2nd smallest and largest of 9
    assert (narrow.low, narrow.high, narrow.coverage) == (2, 8, 1 - 2 * 10 / 2**9)
    assert paired_ratio([3], [2]).coverage == 0
    value = spread([1, 2, 3, 4, 5])
    assert (value.lower_quartile, value.median, value.upper_quartile) == (2, 3, 4)
