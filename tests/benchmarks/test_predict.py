"""Predictions for GPUs that nobody ran, by bytes and by rates."""

from __future__ import annotations

import gpu_page
import predict
import pytest


def test_predictions_are_by_bytes_and_by_rates() -> None:
    reached = predict.Reached.of(gpu_page.measured())
    # LLaMA-3.1-8B: 218 M parameters a layer, two flops each, and attention over 1024 positions.
    flops = predict.MODEL.layer_flops(2048)
    assert flops == pytest.approx(2 * 218.1e6 + 4 * 1024 * 4096, rel=1e-3)
    assert reached.peak == pytest.approx(32 * 16384 * flops / 0.46747 / 989e12, rel=1e-4)
    h100, b300 = predict.GPUS[2], predict.GPUS[4]
    found = predict.predict(h100, reached)
    # 16384 tokens of 2 x 4096 bfloat16 entries: 268 MB at 3.35 TB/s.
    assert found.read == pytest.approx(80.1e-6 / reached.read, rel=1e-2)
    assert found.seconds == pytest.approx(found.read / reached.kernel)
    assert {predict.predict(gpu, reached).binds for gpu in predict.GPUS} == {"memory"}
    # 32 pairs of entries to 4 vectors: 8 instructions of a unit that gives two results a clock.
    seconds = predict.floors(b300, predict.ROW_SUMS, 32e6)["float64"]
    assert seconds == pytest.approx(8e6 / 2 / (148 * 1.965e9))
    # Float64 for every entry: 5 operations and 2 conversions for a pair.
    seconds = predict.floors(b300, predict.FLOAT64, 1e6)["float64"]
    assert seconds == pytest.approx(7e6 / 2 / (148 * 1.965e9))
