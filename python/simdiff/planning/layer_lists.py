"""Lists of layers as people write them: `2,3,8-10`, on one line or several."""

from __future__ import annotations

import re

from simdiff.errors import SimdiffError

# Of a text in which one space stands around every comma and dash: a pattern that takes any white
# space tries all ways to share it out, which takes minutes for a table of numbers.
_LIST = re.compile(r"\d+( - \d+)?( ,)*( \d+( - \d+)?( ,)*)*")
MOST_LAYERS = 10_000
"""More than any model has; a slip of the keyboard must not fill the memory."""


def _spaced(text: str) -> str:
    return " ".join(text.replace("-", " - ").replace(",", " , ").split())


def is_layer_list(text: str) -> bool:
    """Whether a text is numbers and ranges of numbers, and nothing else."""
    return _LIST.fullmatch(_spaced(text)) is not None


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers of a list, ranges written out, each once, in the order of the list.

    Raises:
        SimdiffError: it is no list of numbers, or a range runs backwards.
    """
    if not is_layer_list(text):
        raise SimdiffError(f"must be layers such as 0,1,28-29, got {text[:200]!r}")
    ranges = re.findall(r"(\d+)(?: - (\d+))?", _spaced(text))
    if len(ranges) > MOST_LAYERS:
        raise SimdiffError(f"must be at most {MOST_LAYERS} layers, got {len(ranges)} numbers")
    layers: dict[int, None] = {}
    for first, last in ranges:
        start, stop = _number(first), _number(last or first)
        if stop < start or stop >= MOST_LAYERS:
            raise SimdiffError(
                f"must be layers such as 0,1,28-29, a range from the lower to the higher one, got "
                f"{first[:40]}-{last[:40]}"
                if last
                else f"must be layers below {MOST_LAYERS}, got {first[:40]}"
            )
        layers |= dict.fromkeys(range(start, stop + 1))
    return tuple(layers)


def _number(digits: str) -> int:
    """Of so many digits that int() refuses them, too large a number."""
    return int(digits) if len(digits) < 20 else MOST_LAYERS
