"""How a program of the main kernel walks over its rows: a table by hidden size and dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch

THREADS = 128  # of a program
WARP_SIZE = 64 if torch.version.hip else 32

# element size: (hidden_size up to, tokens per tile, 16-byte vectors of each input per thread and
# step). Behind each row the registers per thread for `token_metrics`, `accumulate` and `accumulate`
# that also stores every token, the most of Triton 3.9 for sm_80 and sm_90, bfloat16 and float16,
# mask or none. Triton 3.6 needs no more than 64 either, with which half of the 2048 threads of a
# multiprocessor are resident.
#
# Bytes in flight: to read at full bandwidth a multiprocessor must wait for bandwidth * latency,
# 3.35 TB/s * 700 ns / 132 = 18 KB on an H100, 2.0 TB/s * 600 ns / 108 = 11 KB on an A100 80 GB.
# 1024 threads with one vector of each input wait for 32 KB, with two for 64 KB.
#
# Four tokens per tile give each warp a row of its own: no thread waits for another warp, and the
# ~70 float64 instructions from sums to metrics, which all threads of a row execute, cost a quarter
# of what they cost with one token. One token per tile is for rows of over 16 KB, of which a single
# warp would read one for more than 10 us, too long where tokens are too few to fill the GPU.
CONFIGURATIONS = {
    2: (
        # 576 entries are 3 steps of 256, not 2 of 512: a quarter less work.
        (1024, 4, 1),  # 46, 54, 59 registers
        (8192, 4, 2),  # 52, 56, 63
        (1 << 62, 1, 1),  # 44, 52, 55; two vectors: 66 with Triton 3.6
    ),
    4: (
        (4096, 4, 2),  # 56, 54, 64
        (1 << 62, 1, 2),  # 46, 52, 55
    ),
    8: (
        (2048, 4, 2),  # 48, 52, 58
        (1 << 62, 1, 2),  # 40, 52, 55
    ),
}
# Rows not known to start at multiples of 16 bytes are read entry by entry.
_UNALIGNED_VECTORS = 4  # 48, 55, 58


class Configuration(NamedTuple):
    """How a program walks over its rows; the product of the last three is a step's entries."""

    tokens: int
    """Tokens per tile."""
    vectors: int
    """Loads of each input that a thread issues in one step."""
    threads: int
    """Threads that share a row."""
    entries: int
    """Entries per load: 16 bytes of rows known to be aligned to them, else one."""


def configuration(hidden_size: int, element_size: int, aligned: bool) -> Configuration:
    """The table's row for states of this size, `aligned` if all rows start at 16-byte multiples."""
    rows = CONFIGURATIONS[element_size]
    tokens, vectors = next(row[1:] for row in rows if hidden_size <= row[0])
    threads = THREADS // tokens
    if aligned:
        return Configuration(tokens, vectors, threads, 16 // element_size)
    return Configuration(tokens, _UNALIGNED_VECTORS, threads, 1)


def launch_options(num_threads: int, warp_size: int = WARP_SIZE) -> dict[str, int | bool]:
    """Triton's options; fused multiply-add is the default only up to Triton 3.9."""
    return {"num_warps": num_threads // warp_size, "enable_fp_fusion": True}
