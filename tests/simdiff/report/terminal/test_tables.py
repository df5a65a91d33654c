"""Tables of layers fit a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from simdiff.planning.plan import PruningPlan
from simdiff.report.numbers import plain
from simdiff.report.terminal.tables import layers_table
from simdiff.scoring.scores import LayerScores


@pytest.mark.parametrize("width", [80, 130])
def test_the_layers_fit_a_terminal(run: tuple[Path, PruningPlan], width: int) -> None:
    scores = LayerScores.load(run[0] / "scores.json")
    stream = io.StringIO()
    Console(file=stream, width=width).print(layers_table(scores, run[1]))
    printed = stream.getvalue()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in printed
    assert "\x1b" not in printed
    for layer in range(6):
        squared = plain(scores.metrics["squared_difference"].mean[layer])
        assert any(squared in line and run[1].reason(layer) in line for line in lines)
    assert ("MASD" in printed) == (width > 100)
