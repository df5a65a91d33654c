"""Numbers as people read them."""

from __future__ import annotations

import pytest

from simdiff.report.numbers import duration, perplexity_text, plain, ratio_text, speed_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00003121, "0.00003121"),
        (-0.5, "-0.5"),
        (1234.5, "1234"),
        (9999.6, "10k"),
        (13170.0, "13.17k"),
        (-755_900_000.0, "-755.9M"),
        (2.374e12, "2.374T"),
        (1.5e19, "15000P"),
    ],
)
def test_no_exponents(value: float, text: str) -> None:
    assert plain(value) == text


def test_of_each_kind() -> None:
    assert [perplexity_text(v) for v in (22.534, 1040.4, 99_999.0, 1.04e6)] == [
        "22.53",
        "1,040",
        "99,999",
        "1.04M",
    ]
    assert [ratio_text(v) for v in (2.3006, 46.17, 1040.4, 46172.0, 4.6e6)] == [
        "2.301",
        "46.20",
        "1,040",
        "46,200",
        "4.6M",
    ]
    assert [speed_text(v) for v in (0.012345, 12.345, 99.5, 1234.5)] == [
        "0.0123",
        "12.3",
        "99.5",
        "1234",
    ]
    assert [duration(v) for v in (0.0001, 0.2, 63.21, 236.0, 7300.0, 720_000.0)] == [
        "< 1 ms",
        "200 ms",
        "63.2 s",
        "3.93 min",
        "2.03 h",
        "200 h",
    ]
    told = [
        f(10.0**e * 1.0417) for e in range(-6, 16) for f in (plain, speed_text, perplexity_text)
    ]
    assert not any("e" in text for text in told)
