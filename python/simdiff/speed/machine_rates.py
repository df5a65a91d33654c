"""Measure the machine's rates (a pure read, a matrix product) and the load of other processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from simdiff.speed.ideal import Rates

# Size of each of the two buffers that are read together: larger than any cache, but soon read.
_READ_BYTES = 256 << 20
_REPEATS = 5
_LEAST_SECONDS = 0.02


def measure_rates(
    device: torch.device, dtype: torch.dtype, rows: int, hidden_size: int, width: int
) -> Rates:
    """Measure the rates of reading memory and of multiplying `rows` tokens with a matrix.

    Args:
        device, dtype: device and dtype of the model.
        rows: number of tokens multiplied at once: batch·length in prefill, batch in decoding.
        hidden_size, width: shape of the matrix; it is reused, so a small one stays in a cache.
    """
    return Rates(read_rate(device), matmul_rate(device, dtype, rows, hidden_size, width))


def read_rate(device: torch.device) -> float:
    """Bytes per second of a dot product of two float32 vectors that are in no cache.

    The best of a few calls counts, since the rate is an upper limit.
    """
    count = _READ_BYTES // 4
    first, second = (torch.ones(count, device=device) for _ in range(2))
    return 2 * _READ_BYTES / _best_seconds(lambda: torch.dot(first, second), device)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, rows: int, hidden_size: int, width: int
) -> float:
    """Flops per second of a linear layer with 2·rows·hidden_size·width flops; best of a few."""
    tokens = torch.ones(rows, hidden_size, device=device, dtype=dtype)
    weight = torch.ones(width, hidden_size, device=device, dtype=dtype)

    def run() -> object:
        return torch.nn.functional.linear(tokens, weight)

    return 2.0 * rows * hidden_size * width / _best_seconds(run, device)


@torch.inference_mode()
def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    def seconds(calls: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        _wait(device)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = max(1, int(_LEAST_SECONDS / seconds(3)))
    return min(seconds(calls) for _ in range(_REPEATS))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OtherLoad:
    """Measures how many cores other processes kept busy since its creation; Linux only."""

    def __init__(self) -> None:
        """Start counting."""
        self._start = self._now()

    def cores(self) -> float | None:
        """Mean number of cores that other processes kept busy; None if it is unknown."""
        now = self._now()
        if self._start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else None

    def _now(self) -> tuple[float, float, float] | None:
        """Seconds of wall time, of busy time of all processes (user, nice, system, irq, softirq,
        steal) and of this process."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(field) for field in fields]
        busy = sum(ticks[:3]) + sum(ticks[5:])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own
