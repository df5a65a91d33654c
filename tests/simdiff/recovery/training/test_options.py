"""Options of training and their presets."""

from __future__ import annotations

import math

import pytest

from simdiff.errors import SimdiffError
from simdiff.recovery.training.head_loss import Distillation
from simdiff.recovery.training.options import preset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"lora_alpha": 0.0}, "alpha must be above 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_minutes": -1.0}, "max_minutes must be above 0"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant"),
        ({"distillation_weight": 2.0}, "distillation: weight must be 0 to 1"),
        ({"speed": 2}, "no option is called speed"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SimdiffError, match=message):
        preset("distillation", **changes)


def test_presets() -> None:
    paper = preset("paper")
    assert (paper.lora.rank, paper.lora.alpha, paper.epochs, paper.batch_size) == (8, 16.0, 1.0, 64)
    assert paper.distillation is None
    assert preset("distillation", rank=8).lora.alpha == 16.0, "the scale of the update stays"
    assert preset("distillation", distillation_weight=0.0).distillation is None
    assert preset("text", distillation_weight=0.5).distillation == Distillation(0.5)
    rates = [paper.learning_rate_at(step, 300) for step in range(300)]
    assert max(rates) == rates[100] == 1e-4
    assert rates[0] == pytest.approx(1e-4 / 101)
    assert rates[200] == pytest.approx(0.5e-4)
    assert 0 < rates[-1] < 1e-6
