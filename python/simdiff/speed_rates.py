"""What the machine can do: a pure read and a matrix product, measured; and who else uses it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from simdiff.speed_model import Rates

# Two buffers of this size are read together: beyond every cache, and soon done.
_READ_BYTES = 256 << 20
_REPEATS = 5
_LEAST_SECONDS = 0.02


def measure_rates(
    device: torch.device, dtype: torch.dtype, rows: int, hidden_size: int, width: int
) -> Rates:
    """Rates of reading memory and of multiplying `rows` tokens with a matrix of the model.

    Args:
        device, dtype: of the model.
        rows: tokens multiplied at once: batch·length in prefill, batch in decoding.
        hidden_size, width: of the matrix; it is reused, so that a small one stays in a cache.
    """
    return Rates(read_rate(device), matmul_rate(device, dtype, rows, hidden_size, width))


def read_rate(device: torch.device) -> float:
    """Bytes per second of a dot product of two float32 vectors that are in no cache.

    The best of a few calls: a limit is the most that was seen.
    """
    count = _READ_BYTES // 4
    first, second = (torch.ones(count, device=device) for _ in range(2))
    return 2 * _READ_BYTES / _best_seconds(lambda: torch.dot(first, second), device)


def matmul_rate(
    device: torch.device, dtype: torch.dtype, rows: int, hidden_size: int, width: int
) -> float:
    """Flops per second, 2·rows·hidden_size·width each, of a linear layer; the best of a few."""
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
    """How many cores other processes kept busy since this was made; Linux only."""

    def __init__(self) -> None:
        """Start counting."""
        self._start = self._now()

    def cores(self) -> float | None:
        """Their mean, or None where it cannot be told."""
        now = self._now()
        if self._start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else None

    def _now(self) -> tuple[float, float, float] | None:
        """Wall, busy and own seconds; user, nice, system, irq, softirq and steal are busy."""
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        ticks = [int(field) for field in fields]
        busy = sum(ticks[:3]) + sum(ticks[5:])
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), own
