"""Loads, stores and atomics."""

from __future__ import annotations

import numpy as np
import pytest

from ptxcheck import Gpu

from .programs import kernel


def test_atomics_and_constant_tables() -> None:
    body = """
    ld.param.u64 %d0, [out];
    mov.u64 %d1, table;
    and.b32 %r1, %i, 3;
    mad.wide.u32 %d2, %r1, 4, %d1;
    ld.const.f32 %r2, [%d2];
    red.global.add.f32 [%d0], %r2;
    atom.global.add.u32 %r3, [%d0+4], 1;
    atom.global.max.s32 %r4, [%d0+8], %i;
    atom.global.cas.b32 %r5, [%d0+12], 0, %i;
    atom.global.inc.u32 %r6, [%d0+16], 9;
    mad.wide.u32 %d3, %i, 4, %d0;
    st.global.u32 [%d3+32], %r3;
    """
    extra = ".const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};"
    gpu = Gpu(kernel(body, ".param .u64 out", extra=extra))
    out = np.zeros(8 + 64, np.uint32)
    gpu.launch("k", 1, 64, [gpu.buffer(out)])
    assert out[:1].view(np.float32)[0] == 160
    assert out[1:5].tolist() == [64, 63, 1, 64 % 10]
    assert sorted(out[8:].tolist()) == list(range(64))


@pytest.mark.parametrize(
    ("kind", "count"), [("u8", 2), ("b16", 4), ("f32", 2), ("b32", 8), ("u64", 2), ("b64", 4)]
)
def test_vectors_in_memory(kind: str, count: int) -> None:
    nbytes = int(kind[1:]) // 8
    letter = {1: "h", 2: "h", 4: "r", 8: "d"}[nbytes]
    names = ", ".join(f"%{letter}{i + 4}" for i in range(count))
    body = f"""
    ld.param.u64 %d0, [x];
    ld.param.u64 %d1, [out];
    mul.wide.u32 %d2, %i, {nbytes * count};
    add.s64 %d0, %d0, %d2;
    add.s64 %d1, %d1, %d2;
    ld.global.nc.L1::no_allocate.L2::128B.v{count}.{kind} {{{names}}}, [%d0];
    st.global.cs.v{count}.{kind} [%d1], {{{names}}};
    """
    x = np.random.default_rng(0).integers(0, 256, 96 * nbytes * count).astype(np.uint8)
    out = np.zeros_like(x)
    gpu = Gpu(kernel(body, ".param .u64 x, .param .u64 out"))
    source, target = gpu.buffer(x), gpu.buffer(out, initialised=False)
    report = gpu.launch("k", 1, 96, [source, target])
    np.testing.assert_array_equal(out, x)
    assert report.load_widths(source) == report.store_widths(target) == {8 * nbytes * count}
