"""Lists of layers as people write them: `2,3,8-10`, on one line or several."""

from __future__ import annotations

import re

from simdiff.errors import SimdiffError

_LIST = re.compile(r"\s*\d+\s*(-\s*\d+\s*)?([\s,]+\d+\s*(-\s*\d+\s*)?)*[\s,]*")
# No model has as many; a slip of the keyboard must not fill the memory.
_MOST = 10_000


def is_layer_list(text: str) -> bool:
    """Whether a text is numbers and ranges of numbers, and nothing else."""
    return _LIST.fullmatch(text) is not None


def parse_layers(text: str) -> tuple[int, ...]:
    """The numbers of a list, ranges written out, each once, in the order of the list.

    Raises:
        SimdiffError: it is no list of numbers, or a range runs backwards.
    """
    if not is_layer_list(text):
        raise SimdiffError(f"must be layers such as 0,1,28-29, got {text!r}")
    layers: dict[int, None] = {}
    for first, last in re.findall(r"(\d+)\s*(?:-\s*(\d+))?", text):
        start, stop = int(first), int(last or first)
        if stop < start or stop >= _MOST:
            raise SimdiffError(
                f"must be layers such as 0,1,28-29, a range from the lower to the higher one, got "
                f"{first}-{last}"
                if last
                else f"must be layers below {_MOST}, got {first}"
            )
        layers |= dict.fromkeys(range(start, stop + 1))
    return tuple(layers)
