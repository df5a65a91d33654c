"""A tiny model on the disk, whole and streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from simdiff.models.loaded import check_loaded
from simdiff.models.loading import load_config, stock_model, streamed_stock
from simdiff.models.streamed import StreamOptions
from simdiff.scoring.calibration_pass import score
from support.families import tiny

PADDED = torch.tensor([[0, 0, 5, 9, 11, 4, 8], [3, 7, 12, 40, 80, 96, 13]])


def stored(family: str, directory: Path) -> Path:
    """A model of a family of `support.families`, saved as stock transformers does."""
    tiny(family).save_pretrained(directory)
    return directory


def whole(directory: Path, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    return stock_model(directory, load_config(directory), dtype=dtype, device=device)[0].eval()


def streamed(
    directory: Path, dtype: str = "auto", device: str = "cpu", **options: Any
) -> PreTrainedModel:
    config, what = load_config(directory), "the model"
    chosen = StreamOptions(**options)
    model, loading = streamed_stock(str(directory), config, what, dtype, device, chosen)
    check_loaded(model, loading, what)
    return model.eval()


def batches() -> list[Any]:
    """Three batches of other shapes, one of them padded on the left."""
    ids = torch.randint(3, 97, (3, 10), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": PADDED, "attention_mask": (PADDED > 0).long()}, ids, ids[:1, :5]]


def scored(model: PreTrainedModel) -> dict[str, Any]:
    """All numbers of the scores of `batches`, without the time.

    Of the digests of weights a streamed model has that of its files alone, and only `load_model`
    tells it those (tests of `simdiff.models.weights`).
    """
    content = score(model, batches(), progress=False).to_dict()
    del content["created"], content["model"]["weights"]
    return content
