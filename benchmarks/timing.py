"""Seconds of a call on buffers that are in no cache, on the CPU and on a GPU."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import read_limit
import torch
from torch import Tensor

from simdiff.io.machine import available_memory

Pair = tuple[Tensor, Tensor]
PROCESSORS = Path("/sys/devices/system/cpu")
# Where the system does not tell: as much as the last caches of two chiplets of a server.
UNKNOWN_CACHE_BYTES = 64 << 20
# Bytes read between two uses of a pair, in caches: which line a cache gives up is not known.
CACHES_BETWEEN = 4


def cache_bytes(device: str) -> int:
    """What a pass must exceed so that nothing is found in the last cache."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    else:
        usable = set(range(os.cpu_count() or 1))
    return last_caches(PROCESSORS, usable) or UNKNOWN_CACHE_BYTES


def last_caches(processors: Path, usable: Collection[int]) -> int | None:
    """Bytes of all caches of the last level that the processors can fill; None: not told.

    `processors` is laid out as Linux does it, with `cpuN/cache/indexM/{level,type,size,
    shared_cpu_list}`. A cache that several share counts once.
    """
    found: dict[tuple[int, str], int] = {}
    for number in usable:
        levels: dict[int, tuple[str, int]] = {}
        for folder in (processors / f"cpu{number}" / "cache").glob("index*"):
            try:
                level, kind, size, shared = (
                    (folder / name).read_text().strip()
                    for name in ("level", "type", "size", "shared_cpu_list")
                )
                if kind != "Instruction":
                    levels[int(level)] = shared, _bytes(size)
            except (OSError, ValueError, KeyError):
                continue  # virtual machines leave some of them out
        if levels:
            last = max(levels)
            shared, size_of_last = levels[last]
            found[last, shared] = size_of_last
    return sum(found.values()) or None


def _bytes(size: str) -> int:
    """Of `32768K`."""
    return int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]]


def cold_pairs(make: Callable[[int], Pair], pair_bytes: int, device: str) -> list[Pair]:
    """Enough pairs of tensors that using one after the other finds none of them in the cache.

    Between two uses of a pair the others are read, `CACHES_BETWEEN` times the cache or more; 512
    pairs at most: what is smaller than a 128th of the cache is read from it.

    Raises:
        MemoryError: on a CPU, that would be more than half of what memory is free.
    """
    count = min(512, 1 + max(1, -(-CACHES_BETWEEN * cache_bytes(device) // pair_bytes)))
    free = available_memory(torch.device("cpu")) if device == "cpu" else None
    if free is not None and count * pair_bytes > free // 2:
        raise MemoryError(
            f"{count} pairs of {pair_bytes >> 20} MiB are read in turn so that none is in a cache "
            f"of {cache_bytes(device) >> 20} MiB: more than half of the {free >> 20} MiB free"
        )
    return [make(seed) for seed in range(count)]


def device_seconds(
    run: Callable[[Tensor, Tensor], object], pairs: Sequence[Pair], device: str, repeats: int = 7
) -> float:
    """Seconds of one call, the median over repeats of the mean over all pairs in turn.

    On a GPU the calls are recorded in one graph, which is replayed: the device's own time, launches
    included, without the host's. `run` must not wait for the device.
    """
    for pair in pairs[:2]:
        run(*pair)
    rounds = max(1, 16 // len(pairs)) if device == "cuda" else 1
    calls = [pair for _ in range(rounds) for pair in pairs]

    def all_calls() -> None:
        for pair in calls:
            run(*pair)

    measure = _replayed(all_calls) if device == "cuda" else (lambda: _once_on_cpu(all_calls))
    return statistics.median(measure() for _ in range(repeats)) / len(calls)


def _replayed(run: Callable[[], object]) -> Callable[[], float]:
    """Seconds of a replay of all that `run` launches."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Compilers keep threads, whose calls must not break the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    graph.replay()

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return measure


def host_seconds(
    run: Callable[[Tensor, Tensor], object], pair: Pair, device: str, calls: int = 100
) -> float:
    """Seconds that a call keeps the host, from many of them without waiting for the device."""
    run(*pair)
    times = []
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run(*pair)
        times.append((time.perf_counter() - start) / calls)
    if device == "cuda":
        torch.cuda.synchronize()
    return statistics.median(times)


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: str, repeats: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call in every round, one after the other: what drifts, drifts for all.

    A turn is `calls` calls in a row, of which the mean counts.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}

    def turn(run: Callable[[], object]) -> None:
        for _ in range(calls):
            run()

    once = _once_on_gpu if device == "cuda" else _once_on_cpu
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(once(lambda run=run: turn(run)) / calls)
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


def finished(run: Callable[[], object], device: str) -> Callable[[], None]:
    """The same, and then wait until the device has done it, for a timer that knows no device."""

    def wait() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return wait


def pure_read(pairs: Sequence[Pair], device: str) -> tuple[str, float]:
    """The fastest way to read all bytes of a pair, and its seconds: the memory's limit."""
    times = {
        name: device_seconds(read, pairs, device) for name, read in read_limit.reads(device).items()
    }
    fastest = min(times, key=times.__getitem__)
    return fastest, times[fastest]


def limit_of(pairs: Sequence[Pair], device: str) -> Callable[[Tensor, Tensor], object]:
    """The fastest way to read a pair."""
    ways = read_limit.reads(device)
    return ways[pure_read(pairs, device)[0] if len(ways) > 1 else next(iter(ways))]


def copy_seconds(pairs: Sequence[Pair], device: str) -> float:
    """Of a copy of the first tensor of a pair over the second: as many bytes, half are written."""
    return device_seconds(lambda x, y: y.copy_(x), pairs, device)
