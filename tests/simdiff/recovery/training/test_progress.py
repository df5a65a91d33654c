"""What a training shows while it runs."""

from __future__ import annotations

import math

import pytest

from simdiff.recovery.training import progress
from simdiff.recovery.training.progress import TrainingProgress


@pytest.mark.parametrize(("known", "shown"), [(math.log(7.5), "7.50"), (math.nan, "nan")])
def test_a_resumed_training_shows_the_last_loss_on_what_is_set_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], known: float, shown: str
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    with TrainingProgress(10, 4, set_apart=known) as shower:
        shower.stepped(5, 2.0, 100.0)
        shower.evaluated(5, math.log(6.25), True)
        shower.stepped(6, 2.0, 100.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"train: step 5 of 10, loss 2.000, set apart {shown}, 100 tokens/s")
    assert lines[1].endswith("perplexity on what is set apart 6.25, the best so far")
    assert lines[2].startswith("train: step 6 of 10, loss 2.000, set apart 6.25,")
