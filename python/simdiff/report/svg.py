"""Draw small charts as SVG.

Colours are CSS classes of the page, so that one picture works in light and dark. Each chart has a
title and a description for readers who cannot see it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from simdiff.report.numbers import plain

# Width of a chart in its own units, which are pixels if two charts are side by side. On a phone it
# shrinks to two thirds, where text of 13 units is still 9 pixels high.
WIDTH = 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 16, 40
# An axis is logarithmic if positive values span more than this factor.
LOG_FROM = 20


@dataclass(frozen=True)
class Scale:
    """Maps values low ... high to pixels start ... stop, linearly or by logarithms."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside the scale are moved to its end."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        inside = min(max(value, self.low), self.high)
        return self.start + (self._scaled(inside) - low) / (high - low) * (self.stop - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value

    def ticks(self, wanted: int = 5) -> list[float]:
        """About `wanted` round values within the scale."""
        if self.logarithmic:
            return _log_ticks(self.low, self.high, wanted)
        step = _round_step((self.high - self.low) / max(wanted, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [float(f"{count * step:.12g}") for count in range(first, last + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        found = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(found) >= 3:
            break
    return found[:: max(1, math.ceil(len(found) / (wanted + 1)))]


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= rough * 0.999)


def scale_for(
    values: Iterable[float], start: float, stop: float, *, from_zero: bool = False
) -> Scale:
    """A scale for all values with a margin; logarithmic if they span a large factor."""
    known = [value for value in values if math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    if low > 0 and high > LOG_FROM * low and not from_zero:
        margin = (high / low) ** 0.06
        return Scale(low / margin, high * margin, start, stop, logarithmic=True)
    if from_zero:
        return Scale(0.0, 1.08 * high if high > 0 else 1.0, start, stop)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, start, stop)


@dataclass
class Chart:
    """A drawing area with axes; shapes are added in order."""

    title: str
    description: str
    height: int = 240
    width: int = WIDTH
    left: int = _LEFT
    bottom: int = _BOTTOM
    shapes: list[str] = field(default_factory=list)

    @property
    def x_range(self) -> tuple[float, float]:
        """The pixels of the left and the right end of the drawing area."""
        return self.left, self.width - _RIGHT

    @property
    def y_range(self) -> tuple[float, float]:
        """The pixels of the lower and the upper end of the drawing area."""
        return self.height - self.bottom, _TOP

    def add(self, name: str, kind: str = "", text: str | None = None, **values: object) -> None:
        """Add a shape with a CSS class; `_` in the name of an attribute stands for `-`."""
        attributes = "".join(
            f' {key.replace("_", "-")}="{_attribute(value)}"' for key, value in values.items()
        )
        kind = f' class="{kind}"' if kind else ""
        end = "/>" if text is None else f">{html.escape(text)}</{name}>"
        self.shapes.append(f"<{name}{kind}{attributes}{end}")

    def text(self, x: float, y: float, text: str, kind: str = "tick", **values: object) -> None:
        """Add text at a point."""
        self.add("text", kind, text, x=x, y=y, **values)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Add a straight line."""
        self.add("line", kind, x1=x1, y1=y1, x2=x2, y2=y2)

    def path(self, points: Sequence[tuple[float, float]], kind: str, dashes: str = "") -> None:
        """Draw a line through points, dashed as `stroke-dasharray` says."""
        steps = " ".join(f"{'L' if n else 'M'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(points))
        self.add("path", kind, d=steps, **({"stroke_dasharray": dashes} if dashes else {}))

    def y_axis(self, scale: Scale, label: str) -> None:
        """Add horizontal grid lines with their values, and the axis label above them."""
        left, right = self.x_range
        for value in scale.ticks():
            y = scale(value)
            self.line(left, y, right, y, "grid")
            self.text(left - 6, y + 4, plain(value), text_anchor="end")
        self.text(0, 10, label, "axis")

    def x_axis(self, scale: Scale, values: Iterable[float], label: str) -> None:
        """Add values below the drawing area, and the axis label below them."""
        bottom, _ = self.y_range
        self.line(self.left, bottom, self.x_range[1], bottom, "base")
        for value in values:
            x = scale(value)
            self.line(x, bottom, x, bottom + 4, "base")
            self.text(x, bottom + 17, plain(value), text_anchor="middle")
        self.text(self.x_range[1], bottom + 36, label, "axis", text_anchor="end")

    def render(self) -> str:
        """The chart as an SVG element."""
        title, description = html.escape(self.title), html.escape(self.description)
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{title}. {description}"><title>{title}</title><desc>{description}</desc>'
            f"{''.join(self.shapes)}</svg>"
        )


def _attribute(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else html.escape(str(value))


def depth_scale(chart: Chart, num_layers: int) -> Scale:
    """A horizontal scale with one place for each layer."""
    return Scale(-0.7, num_layers - 0.3, *chart.x_range)


def depth_ticks(num_layers: int, most: int = 10) -> list[float]:
    """The layers whose indices are written below an axis of depth."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if num_layers <= s * most)
    return [float(layer) for layer in range(0, num_layers, step)]


def bar_row(chart: Chart, scale: Scale, y: float, name: str, value: float, shown: str) -> None:
    """Add a horizontal bar from zero, with its name on the left and its value on the right."""
    chart.text(chart.left - 7, y + 13.5, name, text_anchor="end")
    chart.add("rect", f"bar {name}", x=chart.left, y=y, width=scale(value) - chart.left, height=18)
    chart.text(chart.width - 2, y + 13.5, shown, "value", text_anchor="end")
