"""What threads of a warp and of a CTA do together."""

from __future__ import annotations

import numpy as np
import pytest

from ptxcheck import Gpu

from .programs import COUNT, evaluate, integers, kernel


@pytest.mark.parametrize(
    ("mode", "operand", "clamp", "source"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("down", 7, 31, lambda lane: np.where(lane + 7 < 32, lane + 7, lane)),
        ("up", 3, 0, lambda lane: np.where(lane >= 3, lane - 3, lane)),
        ("idx", 9, 31, lambda lane: 0 * lane + 9),
        ("bfly", 4, 0x181F, lambda lane: lane ^ 4),
        ("down", 2, 0x181F, lambda lane: np.where(lane % 8 < 6, lane + 2, lane)),
    ],
)
def test_shuffles(mode: str, operand: int, clamp: int, source) -> None:
    x = integers(np.uint32)
    lane = np.arange(COUNT) % 32
    chosen = x[np.arange(COUNT) - lane + source(lane)]
    result = evaluate(f"shfl.sync.{mode}.b32 %o, %x, {operand}, {clamp}, -1;", np.uint32, x)
    np.testing.assert_array_equal(result, chosen)


def test_votes_and_warp_reductions() -> None:
    x = integers(np.uint32)
    warps = x.reshape(-1, 32)
    big = warps > 1000
    ballot = (big.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).repeat(32)
    line = "setp.gt.u32 %p1, %x, 1000;\nvote.sync.ballot.b32 %o, %p1, -1;"
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), ballot)
    line = "setp.gt.u32 %p1, %x, 1000;\nvote.sync.any.pred %p2, %p1, -1;\nselp.b32 %o, 1, 0, %p2;"
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), big.any(1).repeat(32))
    reduced = np.add.reduce(warps, axis=1, dtype=np.uint32).repeat(32)
    np.testing.assert_array_equal(evaluate("redux.sync.add.u32 %o, %x, -1;", np.uint32, x), reduced)
    signed = warps.view(np.int32).min(1).repeat(32)
    np.testing.assert_array_equal(evaluate("redux.sync.min.s32 %o, %x, -1;", np.int32, x), signed)


def test_matrices_from_shared_memory() -> None:
    """Rows of four matrices in the reverse order: the address of each comes from a lane of its own.

    Thread 4 * r + c of a warp receives entries 2 * c and 2 * c + 1 of row r.
    """
    x = integers(np.uint32)[:32]
    shared = ".shared .align 16 .b8 rows[1024];"
    line = f"""
    {{ {shared}
    mov.u32 %r0, rows;
    mad.lo.u32 %r1, %i, 16, %r0;
    st.shared.v4.b32 [%r1], {{%x, %i, %x, %i}};
    bar.warp.sync -1;
    sub.u32 %r2, 31, %i;
    mad.lo.u32 %r2, %r2, 16, %r0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2];
    mad.lo.u32 %r3, %r4, 3, %r3;
    mad.lo.u32 %r3, %r5, 5, %r3;
    mad.lo.u32 %o, %r6, 7, %r3; }}
    """
    lane = np.arange(32)
    total = np.zeros(32, np.uint32)
    for matrix, factor in enumerate((1, 3, 5, 7)):
        row = 31 - (8 * matrix + lane // 4)
        entries = np.where(lane % 2 == 0, x[row], row.astype(np.uint32))
        total += np.uint32(factor) * entries
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), total)


def test_shuffle_among_a_part_of_the_warp_and_divergent_loops() -> None:
    line = """
    and.b32 %r1, %i, 31;
    mov.b32 %o, 0;
    setp.ge.u32 %p1, %r1, 16;
    @%p1 bra HIGH;
    shfl.sync.bfly.b32 %o, %x, 1, 31, 0xFFFF;
    bra.uni JOIN;
HIGH:
    add.u32 %o, %o, %x;
    add.u32 %r1, %r1, -1;
    setp.ge.u32 %p2, %r1, 16;
    @%p2 bra HIGH;
JOIN:
    activemask.b32 %r2;
    add.u32 %o, %o, %r2;
    """
    x = integers(np.uint32)
    thread = np.arange(COUNT)
    lane = thread % 32
    looped = x * (lane - 15).astype(np.uint32)
    expected = np.where(lane < 16, x[thread ^ 1], looped) - np.uint32(1)
    np.testing.assert_array_equal(evaluate(line, np.uint32, x), expected)


def test_cta_wide_reductions_at_a_barrier() -> None:
    body = """
    ld.param.u64 %d0, [out];
    setp.lt.u32 %p1, %i, 70;
    bar.red.popc.u32 %r1, 0, %p1;
    barrier.cta.red.or.aligned.pred %p2, 0, !%p1;
    selp.b32 %r2, 1000, 0, %p2;
    add.u32 %r1, %r1, %r2;
    mad.wide.u32 %d1, %i, 4, %d0;
    st.global.u32 [%d1], %r1;
    """
    gpu = Gpu(kernel(body, ".param .u64 out"))
    out = np.zeros(128, np.uint32)
    gpu.launch("k", 1, 128, [gpu.buffer(out)])
    np.testing.assert_array_equal(out, 1070)
