"""The table of docs/large-models.md, and a checkpoint of holes that stock classes take."""

from __future__ import annotations

import json
from pathlib import Path

import large_models
import sparse_checkpoint
import torch
from transformers import LlamaConfig

from simdiff.models.loading import load_model
from simdiff.models.streamed import StreamOptions
from simdiff.scoring.calibration_pass import score

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"


def test_the_page_holds_the_table() -> None:
    assert large_models.table() in PAGE.read_text()


def test_bytes_of_a_shape_on_paper() -> None:
    shape = large_models.Shape.of("0.5b")
    layer = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864 + 2 * 896
    assert shape.layer_bytes == 2 * layer
    assert shape.weights == 2 * (24 * layer + 151_936 * 896 + 896)
    assert shape.kept == 24 * 32 * 512 * 896 * 2
    assert shape.seconds("eval", 1e9, 1e30) == shape.weights / 1e9
    assert shape.seconds("eval", 1e30, 1e12) == 2 * 2 * 24 * layer * 32 * 512 / 1e12


def test_a_checkpoint_of_holes(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    total = sparse_checkpoint.write(tmp_path / "model", config)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    for stream in (None, StreamOptions(always=True)):
        model, _ = load_model(str(tmp_path / "model"), device="cpu", stream=stream)
        assert total == 2 * sum(parameter.numel() for parameter in model.parameters())
        assert bool(model.model.norm.weight.eq(1).all())
        scores = score(model, [torch.zeros(1, 8, dtype=torch.int64)], progress=False)
        assert scores.metrics["squared_difference"].mean == (0.0, 0.0, 0.0)
