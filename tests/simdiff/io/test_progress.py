"""The bar of a streamed pass: layers, bytes and time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from simdiff.io import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_layers_and_bytes(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system=None, width=120)
    monkeypatch.setattr(progress, "console", console)
    with progress.track_layers(4, 3_000_000_000, "score", done=1) as advance:
        for _ in range(2):
            advance(1_000_000_000)
        advance(500_000_000, layers=0)
    text = file.getvalue()
    if terminal:
        assert "3/4 layers, 2.5 of 3.0 GB read" in text
        assert "left" in text
    else:
        assert text.endswith("4 layers from layer 1 on, 2.50 GB of weights read\n")
