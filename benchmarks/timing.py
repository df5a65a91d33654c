"""Seconds of a call on buffers that are in no cache, on the CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def cache_bytes(device: str) -> int:
    """What a pass must exceed so that nothing is found in the last cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    return 64 << 20


def cold_pairs(make: Callable[[int], Pair], pair_bytes: int, device: str) -> list[Pair]:
    """Enough pairs of tensors that using one after the other finds none of them in the cache."""
    count = max(2, -(-4 * cache_bytes(device) // pair_bytes))
    return [make(seed) for seed in range(min(count, 256))]


def seconds_per_call(
    run: Callable[[Tensor, Tensor], object],
    pairs: Sequence[Pair],
    device: str,
    *,
    repeats: int = 9,
    calls: int | None = None,
) -> list[float]:
    """One figure per repeat, each the mean over calls on all pairs in turn.

    On a GPU the stream is first kept busy, so that all calls are queued before the first one runs:
    the device's own time, launches included, without the host's.
    """
    calls = calls or len(pairs)
    for pair in pairs[:2]:
        run(*pair)
    measure = _on_gpu if device == "cuda" else _on_cpu
    return [measure(run, pairs, calls) for _ in range(repeats)]


def _on_cpu(run: Callable[[Tensor, Tensor], object], pairs: Sequence[Pair], calls: int) -> float:
    start = time.perf_counter()
    for index in range(calls):
        run(*pairs[index % len(pairs)])
    return (time.perf_counter() - start) / calls


def _on_gpu(run: Callable[[Tensor, Tensor], object], pairs: Sequence[Pair], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # clock cycles, about 10 ms
    start.record()
    for index in range(calls):
        run(*pairs[index % len(pairs)])
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def copy_seconds(pairs: Sequence[Pair], device: str, repeats: int = 9) -> float:
    """Of a copy of one tensor of a pair, which reads and writes as much as a pair holds."""
    target = torch.empty_like(pairs[0][0])
    return statistics.median(
        seconds_per_call(lambda x, _: target.copy_(x), pairs, device, repeats=repeats)
    )
