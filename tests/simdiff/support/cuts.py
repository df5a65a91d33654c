"""Losses of models cut for real, and a journal of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from simdiff.evaluation.journal import EvaluationJournal, evaluation_key
from simdiff.evaluation.losses import window_losses
from simdiff.planning.bypass import BypassEvaluator
from simdiff.surgery.layers import layers_removed


def really_cut(model: PreTrainedModel, windows: torch.Tensor, removed: frozenset) -> list[float]:
    if not removed:
        return window_losses(model, windows, description=None)
    with layers_removed(model, removed):
        return window_losses(model, windows, description=None)


def journal(
    model: PreTrainedModel, windows: torch.Tensor, path: Path | None = None
) -> tuple[BypassEvaluator, EvaluationJournal]:
    evaluator = BypassEvaluator(model, windows)
    key = evaluation_key(model, windows, {"source": "random", "seed": 2})
    return evaluator, EvaluationJournal(key, path, evaluator.losses)
