"""Runs of layers."""

from __future__ import annotations

from simdiff.models.layer_indices import layer_runs, run_words


def test_runs_are_half_open() -> None:
    assert layer_runs([5, 0, 1, 2, 7, 8]) == [(0, 3), (5, 6), (7, 9)]
    assert layer_runs([]) == []
    assert run_words([1, 2, 9]) == "[1, 3), [9, 10)"
