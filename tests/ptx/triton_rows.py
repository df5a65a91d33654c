"""Compiles a Triton row reduction for several targets and prints the PTX as JSON."""

from __future__ import annotations

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def row_sums(p_x, p_out, hidden, stride, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # noqa: N803
    """Per row the sum of squares and the largest magnitude."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, hidden, BLOCK, num_stages=STAGES):
        o = start + tl.arange(0, BLOCK)
        x = tl.load(p_x + row * stride + o, mask=o < hidden, other=0.0)
        total += x.to(tl.float64) * x.to(tl.float64)
        peak = tl.maximum(peak, tl.abs(x.to(tl.float32)))
    tl.store(p_out + row * 2, tl.sum(total, axis=0))
    tl.store(p_out + row * 2 + 1, tl.max(peak, axis=0).to(tl.float64))


def compile_row_sums(arch: int, element: str, aligned: bool, stages: int) -> dict[str, object]:
    """PTX and shared bytes of one variant."""
    signature = {
        "p_x": f"*{element}",
        "p_out": "*fp64",
        "hidden": "i32",
        "stride": "i64",
        "BLOCK": "constexpr",
        "STAGES": "constexpr",
    }
    divisible = [["tt.divisibility", 16]]
    attributes = {(i,): divisible for i in (0, 1, 2, 3)} if aligned else {}
    source = ASTSource(row_sums, signature, {(4,): 512, (5,): stages}, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    return {"ptx": compiled.asm["ptx"], "shared": compiled.metadata.shared}


if __name__ == "__main__":
    variants = [
        (int(arch), element, aligned == "aligned", int(stages))
        for arch, element, aligned, stages in (arg.split(":") for arg in sys.argv[1:])
    ]
    print(json.dumps([compile_row_sums(*variant) for variant in variants]))
