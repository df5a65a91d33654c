"""Documents of several texts in proportion to their weights."""

from __future__ import annotations

from collections.abc import Sequence


def mixed(parts: Sequence[Sequence[str]], weights: Sequence[float]) -> list[str]:
    """Documents of all parts, each in its order, so that characters are in proportion to weights.

    The next document is always one of the part that is furthest behind. The list ends where a part
    has no more: what came after would be out of proportion.
    """
    found: list[str] = []
    sizes, taken = [0.0] * len(parts), [0] * len(parts)
    while True:
        part = min(range(len(parts)), key=sizes.__getitem__)
        if taken[part] == len(parts[part]):
            return found
        document = parts[part][taken[part]]
        found.append(document)
        taken[part] += 1
        sizes[part] += (len(document) + 1) / weights[part]
