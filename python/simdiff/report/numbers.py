"""Numbers as people read them, the same on a page and in the terminal: never 1.04e+03."""

from __future__ import annotations

from decimal import Decimal

# From 10,000 on a unit stands for the thousands.
_UNITS = ((1e15, 1e15, "P"), (1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))


def plain(value: float, digits: int = 4) -> str:
    """A number of so many significant digits, such as 0.0000312, 1234 or 75.6M."""
    rounded = float(f"{value:.{digits}g}")
    for least, unit, name in _UNITS:
        if abs(rounded) >= least:
            return _fixed(rounded / unit, digits) + name
    return _fixed(rounded, digits)


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}g}"
    return f"{Decimal(text):f}" if "e" in text else text


def perplexity_text(value: float) -> str:
    """Two decimals where they mean something."""
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e5 else plain(value, 3)


def ratio_text(value: float) -> str:
    """How many times, with three decimals where they mean something."""
    return f"{value:.3f}" if value < 10 else perplexity_text(float(f"{value:.3g}"))


def speed_text(value: float) -> str:
    """Tokens per second: three digits, and from 100 on whole numbers."""
    return f"{value:.0f}" if value >= 100 else plain(value, 3)


def parameters_text(*counts: int) -> str:
    """Numbers of parameters in the unit that suits the largest: `134.5 → 109.7 M`, `52.7 k`."""
    largest = max(counts)
    scale, unit = (1e6, "M") if largest >= 1e6 else (1e3, "k")
    digits = 0 if largest >= 1e9 else 1
    return " → ".join(f"{count / scale:,.{digits}f}" for count in counts) + f" {unit}"


def duration(seconds: float) -> str:
    """A time in a unit that fits."""
    if seconds < 1:
        return f"{plain(1000 * seconds, 3)} ms" if seconds >= 1e-3 else "< 1 ms"
    if seconds < 120:
        return f"{plain(seconds, 3)} s"
    minutes = seconds / 60
    return f"{plain(minutes, 3)} min" if minutes < 120 else f"{plain(minutes / 60, 3)} h"
