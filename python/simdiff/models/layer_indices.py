"""Indices of decoder layers: checked, joined to runs, and written for people."""

from __future__ import annotations

from collections.abc import Collection

from simdiff.errors import SimdiffError


def check_layers(layers: Collection[int], num_layers: int, what: str = "layers") -> None:
    """Refuse indices that are out of range or occur twice.

    Raises:
        SimdiffError: names the wrong indices and the valid range.
    """
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise SimdiffError(f"{what} must be indices from 0 to {num_layers - 1}, got {layer!r}")
    if len(set(layers)) != len(layers):
        raise SimdiffError(f"{what} must be named once each, got {sorted(layers)}")


def spans(layers: Collection[int]) -> str:
    """Write layers in order with runs joined, for people: `0-2, 5`."""
    return ", ".join(
        str(start) if stop == start + 1 else f"{start}-{stop - 1}"
        for start, stop in layer_runs(layers)
    )


def layer_runs(layers: Collection[int]) -> list[tuple[int, int]]:
    """Half-open runs of consecutive layers: 0, 1, 2, 5 gives (0, 3), (5, 6)."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
