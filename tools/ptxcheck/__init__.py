"""Executes compiled PTX on the CPU and reports what a kernel does wrong with memory.

    gpu = Gpu(ptx_text)
    x = gpu.buffer(hidden_states, "x", align=2)  # base address: a multiple of 2, not of 4
    y = gpu.buffer(out, "out", initialised=False)
    report = gpu.launch("kernel", grid, cta, [x, y, hidden_size], shared_bytes)  # FaultError
    assert (report.load_counts(x) == 1).all()  # each byte was loaded once
    assert report.load_widths(x) == {128}

Results land in the NumPy arrays. Arithmetic is that of the hardware where PTX defines it;
approximate instructions (`.approx`, `.full`) are computed in float64 and rounded once, and NaNs
have NumPy's bits. Threads run in lock step, the lowest program counter first, and wait at
`.sync` instructions. See `conflicts` for what orders two accesses to one byte.

Not executed, and refused by name when the kernel is bound: calls, textures, mbarriers and bulk
copies, clusters, tensor cores, carries (`add.cc`), rounding modes of arithmetic other than `rn`,
8-bit and 4-bit floats, barriers for a part of the CTA, indirect branches.
"""

from .faults import Fault, FaultError, Kind, PtxSyntaxError, UnsupportedInstruction
from .gpu import Gpu, Report
from .memory import Buffer

__all__ = [
    "Buffer",
    "Fault",
    "FaultError",
    "Gpu",
    "Kind",
    "PtxSyntaxError",
    "Report",
    "UnsupportedInstruction",
]
