"""Timing on a clock that only calls move: caches, turns, cold pairs, the limit, events of a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timing
import torch


def cache(folder: Path, level: int, kind: str, size: str, shared: str) -> None:
    folder.mkdir(parents=True)
    for name, value in (
        ("level", str(level)),
        ("type", kind),
        ("size", size),
        ("shared_cpu_list", shared),
    ):
        (folder / name).write_text(f"{value}\n")


def test_the_last_caches_are_read_from_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chiplets of two processors; of the last four only the caches of the usable ones count."""
    for number, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        caches = tmp_path / f"cpu{number}" / "cache"
        cache(caches / "index0", 1, "Data", "32K", str(number))
        cache(caches / "index2", 2, "Unified", "1M", str(number))
        cache(caches / "index3", 3, "Unified", "307200K", shared)
        cache(caches / "index4", 4, "Instruction", "2G", shared)
    cache(tmp_path / "cpu4" / "cache" / "index2", 2, "Unified", "512K", "4")
    (tmp_path / "cpu4" / "cache" / "index2" / "size").unlink()
    assert timing.last_caches(tmp_path, {0, 1}) == 300 << 20
    assert timing.last_caches(tmp_path, {1, 2}) == 600 << 20
    assert timing.last_caches(tmp_path, {0, 4}) == 300 << 20
    assert timing.last_caches(tmp_path, {4}) is None
    assert timing.last_caches(tmp_path / "none", {0}) is None
    monkeypatch.setattr(timing, "PROCESSORS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 3}, raising=False)
    assert timing.cache_bytes("cpu") == 300 << 20
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert timing.cache_bytes("cpu") == 600 << 20
    monkeypatch.setattr(timing, "PROCESSORS", tmp_path / "none")
    assert timing.cache_bytes("cpu") == timing.UNKNOWN_CACHE_BYTES


@pytest.mark.parametrize("cache_mib", [32, 64, 300, 1152])
def test_no_pair_is_in_the_cache_when_it_is_read_again(
    cache_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its uses the others are read: four times the cache, at most one of them in excess."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: cache_mib << 20)
    monkeypatch.setattr(timing, "available_memory", lambda device: 64 << 30)
    size = 256 << 20
    pairs = timing.cold_pairs(lambda seed: (seed, seed), size, "cpu")
    assert [first for first, _ in pairs] == [*range(len(pairs))]
    others = (len(pairs) - 1) * size
    assert others >= 4 * cache_mib << 20
    assert others - size < 4 * cache_mib << 20
    monkeypatch.setattr(timing, "available_memory", lambda device: 2 * len(pairs) * size - 1)
    told = f"{len(pairs)} pairs of 256 MiB .* cache of {cache_mib} MiB: more than half of the "
    with pytest.raises(MemoryError, match=f"{told}{2 * len(pairs) * 256 - 1} MiB free$"):
        timing.cold_pairs(lambda seed: (seed, seed), size, "cpu")


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, *seconds: float) -> Callable[..., None]:
        """A call that takes so long at first, then, ...; the last goes on."""
        left = list(seconds)

        def call(*_: object) -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_interleaved_times_are_those_of_each_call(clock: Clock) -> None:
    """The first call of each warms up; the machine gets slower, which drifts for all alike."""
    runs = {"ours": clock.taking(50, 1, 2, 4), "eager": clock.taking(90, 3, 6, 12)}
    assert timing.interleaved(runs, "cpu", 3) == {"ours": [1, 2, 4], "eager": [3, 6, 12]}
    assert clock.now == 140 + 7 + 21


def test_a_turn_of_several_calls_gives_their_mean(clock: Clock) -> None:
    runs = {"ours": clock.taking(50, 1, 2, 6, 2, 2, 8)}
    assert timing.interleaved(runs, "cpu", 2, calls=3) == {"ours": [3, 4]}


def test_rounds_take_turns(clock: Clock) -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timing.interleaved(runs, "cpu", 2)
    assert "".join(calls) == "ab" + "abab"


def test_seconds_of_a_call_on_cold_pairs(clock: Clock) -> None:
    """Two calls warm up, each repeat runs all three pairs: means 2, 4, 30, and their median."""
    pair = (torch.ones(1), torch.ones(1))
    run = clock.taking(100, 100, 1, 2, 3, 4, 4, 4, 10, 20, 60)
    assert timing.device_seconds(run, [pair] * 3, "cpu", repeats=3) == 4
    run = clock.taking(100, 2, 2, 5, 5, 3, 3)
    assert timing.host_seconds(run, pair, "cpu", calls=2) == 3


def test_the_limit_is_the_fastest_read(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (torch.ones(1), torch.zeros(1))
    reads = {"slow": clock.taking(8.0), "fast": clock.taking(2.0), "late": clock.taking(5.0)}

    def ways(device: str) -> dict[str, Callable[..., None]]:
        assert device == "cpu"
        return reads

    monkeypatch.setattr(timing.read_limit, "reads", ways)
    assert timing.pure_read([pair, pair], "cpu") == ("fast", 2)
    assert timing.limit_of([pair, pair], "cpu") is reads["fast"]
    del reads["slow"], reads["late"]
    before = clock.now
    assert timing.limit_of([pair], "cpu") is reads["fast"]
    assert clock.now == before  # the only one needs no time
    assert timing.copy_seconds([pair], "cpu") == 0
    assert pair[1].item() == 1


class Gpu:
    """A device whose time goes on in what it waits for and in what it is given to do."""

    def __init__(self, clock: Clock, *replays: float) -> None:
        self.clock, self.graphs, self.waits = clock, 0, 0
        self.work = clock.taking(*replays)

    def synchronize(self) -> None:
        self.waits += 1
        self.clock.now += 1000

    def _sleep(self, cycles: int) -> None:
        self.clock.now += 100

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.clock.now)
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event

    def CUDAGraph(self) -> Any:  # noqa: N802
        return SimpleNamespace(replay=self.work)

    @contextlib.contextmanager
    def graph(self, graph: object, capture_error_mode: str) -> Iterator[None]:
        self.graphs += 1
        yield


def test_seconds_on_a_gpu_are_those_of_its_events(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of 5 rounds of 3 pairs, replayed once to warm up: 30, 60, 45 s, so 3 s a call."""
    gpu = Gpu(clock, 900, 30, 60, 45)
    monkeypatch.setattr(torch, "cuda", gpu)
    calls: list[int] = []
    pairs = [(torch.ones(1), torch.ones(1))] * 3
    seconds = timing.device_seconds(lambda x, y: calls.append(1), pairs, "cuda", repeats=3)
    assert (seconds, len(calls), gpu.graphs) == (3, 2 + 15, 1)
    runs = {"a": clock.taking(50, 1, 3), "b": clock.taking(90, 4, 8)}
    assert timing.interleaved(runs, "cuda", 2) == {"a": [1, 3], "b": [4, 8]}
    run = clock.taking(70, 2, 2, 5, 5, 3, 3)
    before = gpu.waits
    assert timing.host_seconds(run, pairs[0], "cuda", calls=2) == 3
    assert gpu.waits > before
    before = clock.now
    timing.finished(clock.taking(5), "cuda")()
    timing.finished(clock.taking(5), "cpu")()
    assert clock.now == before + 5 + 1000 + 5
