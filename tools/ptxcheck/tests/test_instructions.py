"""Comparisons, predicates and special registers; what is not known is refused by name."""

from __future__ import annotations

import numpy as np
import pytest

from ptxcheck import Gpu, Kind, PtxSyntaxError, UnsupportedInstruction

from .programs import evaluate, integers, kernel, reals


@pytest.mark.parametrize(
    "name", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "geu", "num", "nan"]
)
def test_comparisons(name: str) -> None:
    x, y = reals(np.float32), reals(np.float32, 1)
    y[::3] = x[::3]
    unordered = np.isnan(x) | np.isnan(y)
    plain = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    if name in plain:
        truth = plain[name] & ~unordered
    else:
        truth = {"num": ~unordered, "nan": unordered}.get(name)
        if truth is None:
            truth = plain[name[:-1]] | unordered
    line = f"setp.{name}.f32 %p1|%p2, %x, %y;\nselp.b32 %o, 1, 2, %p1;\n@%p2 add.u32 %o, %o, 4;"
    np.testing.assert_array_equal(evaluate(line, np.uint32, x, y), np.where(truth, 1, 6))


def test_predicates_and_guards() -> None:
    a, b = integers(np.int32), integers(np.int32, 1)
    line = """
    setp.gt.s32 %p1, %x, 5;
    setp.lo.and.u32 %p2, %x, %y, !%p1;
    xor.pred %p3, %p1, %p2;
    not.pred %p4, %p3;
    mov.b32 %o, 0;
    @%p2 mov.b32 %o, 1;
    @!%p3 or.b32 %o, %o, 2;
    @%p4 or.b32 %o, %o, 4;
    """
    first = a > 5
    second = (a.view(np.uint32) < b.view(np.uint32)) & ~first
    third = first ^ second
    expected = second * 1 | ~third * 6
    np.testing.assert_array_equal(evaluate(line, np.int32, a, b), expected)


def test_packing_scopes_and_constants() -> None:
    x = integers(np.uint64)
    line = """
    mov.b64 {%r1, %r2}, %x;
    mov.b64 {_, %r3}, %x;
    { .reg .b16 low, high; mov.b32 {low, high}, %r1; mov.b32 %r4, {high, low}; }
    { .reg .b32 low; add.u32 low, %r2, 0xFFFFFFFF; sub.u32 %r5, low, %r3; }
    add.u32 %r4, %r4, %r5;
    mov.b64 %o, {%r4, %r2};
    """
    words = x.view(np.uint32).reshape(-1, 2)
    low = (words[:, 0] >> np.uint32(16) | words[:, 0] << np.uint32(16)) - np.uint32(1)
    expected = words[:, 1].astype(np.uint64) << np.uint64(32) | low
    np.testing.assert_array_equal(evaluate(line, np.uint64, x), expected)
    constant = "mov.f64 %o, 0d3FF8000000000000;"
    np.testing.assert_array_equal(evaluate(constant, np.float64, x), 1.5)
    np.testing.assert_array_equal(evaluate("mov.f32 %o, 0fBF800000;", np.float32, x), -1.0)


def test_special_registers_of_three_dimensions() -> None:
    body = """
    ld.param.u64 %d0, [out];
    mov.u32 %r1, %tid.x; mov.u32 %r2, %tid.y; mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    mov.u32 %r5, %ctaid.x; mov.u32 %r6, %ctaid.y; mov.u32 %r7, %nctaid.x;
    mad.lo.s32 %r8, %r6, %r7, %r5;
    mad.lo.s32 %r9, %r8, 32, %r4;
    mad.wide.u32 %d1, %r9, 4, %d0;
    mov.u32 %r10, %laneid; mov.u32 %r11, %lanemask_lt;
    popc.b32 %r12, %r11;
    setp.ne.u32 %p1, %r10, %r12;
    @%p1 trap;
    st.global.u32 [%d1], %r9;
    """
    gpu = Gpu(kernel(body, ".param .u64 out"), max_threads=64)
    out = np.zeros(6 * 32, np.uint32)
    report = gpu.launch("k", (3, 2), (8, 4), [gpu.buffer(out, initialised=False)])
    np.testing.assert_array_equal(out, np.arange(192))
    assert report.faults == []


@pytest.mark.parametrize(
    "line",
    [
        "tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [x, {%r5, %r6}];",
        "add.rz.f32 %r1, %r2, %r3;",
        "frobnicate.b32 %r1, %r2;",
        "mov.u32 %r1, %smid;",
        "ld.global.v2.f32 %r1, [%d1];",
        "add.u64 %r1, %d1, %d2;",
        "call.uni helper;",
    ],
)
def test_unknown_instructions_fail_by_name(line: str) -> None:
    with pytest.raises(UnsupportedInstruction, match=line.split(" ")[0].replace(".", r"\.")):
        Gpu(kernel(line, ".param .u64 out"))


def test_endless_loops_and_wrong_arguments() -> None:
    gpu = Gpu(kernel("AGAIN: bra AGAIN;", ".param .u32 n"), max_steps=100)
    assert gpu.launch("k", 1, 32, [1], check=False).kinds() == {Kind.HANG}
    with pytest.raises(ValueError, match="takes 1 arguments"):
        gpu.launch("k", 1, 32, [1, 2])
    with pytest.raises(ValueError, match="does not fit"):
        gpu.launch("k", 1, 32, [1 << 32])
    with pytest.raises(PtxSyntaxError):
        Gpu(".visible .entry k() { ret }")
