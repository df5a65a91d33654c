"""The pure read that benchmarks take for the limit: every byte once, 16 at a time, nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from read_limit import SOURCE, VARIANTS

from ptxcheck import Gpu
from ptxcheck.compilers import find_nvcc, nvcc_ptx

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")


@pytest.mark.parametrize(("loads", "pieces"), sorted({variant[:2] for variant in VARIANTS}))
@pytest.mark.parametrize("words", [1, 63, 64, 7000])
def test_every_byte_is_read_once(loads: int, pieces: bool, words: int) -> None:
    gpu = Gpu(nvcc_ptx(SOURCE.read_text(), "sm_90"))
    (name,) = (name for name in gpu.programs if f"ILi{loads}ELb{int(pieces)}" in name)
    data = gpu.buffer(np.arange(16 * words, dtype=np.uint8), "data")
    sink = gpu.buffer(np.zeros(1, np.uint32), "sink")
    report = gpu.launch(name, 3, 64, [data, words, sink])
    assert (report.load_counts(data) == 1).all()
    assert report.load_widths(data) == {128}
    assert report.stored_bytes(sink) == 0
