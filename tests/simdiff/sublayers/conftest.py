"""Scores of the tiny model with its sub-layers."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from simdiff.scoring.scores import LayerScores
from simdiff.sublayers.scores import score_with_sublayers
from support.families import token_ids


@pytest.fixture
def scores(llama: PreTrainedModel) -> LayerScores:
    return score_with_sublayers(llama, [token_ids()], name="tiny", progress=False)
