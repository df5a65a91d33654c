"""A run of the tiny model, as its command leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simdiff.planning.plan import PruningPlan
from simdiff.scoring.calibration_pass import score
from simdiff.scoring.scores import LayerScores
from support.report_files import NAME, write_run


@pytest.fixture
def scores(llama: Any, token_batches: Any) -> LayerScores:
    calibration = {"source": "a <text>", "num_windows": 5, "window_length": 11, "seed": 0}
    return score(llama, token_batches, name=NAME, calibration=calibration, progress=False)


@pytest.fixture
def run(tmp_path: Path, scores: LayerScores) -> tuple[Path, PruningPlan]:
    return tmp_path / "out", write_run(tmp_path / "out", scores)
