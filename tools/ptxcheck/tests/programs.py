"""Kernels of a few instructions, and operands of every size."""

from __future__ import annotations

import math

import numpy as np

from ptxcheck import Gpu

WIDTHS = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


COUNT = 320  # ten warps


def kernel(body: str, params: str, registers: str = "", extra: str = "") -> str:
    """A kernel `k` around a body that has `%i`, the thread number, and typed scratch registers."""
    return f"""
.version 8.0
.target sm_90
.address_size 64
{extra}
.visible .entry k({params})
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<16>;
    .reg .b64 %d<16>;
    .reg .b32 %i;
    {registers}
    mov.u32 %i, %tid.x;
    {body}
    ret;
}}
"""


def evaluate(line: str, out: type, *inputs: np.ndarray) -> np.ndarray:
    """Run one instruction per thread; its operands are %x, %y, %z and its result is %o."""
    arrays = [np.ascontiguousarray(array) for array in inputs]
    result = np.zeros(arrays[0].size, out)
    registers, body = "", ""
    for i, (name, array) in enumerate(zip("xyzo", [*arrays, result][: len(arrays)], strict=False)):
        size = array.dtype.itemsize
        registers += f".reg .{WIDTHS[size]} %{name};\n"
        body += f"ld.param.u64 %d0, [a{i}];\nmad.wide.u32 %d1, %i, {size}, %d0;\n"
        body += f"ld.global.b{8 * size} %{name}, [%d1];\n"
    size = result.dtype.itemsize
    registers += f".reg .{WIDTHS[size]} %o;\n"
    body += f"{line}\nld.param.u64 %d0, [out];\nmad.wide.u32 %d1, %i, {size}, %d0;\n"
    body += f"st.global.b{8 * size} [%d1], %o;\n"
    names = [*(f"a{i}" for i in range(len(arrays))), "out"]
    gpu = Gpu(kernel(body, ", ".join(f".param .u64 {name}" for name in names), registers))
    buffers = [gpu.buffer(array) for array in (*arrays, result)]
    gpu.launch("k", 1, result.size, buffers)
    return result


def integers(dtype: type, seed: int = 0) -> np.ndarray:
    """Random integers of all magnitudes and the edges of the type."""
    rng = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    bits = rng.integers(0, 1 << 62, COUNT, np.uint64) * np.uint64(4) + np.uint64(3)
    values = (bits >> rng.integers(0, 64, COUNT, np.uint64)).astype(dtype)
    edges = np.array([info.min, info.max, 0, 1, info.max - 1], dtype)
    values[:: COUNT // 5] = np.roll(edges, seed)
    return values


def reals(dtype: type, seed: int = 0, scale: float = 8.0) -> np.ndarray:
    """Random floats of many magnitudes, zeros, infinities and NaN."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(COUNT) * np.exp2(rng.uniform(-scale, scale, COUNT))
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    values[:: COUNT // 5] = np.roll(special, seed)
    return values.astype(dtype)


def wrap(values: list[int], dtype: type) -> np.ndarray:
    """Exact integers to the low bits of a type."""
    bits = 8 * np.dtype(dtype).itemsize
    unsigned = np.dtype(f"u{bits // 8}")
    return np.array([value % (1 << bits) for value in values], unsigned).view(dtype)


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, one value at a time."""
    out = []
    for value in values.astype(np.float64):
        if math.isnan(value):
            out.append(0x7FFF)
            continue
        with np.errstate(over="ignore"):
            down = int(np.float32(abs(value)).view(np.uint32)) >> 16
        down -= down > 0  # the conversion to float32 may have rounded up
        neighbours = range(down, min(down + 3, 0x7F80) + 1)
        exact = [float(np.array(n << 16, np.uint32).view(np.float32)) for n in neighbours]
        exact = [2.0**128 if math.isinf(v) and not math.isinf(value) else v for v in exact]
        errors = [abs(v - abs(value)) if v != abs(value) else 0.0 for v in exact]
        best = min(zip(errors, (n & 1 for n in neighbours), neighbours, strict=True))[2]
        out.append(best | (0x8000 if math.copysign(1, value) < 0 else 0))
    return np.array(out, np.uint16)
