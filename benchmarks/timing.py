"""Seconds of a call on buffers that are in no cache, on the CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

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


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: str, repeats: int
) -> dict[str, list[float]]:
    """Seconds of every call in every round, one after the other: what drifts, drifts for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_once_on_gpu(run) if device == "cuda" else _once_on_cpu(run))
    return times


def _once_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _once_on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)  # about 1 ms, in which the host gets ahead
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def read_or_copy(pair: Pair, device: str) -> Callable[[], object]:
    """The memory's limit for this pair: a pure read of all its bytes, on a GPU a copy of as many.

    The read goes through both tensors side by side, which is faster here than one after the other.
    """
    if device == "cuda":
        target = torch.empty_like(pair[0])
        return lambda: target.copy_(pair[0])
    from simdiff_kernels import _C

    (x, y), size = pair, pair[0].nbytes
    return lambda: _C.read_memory(x.data_ptr(), y.data_ptr(), size)


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
