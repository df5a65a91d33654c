"""Runs of layers."""

from __future__ import annotations

from simdiff.models.layer_indices import layer_runs, spans


def test_runs_are_half_open_and_written_with_both_ends() -> None:
    assert layer_runs([5, 0, 1, 2, 7, 8]) == [(0, 3), (5, 6), (7, 9)]
    assert layer_runs([]) == []
    assert spans([9, 1, 2]) == "1-2, 9"
