"""Rates of the machine and its load, by clocks and files whose content is known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from simdiff.speed import machine_rates as speed_rates
from simdiff.speed.ideal import Rates
from simdiff.speed.machine_rates import OtherLoad, measure_rates
from support.proc_files import Files

CPU = torch.device("cpu")


def test_rates_are_those_of_what_is_read_and_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two vectors of 10 float32 in a quarter of a second; 3 tokens of 5 entries to 7."""
    results: list[torch.Tensor] = []

    def quarter(run: Callable[[], torch.Tensor], device: torch.device) -> float:
        assert device == CPU
        results.append(run())
        return 0.25

    monkeypatch.setattr(speed_rates, "_best_seconds", quarter)
    monkeypatch.setattr(speed_rates, "_READ_BYTES", 40)
    assert measure_rates(CPU, torch.bfloat16, 3, 5, 7) == Rates(80 * 4, 2 * 3 * 5 * 7 * 4)
    dot, product = results
    assert (dot.dtype, dot.item()) == (torch.float32, 10)
    assert torch.equal(product, torch.full((3, 7), 5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        # 4.5 ms after the first call: 4 calls in 20 ms, five times; the third time is the best.
        ([9, *[0.0045] * 3, *[0.006] * 4, *[0.005] * 4, 0.001, 0.002, 0.003, 0.004, 1], 24),
        ([9, 8, 8, 8, 3, 0.0025, 2], 9),  # too slow to be called more than once at a time
    ],
)
def test_a_rate_is_the_best_of_five(
    seconds: list[float], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, now, done = list(seconds), 0.0, 0

    def run() -> None:
        nonlocal now, done
        done += 1
        now += left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(speed_rates, "time", SimpleNamespace(perf_counter=lambda: now))
    assert speed_rates._best_seconds(run, CPU) == pytest.approx(0.0025)
    assert done == calls


def test_load_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 s others and this process were busy for 16.5 s, this process for 10 s of them."""
    times = SimpleNamespace(user=4.0, system=3.0, children_user=2.0, children_system=1.0)
    clock = SimpleNamespace(monotonic=lambda: 5.0)
    files = Files(stat="cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(speed_rates, "time", clock)
    monkeypatch.setattr(speed_rates, "Path", files)
    monkeypatch.setattr(
        speed_rates, "os", SimpleNamespace(times=lambda: times, sysconf=lambda name: 100)
    )
    load = OtherLoad()
    assert load.cores() is None  # no time has passed
    clock.monotonic = lambda: 15.0
    times.user, times.system, times.children_user, times.children_system = 5.0, 5.0, 5.0, 5.0
    # user, nice, system, idle, iowait, irq, softirq, steal, and guests, who are users
    files.texts["stat"] = "cpu  1000 200 300 70000 5000 40 50 60 900 900\ncpu0 1 2 3\n"
    assert load.cores() == pytest.approx((16.5 - 10) / 10)
    times.user = 100.0
    assert load.cores() == 0
    del files.texts["stat"]
    assert load.cores() is None
    unknown = OtherLoad()
    files.texts["stat"] = "cpu  0 0 0 0 0 0 0 0 0 0\n"
    assert unknown.cores() is None
